"""Checks with an independent right answer. Each takes the thing to be judged and raises AssertionError if it errs.

The samplers' checks take any generator with ddpm's signature, `sampler(predict, xT, schedule, ts, *, noise)`; further
arguments such as `eta` are bound with functools.partial. Nothing here uses the formulas of `posterior` or of a sampler:
what they should give is worked out in another way (conditioning a joint Gaussian, composing kernels, the closed form of
an ODE, diffusers)."""

import math
from itertools import pairwise

import torch
from diffusers import DPMSolverMultistepScheduler
from torch.testing import assert_close

from diffusion_course.sampling import (Schedule, ideal_predictor, initial_noise, per_sample_noise, prediction_from_x0,
                                       sample)
from diffusion_course.unet import ContextUnet


def close(got, want, what, **tolerance):
    "`assert_close`, with the name of the claim in front of the message."
    assert_close(got, want, msg=lambda message: f"{what}: {message}", **tolerance)

def seeded(seed=0): return torch.Generator().manual_seed(seed)

def normal(seed=0):
    "A sampler's `noise` that draws from one generator."
    g = seeded(seed)
    return lambda xt: torch.randn(xt.shape, generator=g, dtype=xt.dtype)

def walk(sampler, *args, **kwargs): return list(sampler(*args, **kwargs))

# --- things to sample with -------------------------------------------------------------------------------------------

def labs(): return Schedule.linear(500, 1e-4, 0.02)

def random_images(m=64, shape=(3, 16, 16), seed=0):
    "m images of independent uniform pixels in [-1, 1]: far apart from each other (64 of 16×16: at least 21)."
    return torch.rand((m, *shape), generator=seeded(seed)) * 2 - 1

def random_unet(seed=0, **config):
    "A small ContextUnet in which no weight is zero, so that image, time and context all reach the output."
    net, g = ContextUnet(**{"n_feat": 8, **config}).requires_grad_(False).eval(), seeded(seed)
    for p in net.parameters(): p.normal_(std=0.1, generator=g)
    return net

def smooth_predictor(schedule, size, seed=0):
    "A bounded non-linear prediction that depends on every pixel and on the time. `size`: numbers in one sample."
    mixing = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64) / math.sqrt(size)
    def predict(xt, t):
        x0 = torch.tanh((xt.flatten(1).double() @ mixing).view_as(xt) + t / schedule.T).to(xt)
        return prediction_from_x0(x0, xt, t, schedule)
    return predict

# --- 1. analytic: Gaussian data N(mu, std²), each pixel on its own ---------------------------------------------------

def gaussian_predictor(mu, std, schedule):
    "The optimal prediction for pixels from N(mu, std²): E[x0 | xt], by regression of x0 on xt."
    def predict(xt, t):
        ab = float(schedule.alpha_bar[t])
        gain = math.sqrt(ab) * std**2 / (ab * std**2 + 1 - ab)
        return prediction_from_x0(mu + gain * (xt - math.sqrt(ab) * mu), xt, t, schedule)
    return predict

def ddpm_kernel(ab_t, ab_s):
    "(a, b, var) of x_s = a x0 + b x_t + sqrt(var) z: the joint Gaussian of (x_s, x_t) given x0, conditioned on x_t."
    covariance, var_s, var_t = math.sqrt(ab_t / ab_s) * (1 - ab_s), 1 - ab_s, 1 - ab_t
    b = covariance / var_t
    return math.sqrt(ab_s) - b * math.sqrt(ab_t), b, var_s - covariance * b

def ddim_kernel(eta=0.0):
    "The same for DDIM (2010.02502, equations 12 and 16): eta = 1 is DDPM, eta = 0 has no noise."
    def kernel(ab_t, ab_s):
        var = eta**2 * (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)
        b = math.sqrt((1 - ab_s - var) / (1 - ab_t))
        return math.sqrt(ab_s) - b * math.sqrt(ab_t), b, var
    return kernel

def gaussian_walk(mu, std, schedule, ts, kernel=ddpm_kernel):
    "[(mean, variance) of x_s] after every step of a walk that starts from N(0, 1): affine maps of Gaussians, composed."
    ab, (mean, var), moments = schedule.alpha_bar.tolist(), (0.0, 1.0), []
    for t, s in pairwise(ts):
        a, b, extra = kernel(ab[t], ab[s])
        gain = math.sqrt(ab[t]) * std**2 / (ab[t] * std**2 + 1 - ab[t])     # x0 = mu + gain (x_t - sqrt(ab_t) mu)
        slope, shift = a * gain + b, a * mu * (1 - gain * math.sqrt(ab[t]))
        mean, var = slope * mean + shift, slope**2 * var + extra
        moments.append((mean, var))
    return moments

def check_gaussian_exact(sampler, schedule, ts, *, kernel=ddpm_kernel, mu=0.3, std=0.5):
    """Mean and variance after every step, to rounding error.

    With Gaussian data a sampler is an affine map of its noise. Row 0, without any noise, is the mean; rows 1, 2 … get
    one unit of one draw each, and the squares of what becomes of it add up to the variance."""
    rows, draws = 2 * len(ts) + 2, iter(range(2, 2 * len(ts) + 2))
    def unit(row, like): return torch.zeros_like(like).index_fill_(0, torch.tensor([row]), 1.0)
    xT = unit(1, torch.empty(rows, 1, dtype=torch.float64))
    def noise(xt): return unit(next(draws), xt)
    steps = walk(sampler, gaussian_predictor(mu, std, schedule), xT, schedule, ts, noise=noise)
    want = gaussian_walk(mu, std, schedule, ts, kernel)
    assert len(steps) == len(want), f"number of steps: {len(steps)}, expected {len(want)}"
    for step, (mean, var) in zip(steps, want):
        response = step.xs[1:, 0] - step.xs[0, 0]
        close(step.xs[0, 0].item(), mean, f"mean after t={step.t} -> {step.s}", rtol=1e-8, atol=1e-10)
        close((response**2).sum().item(), var, f"variance after t={step.t} -> {step.s}", rtol=1e-8, atol=1e-10)

def check_gaussian_samples(sampler, schedule, ts, *, kernel=ddpm_kernel, mu=0.3, std=0.5, n=20_000, noise=None, seed=0):
    "Mean and variance of n samples, to five standard errors."
    noise = noise or normal(seed)
    xT = noise(torch.empty(n, 1, dtype=torch.float64))
    xs = walk(sampler, gaussian_predictor(mu, std, schedule), xT, schedule, ts, noise=noise)[-1].xs
    mean, var = gaussian_walk(mu, std, schedule, ts, kernel)[-1]
    close(xs.mean().item(), mean, "mean of the samples", rtol=0, atol=5 * math.sqrt(var / n))
    close(xs.var().item(), var, "variance of the samples", rtol=5 * math.sqrt(2 / n), atol=0)

def gaussian_ode(xt, t, s, mu, std, schedule):
    "Where the probability-flow ODE takes x_t at time s: a point keeps its quantile in the marginal of its time."
    ab_t, ab_s = float(schedule.alpha_bar[t]), float(schedule.alpha_bar[s])
    spread = math.sqrt((ab_s * std**2 + 1 - ab_s) / (ab_t * std**2 + 1 - ab_t))
    return math.sqrt(ab_s) * mu + spread * (xt - math.sqrt(ab_t) * mu)

EVEN = Schedule.linear(1024, 1e-3, 0.01)       # T is a power of 2, so the grids of 8, 16 … steps are exactly even

def error_orders(sampler, ns=(8, 16, 32, 64, 128), *, schedule=EVEN, mu=0.3, std=0.5):
    """log2 of how much the error shrinks each time the number of steps doubles. `ns` doubles from 8 and divides T.

    The error is taken at the times 7T/8 … T/8 that all grids share. The step to 0 is left out: the log-SNR is infinite
    there, and every sampler jumps to its prediction of x0, an error of its own order (`check_lands` looks at it)."""
    T, xT = schedule.T, torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    shared, errors = [T * k // 8 for k in range(1, 8)], []
    for n in ns:
        steps = walk(sampler, gaussian_predictor(mu, std, schedule), xT, schedule, schedule.timesteps(n))
        found = torch.stack([step.xs for step in steps if step.s in shared])
        exact = torch.stack([gaussian_ode(xT, T, step.s, mu, std, schedule) for step in steps if step.s in shared])
        errors.append((found - exact).square().mean().sqrt().item())
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]

def check_error_order(sampler, order, *, last=0.1, **kwargs):
    "The measured order at the finest grids is `order`, to within `last`."
    orders = error_orders(sampler, **kwargs)
    measured = [round(o, 2) for o in orders]
    close(orders[-1], float(order), f"order of the error, measured {measured}", rtol=0, atol=last)

def check_spread_order(sampler, order, *, std=0.5, steps=(64, 128, 256), within=0.1):
    """The error of the standard deviation that a noisy sampler gives to N(0, std²), half way, falls with this order.

    No chance in it: each noise has a coordinate of its own (1 there, 0 elsewhere), the walk is linear, and so the last state
    holds the weight of each noise, and the sum of their squares is the variance."""
    predict, middle = gaussian_predictor(0.0, std, EVEN), EVEN.T // 2
    def deviation(t): return math.sqrt(float(EVEN.alpha_bar[t]) * (std**2 - 1) + 1)
    errors = []
    for n in steps:
        units = iter(torch.eye(n + 1, dtype=torch.float64))
        walk = sampler(predict, deviation(EVEN.T) * next(units), EVEN, EVEN.timesteps(n), noise=lambda xt: next(units))
        errors.append(abs(next(step.xs for step in walk if step.s == middle).norm().item() - deviation(middle)))
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert abs(orders[-1] - order) < within, f"order of the spread: {orders}, expected {order}; errors {errors}"

# --- 2. the ideal denoiser on a finite set of images -----------------------------------------------------------------

def separation(images, schedule, t):
    "Distance between the two nearest images, in units of the noise level sigma[t]."
    distance = torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(math.inf)
    return distance.min().item() / schedule.sigma[t].item()

def must_land(images, schedule, ts):
    """Is the last time with noise, ts[-2], late enough for a walk to land on an image?

    The ideal prediction is a mixture in which an image at distance D sigma[t] from the right one weighs about
    exp(-D²/2 + D z), z a standard normal number. From D = 10 on that is nothing, if x_t is distributed as it should be.
    A walk of few steps can also arrive half way between two images, where both keep weight: of 100 seeds some did so up
    to D just below 50, none beyond. With 64 random images of 16×16 this asks for n >= 9 (linear), 6 (labs) or 5
    (cosine) steps. Below that the end is honestly a mixture."""
    return separation(images, schedule, ts[-2]) >= 50

def distance_to_nearest(x, images):
    "Root mean square of the difference to the nearest image, for each sample."
    return torch.cdist(x.flatten(1).double(), images.flatten(1).double()).min(dim=1).values / math.sqrt(x[0].numel())

def check_lands(sampler, schedule, ts, *, images=None, n=8, seed=0):
    "The walk ends on its last prediction of x0, and on one of the images wherever `must_land`."
    images = random_images() if images is None else images
    xT, noise = initial_noise(n, images.shape[1:], seed=seed), per_sample_noise(seed, n)
    last = walk(sampler, ideal_predictor(images, schedule), xT, schedule, ts, noise=noise)[-1]
    if must_land(images, schedule, ts):
        rms = distance_to_nearest(last.xs, images).max().item()
        assert rms <= 1e-3, f"landing: {rms:.2g} away from the nearest image"
    close(last.xs, last.pred.x0, "the last state is the last prediction")

def check_shares(sampler, schedule, ts, *, n=500, seed=0):
    """Of a data set in which one image occurs three times and another once, three walks in four must end on the first.
    Landing alone does not see how a walk came to its end: with a little too much noise, or too little, it lands as well."""
    one, other = random_images(2)
    noise = per_sample_noise(seed, n)
    data = torch.stack([one, one, one, other])
    last = walk(sampler, ideal_predictor(data, schedule), initial_noise(n, one.shape, seed=seed), schedule, ts, noise=noise)[-1]
    share = ((last.xs - one).flatten(1).norm(dim=1) < (last.xs - other).flatten(1).norm(dim=1)).double().mean().item()
    limit = 3.5 * math.sqrt(0.75 * 0.25 / n)
    assert abs(share - 0.75) < limit, f"shares: {share:.3f} of the walks end on the image that is 0.75 of the data, expected within {limit:.3f}"

# --- 3. diffusers ----------------------------------------------------------------------------------------------------

def diffusers_scheduler(cls, **config):
    "A scheduler of diffusers on the labs' schedule. It counts times from 0, so its t is our t - 1."
    clip = {} if cls is DPMSolverMultistepScheduler else {"clip_sample": False}
    return cls(num_train_timesteps=500, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", **clip, **config)

def check_against_diffusers(sampler, scheduler, n, predict, xT, schedule, *, seed=0, tolerance=1e-4, **step_options):
    """The whole trajectory equals the scheduler's, which draws from an equal generator. Returns the largest difference.

    diffusers draws noise for every t > 0 of its own, we for every s > 0: the k-th draw of both belongs to step k, and a
    draw too many for the last step has no weight."""
    scheduler.set_timesteps(n)
    ts = [int(t) + 1 for t in scheduler.timesteps] + [0]
    output = {"epsilon": "eps", "sample": "x0"}[scheduler.config.prediction_type]
    x, g, largest = xT, seeded(seed), 0.0
    steps = walk(sampler, predict, xT, schedule, ts, noise=normal(seed))
    for t, step in zip(scheduler.timesteps, steps, strict=True):
        x = scheduler.step(getattr(predict(x, int(t) + 1), output), t, x, generator=g, **step_options).prev_sample
        close(step.xs, x, f"diffusers' state after t={step.t} -> {step.s}", rtol=tolerance, atol=tolerance)
        largest = max(largest, (step.xs - x).abs().max().item())
    return largest

# --- 4. identities of samplers, predictions and noise ----------------------------------------------------------------

def check_steps(sampler, predict, xT, schedule, ts, noise=None):
    "The record of the walk: the pairs of `ts`, each from where the last one ended, and nothing changed afterwards."
    start, seen = xT.clone(), []
    for step in sampler(predict, xT, schedule, ts, noise=noise or normal()):
        seen.append((step, step.xt.clone(), step.xs.clone()))
    steps = [step for step, _, _ in seen]
    times = [(step.t, step.s) for step in steps]
    assert times == list(pairwise(ts)), f"times walked: {times}, expected the pairs of {ts}"
    assert [step.i for step in steps] == list(range(len(ts) - 1)), f"numbers of the steps: {[step.i for step in steps]}"
    close(xT, start, "xT is left alone", rtol=0, atol=0)
    for step, xt, xs in seen:
        close(step.xt, xt, "a state is left alone after its step", rtol=0, atol=0)
        close(step.xs, xs, "a state is left alone after its step", rtol=0, atol=0)
        assert step.xs.dtype == xT.dtype, f"dtype of the state: {step.xs.dtype}, expected {xT.dtype}"
        assert step.xs.shape == xT.shape, f"shape of the state: {tuple(step.xs.shape)}, expected {tuple(xT.shape)}"
        assert not step.xs.requires_grad, "a sampler records no gradient"
        check_pair(step.pred, step.xt, step.t, schedule)
    for before, after in pairwise(steps):
        close(after.xt, before.xs, "a step starts where the last one ended", rtol=0, atol=0)
    close(steps[0].xt, start, "the first state is xT", rtol=0, atol=0)
    close(steps[-1].xs, steps[-1].pred.x0, "the last state is the last prediction")

def check_pair(pred, xt, t, schedule):
    "x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps."
    ab = schedule.alpha_bar[t].view(-1, *[1] * (xt.ndim - 1))
    again = (ab.sqrt() * pred.x0 + (1 - ab).sqrt() * pred.eps).to(xt)
    close(again, xt, "the pair (x0, eps) is consistent", rtol=1e-4, atol=1e-4)

def check_clip(clip, schedule, low=-1, high=1):
    "`clip(predict, schedule)` keeps x0 in range, keeps the pair consistent, and changes nothing that was in range."
    for scale, inside in ((3.0, False), (0.5, True)):
        wanted = torch.randn(6, 3, 4, 4, generator=seeded()).clamp(-1, 1) * scale
        for t in (1, schedule.T // 2, schedule.T):
            xt = torch.randn(6, 3, 4, 4, generator=seeded(1))
            predict = lambda xt, t: prediction_from_x0(wanted, xt, t, schedule)
            pred = clip(predict, schedule)(xt, t)
            assert pred.x0.min() >= low and pred.x0.max() <= high, f"x0 is held in [{low}, {high}]"
            check_pair(pred, xt, t, schedule)
            if inside: close(pred.x0, wanted, "an x0 in range is left alone", rtol=0, atol=0)

def check_batch_split(sampler, predict, schedule, *, steps, shape, n=5):
    "Sample i is the same alone, in the middle of others and in a larger batch."
    every = sample(predict, schedule, n, sampler=sampler, steps=steps, shape=shape)
    for indices in ([0], [n - 1], [3, 1], range(n - 2)):
        some = sample(predict, schedule, indices, sampler=sampler, steps=steps, shape=shape)
        close(some, every[list(indices)], f"samples {list(indices)} of {n}, drawn apart", rtol=1e-4, atol=1e-4)

def check_noise_streams(first, per_sample, shape=(3, 16, 16)):
    "Noise is standard normal, and new for every sample, seed, draw and stream (first noise, noise of the steps)."
    def step_noise(seed):
        noise = per_sample(seed, 8)
        return [noise(torch.empty(8, *shape)) for _ in range(3)]
    draws = torch.cat([first(8, shape, seed=0), *step_noise(0), first(8, shape, seed=1), *step_noise(1)])
    draws = draws.flatten(1).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):      # of z^power, z standard normal
        error = 5 * math.sqrt(variance / draws.numel())
        close((draws**power).mean().item(), float(moment), f"noise is normal, moment {power}", rtol=0, atol=error)
    likeness = torch.corrcoef(draws).fill_diagonal_(0).abs().max().item()
    assert likeness < 6 / math.sqrt(draws.shape[1]), f"no two draws are alike: largest correlation {likeness:.2f}"

def check_noise_per_sample(per_sample, shape=(3, 4, 4)):
    "Each sample draws from its own stream, whoever is drawn beside it and however often."
    many, few = per_sample(0, 6), per_sample(0, [4, 1])
    for _ in range(3):
        got, want = few(torch.empty(2, *shape)), many(torch.empty(6, *shape))[[4, 1]]
        close(got, want, "noise depends on seed and index alone", rtol=0, atol=0)

def check_context_rows(make, schedule, n=4):
    "`make(net, schedule, context)`: row i of the context steers sample i, and one row steers them all."
    net, xt, t = random_unet(), torch.randn(n, 3, 8, 8, generator=seeded()), schedule.T // 2
    context = torch.randn(n, 5, generator=seeded(1))
    with torch.no_grad():
        alone = torch.cat([make(net, schedule, context[i:i + 1])(xt[i:i + 1], t).eps for i in range(n)])
        close(make(net, schedule, context)(xt, t).eps, alone, "each sample has its own context", rtol=1e-4, atol=1e-4)
        repeated = make(net, schedule, context[:1].repeat(n, 1))(xt, t).eps
        close(make(net, schedule, context[:1])(xt, t).eps, repeated, "one row serves all")

# --- 5. times and schedules ------------------------------------------------------------------------------------------

def check_times(ts, T, n):
    "n + 1 whole times that fall strictly from T to 0."
    assert all(type(t) is int for t in ts), f"times of n={n} are whole: {ts}"
    assert len(ts) == n + 1, f"times of n={n}: there are {len(ts)}"
    assert ts[0] == T and ts[-1] == 0, f"times of n={n} go from {ts[0]} to {ts[-1]}"
    assert all(s < t for t, s in pairwise(ts)), f"times of n={n} fall strictly: {ts}"

def check_terminal_signal(schedule, limit=0.01):
    "Almost nothing of the image is left at T, where sampling starts from pure noise."
    signal = schedule.alpha_bar[-1].sqrt().item()
    assert signal <= limit, f"signal left at T: {signal:.3f}"

def check_posterior_composes(posterior, schedule, t=400, r=130, s=20):
    "Going from t to r to s is going from t to s (Chapman-Kolmogorov), for a fixed x0."
    x0, xt = torch.randn(2, 5, 2, generator=seeded(), dtype=torch.float64)
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    mean_r, var_r = posterior(x0, xt, t, r, schedule)
    slope = posterior(zero, one, r, s, schedule)[0]              # how much x_s moves with x_r
    mean, var = posterior(x0, xt, t, s, schedule)
    close(posterior(x0, mean_r, r, s, schedule)[0], mean, "mean of two steps and of one", rtol=1e-10, atol=1e-12)
    var_two = slope**2 * var_r + posterior(x0, xt, r, s, schedule)[1]
    close(var_two, var.expand_as(x0), "variance of two steps and of one", rtol=1e-10, atol=1e-12)

def check_posterior_by_simulation(posterior, schedule, t, s, *, n=200_000, seed=0):
    "Noise x0 to time s and on to t, then regress x_s on x_t: line and scatter, to five standard errors."
    ab_t, ab_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
    z = torch.randn(2, n, generator=seeded(seed), dtype=torch.float64)
    x0 = 0.7
    xs = math.sqrt(ab_s) * x0 + math.sqrt(1 - ab_s) * z[0]
    xt = math.sqrt(ab_t / ab_s) * xs + math.sqrt(1 - ab_t / ab_s) * z[1]
    mean, var = posterior(torch.full_like(xt, x0), xt, t, s, schedule)
    rest, scale = xs - mean, math.sqrt(var.item() / n)
    close(rest.mean().item(), 0.0, "mean of x_s given x_t", rtol=0, atol=5 * scale)
    close((rest * (xt - xt.mean())).mean().item(), 0.0, "slope of x_s on x_t", rtol=0, atol=5 * scale * xt.std().item())
    close(rest.var().item(), var.item(), "variance of x_s given x_t", rtol=5 * math.sqrt(2 / n), atol=0)

# --- 6. adding noise and the loss ------------------------------------------------------------------------------------

def check_add_noise(add_noise, schedule, ts=(1, 20, 100), *, n=100_000, seed=0):
    "One jump to t has the moments of t small steps x <- sqrt(1 - beta) x + sqrt(beta) z, to five standard errors."
    g = seeded(seed)
    x0 = torch.full((n, 1), 0.8, dtype=torch.float64)
    def z(): return torch.randn(x0.shape, generator=g, dtype=x0.dtype)
    x, beta = x0, schedule.beta.tolist()
    for t in range(1, max(ts) + 1):
        x = math.sqrt(1 - beta[t]) * x + math.sqrt(beta[t]) * z()
        if t in ts:
            jump = add_noise(x0, t, z(), schedule)
            error = math.sqrt(2 * x.var().item() / n)
            close(jump.mean().item(), x.mean().item(), f"mean of x_{t}", rtol=0, atol=5 * error)
            close(jump.var().item(), x.var().item(), f"variance of x_{t}", rtol=5 * math.sqrt(4 / n), atol=0)

def check_per_image_times(noised, schedule, n=8):
    "`noised(x0, t, eps, schedule)` with a time per image is each image alone. n images n wide: a wrong axis would fit."
    x0, eps = torch.randn(2, n, 1, n, n, generator=seeded(), dtype=torch.float64)
    t = torch.linspace(1, schedule.T, n).long()
    alone = torch.cat([noised(x0[i:i + 1], int(t[i]), eps[i:i + 1], schedule) for i in range(n)])
    close(noised(x0, t, eps, schedule), alone, "each image has its own time")

class Recorder(torch.nn.Module):
    "A network that answers `answer(xt, t)` and notes what it was called with."
    def __init__(self, answer=lambda xt, t: torch.zeros_like(xt), predicts="eps"):
        super().__init__()
        self.answer, self.predicts, self.calls = answer, predicts, []

    def forward(self, xt, t, context=None):
        self.calls.append((xt, t, context))
        return self.answer(xt, t)

def check_loss(loss, schedule, kind, *, seed=0, n=64):
    "The loss draws a time from 1 … T for every image, then the noise, and takes the mean square of what is missing."
    x0 = random_images(n, (3, 8, 8))
    net = Recorder(lambda xt, t: 0.1 * xt, predicts=kind)
    value = loss(net, x0, None, schedule, generator=seeded(seed))
    g = seeded(seed)
    t, eps = torch.randint(1, schedule.T + 1, (n,), generator=g), torch.randn(x0.shape, generator=g)
    ab = schedule.alpha_bar[t].view(n, 1, 1, 1)
    signal, noise = ab.sqrt().float(), (1 - ab).sqrt().float()
    xt = signal * x0 + noise * eps
    assert torch.equal(net.calls[0][1], t), f"times in the loss: {net.calls[0][1].tolist()}, expected {t.tolist()}"
    close(net.calls[0][0], xt, "noisy images in the loss", rtol=1e-5, atol=1e-5)
    target = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0, "u": eps - x0}[kind]
    close(value, ((0.1 * xt - target) ** 2).mean(), "value of the loss", rtol=1e-5, atol=1e-6)

def check_loss_times(loss, T=4, n=4000):
    "Every time from 1 to T is drawn equally often, and 0 never."
    net = Recorder()
    loss(net, torch.zeros(n, 1), None, Schedule.linear(T), generator=seeded())
    counts = torch.bincount(net.calls[0][1], minlength=T + 1).double()
    want = torch.tensor([0.0] + [n / T] * T, dtype=torch.float64)
    close(counts, want, "how often each time is drawn", rtol=0, atol=5 * math.sqrt(n / T))
    assert counts[0] == 0, "time 0 has no noise to learn"

def check_target(target, from_target, kind, schedule):
    "What the network should answer, read back, is the image and the noise that went in."
    x0, eps = torch.randn(2, 12, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    t = torch.linspace(1, schedule.T, 12).long()
    ab = schedule.alpha_bar[t].view(12, 1, 1, 1)
    pred = from_target(target(kind, x0, eps, t, schedule), ab.sqrt() * x0 + (1 - ab).sqrt() * eps, t, schedule)
    close(pred.x0, x0, f"x0 read back from {kind}", rtol=1e-6, atol=1e-6)
    close(pred.eps, eps, f"eps read back from {kind}", rtol=1e-6, atol=1e-6)
