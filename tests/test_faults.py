"""Every known wrong version is caught. Each row of a table names a mistake met in the wild, the check that ours passes,
and the words with which that check refuses the wrong version: a check that never refuses anything guards nothing."""
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import oracles
import pytest
import torch
import torch.nn.functional as F
from oracles import labs, random_images, smooth_predictor
from torch.testing import assert_close

from diffusion_course.fast_sampling import ddim
from diffusion_course.fast_sampling import heun as our_heun
from diffusion_course.sampling import (PREDICTIONS, Prediction, Schedule, Step, clipped, ddpm, initial_noise,
                                       per_sample_noise, posterior, prediction_from_eps, predictor, visited)
from diffusion_course.training import add_noise, prediction_loss, prediction_target

S = Schedule.linear(500)


class Fault(NamedTuple):
    "One mistake: `check(ours)` passes, `check(wrong)` raises AssertionError with `words` in its message."
    name: str
    check: object
    ours: object
    wrong: object
    words: str

FAULTS = []
def fault(check, ours, words, wrong=None, name=None):
    "Add a row to the table; decorates the wrong version, whose docstring says what is wrong."
    def add(wrong): FAULTS.append(Fault(name or wrong.__name__, check, ours, wrong, words)); return wrong
    return add if wrong is None else add(wrong)

# the checks, each with its setting
def gaussian(n): return partial(oracles.check_gaussian_exact, schedule=S, ts=S.timesteps(n))
def gaussian_ddim(n): return partial(gaussian(n), kernel=oracles.ddim_kernel(0))
def many_gaussians(n): return partial(oracles.check_gaussian_samples, schedule=S, ts=S.timesteps(n))
def landing(n): return partial(oracles.check_lands, schedule=S, ts=S.timesteps(n))
def shares(n): return partial(oracles.check_shares, schedule=S, ts=S.timesteps(n))

def record(sampler):
    xT = initial_noise(3, (3, 4, 4))
    oracles.check_steps(sampler, smooth_predictor(S, 48), xT, S, S.timesteps(30))

def ab(t): return S.alpha_bar[t].item()                 # like the tables of the wrong versions: a negative t wraps

def jump(pred, s, schedule=S):
    "DDIM's step without noise (2010.02502, equation 12 with sigma = 0)."
    return schedule.alpha_bar[s].item()**0.5 * pred.x0 + (1 - schedule.alpha_bar[s].item())**0.5 * pred.eps

def walker(move, pairs=pairwise, ends_at_0=True):
    "A sampler from one line: move(pred, xt, t, s, noise) gives the next state, pairs(ts) the times of every step."
    def sampler(predict, xT, schedule, ts=None, *, noise=torch.randn_like):
        xt = xT
        for i, (t, s) in enumerate(pairs(visited(schedule, ts))):
            pred = predict(xt, t)
            xs = pred.x0 if s == 0 and ends_at_0 else move(pred, xt, t, s, noise)
            yield Step(i, t, s, xt, xs, pred)
            xt = xs
    return sampler

def ddim_on(schedule, **kwargs): return walker(lambda pred, xt, t, s, noise: jump(pred, s, schedule), **kwargs)


# --- samplers: which times are walked --------------------------------------------------------------------------------

def wrapping(ts):
    "Times T, T - T//n, …, and the next time is t - T//n even where that is negative: the labs' DDIM."
    n, T = len(ts) - 1, ts[0]
    return [(t, t - T // n) for t in range(T, 0, -(T // n))]

def short_stride(ts):
    "diffusers' DDIM: the right times, but each step goes to t - T//n and not to the next time."
    n, T = len(ts) - 1, ts[0]
    return [(t, max(t - T // n, 0)) for t in ts[:-1]]

def never_at_0(ts): return list(pairwise(ts[:-1] + [1]))
def one_short(ts): return list(pairwise(ts[:-1]))

for n in (30, 33, 40, 60):
    fault(landing(n), ddim, "landing", ddim_on(S, pairs=wrapping),
          name=f"stride that wraps to the noisy end, n={n}")
fault(landing(100), ddim, "landing", ddim_on(S, pairs=never_at_0),
      name="a loop that stops at t=1")
fault(landing(20), ddim, "landing", ddim_on(S, pairs=one_short),
      name="a loop that leaves out its last step")
fault(gaussian_ddim(30), ddim, "mean after t=500 -> 484|variance after t=500 -> 484",
      ddim_on(S, pairs=short_stride), name="next time is t - T//n (diffusers)")
fault(landing(30), ddim, "landing", ddim_on(S, pairs=short_stride),
      name="next time is t - T//n (diffusers), seen at the end")
fault(record, ddim, "times walked", ddim_on(S, pairs=short_stride),
      name="next time is t - T//n (diffusers), seen in the record")


# --- samplers: how much noise ----------------------------------------------------------------------------------------

def ddpm_with(scale, **kwargs):
    "DDPM whose step adds scale(t, s) z instead of the posterior's noise."
    def move(pred, xt, t, s, noise): return posterior(pred.x0, xt, t, s, S)[0] + scale(t, s) * noise(xt)
    return walker(move, **kwargs)

def root_of_posterior_variance(t, s): return ((1 - ab(s)) / (1 - ab(t)) * (1 - ab(t) / ab(s)))**0.5
def root_of_beta(t, s): return (1 - ab(t) / ab(s))**0.5

for name, scale in {
    "no noise": lambda t, s: 0.0,
    "too much noise": lambda t, s: 1.2 * root_of_posterior_variance(t, s),
    "noise with variance beta": root_of_beta,
    "beta in place of its root": lambda t, s: root_of_beta(t, s)**2,
    "variance in place of its root": lambda t, s: root_of_posterior_variance(t, s)**2,
}.items():
    fault(gaussian(100), ddpm, "variance after t=500 -> 495", ddpm_with(scale), name=name)
    fault(many_gaussians(20), ddpm, "variance of the samples", ddpm_with(scale), name=f"{name}, seen in samples")

noise_at_0 = ddpm_with(lambda t, s: root_of_beta(t, s) if s == 0 else root_of_posterior_variance(t, s), ends_at_0=False)
fault(landing(500), ddpm, "landing", noise_at_0, name="noise added at t=0")
fault(gaussian(100), ddpm, "variance after t=5 -> 0", noise_at_0, name="noise added at t=0, seen as variance")

@fault(many_gaussians(100), ddpm, "mean of the samples|variance of the samples")
def uniform_noise_in_the_steps(predict, xT, schedule, ts=None, *, noise=None):
    "torch.rand where torch.randn is meant."
    g = oracles.seeded()
    return ddpm(predict, xT, schedule, ts, noise=lambda xt: torch.rand(xt.shape, generator=g, dtype=xt.dtype))

for size in (0, 0.5, 1.5): # they land all the same
    fault(shares(200), ddpm, "shares", ddpm_with(lambda t, s, size=size: size * root_of_posterior_variance(t, s)), name=f"{size} times the noise, seen in the shares")

@fault(many_gaussians(20), ddpm, "variance of the samples")
def noise_only_in_the_first_step(predict, xT, schedule, ts=None, *, noise=None):
    "The noise is drawn once and used in every step."
    z = noise(xT)
    return ddpm(predict, xT, schedule, ts, noise=lambda xt: z)


# --- samplers: which coefficients ------------------------------------------------------------------------------------

def ancestral(x0_weight, xt_weight):
    return walker(lambda pred, xt, t, s, noise: x0_weight(t, s) * pred.x0 + xt_weight(t, s) * xt
                  + root_of_posterior_variance(t, s) * noise(xt))

def right_x0(t, s): return ab(s)**0.5 * (1 - ab(t) / ab(s)) / (1 - ab(t))
def right_xt(t, s): return (ab(t) / ab(s))**0.5 * (1 - ab(s)) / (1 - ab(t))
fault(gaussian(100), ancestral(right_x0, right_xt), "mean after t=500",
      ancestral(lambda t, s: right_x0(t - 1, max(s - 1, 0)), lambda t, s: right_xt(t - 1, max(s - 1, 0))),
      name="tables read at t-1 (raw index off by one)")
fault(gaussian(100), ancestral(right_x0, right_xt), "mean after t=500",
      ancestral(lambda t, s: right_x0(t, t - 1), lambda t, s: right_xt(t, t - 1)),
      name="coefficients of one step for a stride of five")
fault(gaussian(100), ancestral(right_x0, right_xt), "mean after t=500",
      ancestral(lambda t, s: ab(s) * (1 - ab(t) / ab(s)) / (1 - ab(t)), right_xt),
      name="alpha_bar in place of its root")
fault(gaussian(500), ddpm, "mean after t=500",
      walker(lambda pred, xt, t, s, noise: (xt - (1 - ab(t) / ab(s)) / (1 - ab(t)) * pred.eps) / (ab(t) / ab(s))**0.5
             + root_of_posterior_variance(t, s) * noise(xt)), name="missing root in the mean of DDPM's algorithm 2")
fault(gaussian(500), ddpm, "mean after t=500",
      walker(lambda pred, xt, t, s, noise: (xt - (1 - ab(t) / ab(s)) / (1 - ab(t))**0.5 * pred.eps) / ab(t)**0.5
             + root_of_posterior_variance(t, s) * noise(xt)), name="alpha_bar for alpha in DDPM's algorithm 2")

def heun(predict, xT, schedule, ts=None, *, noise=None, second=lambda predict, xs, s: predict(xs, s).eps):
    "DDIM's step, then again with the mean of the noise at both ends (EDM, 2206.00364, algorithm 1)."
    xt = xT
    for i, (t, s) in enumerate(pairwise(visited(schedule, ts))):
        pred, ab_t, ab_s = predict(xt, t), schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
        xs = jump(pred, s, schedule)
        if s > 0:
            slope, dsigma = (pred.eps + second(predict, xs, s)) / 2, (schedule.sigma[s] - schedule.sigma[t]).item()
            xs = ab_s**0.5 * (xt / ab_t**0.5 + dsigma * slope)
        yield Step(i, t, s, xt, xs, pred)
        xt = xs

order_1, order_2 = (partial(oracles.check_error_order, order=order) for order in (1, 2))
fault(order_1, ddim, "order of the error",
      walker(lambda pred, xt, t, s, noise: jump(Prediction(pred.x0, xt), s, oracles.EVEN)),
      name="x_t itself as direction to x_t: no convergence")
fault(order_1, ddim, "order of the error", ddim_on(Schedule.linear(1024)),
      name="the tables of another schedule")
fault(order_2, our_heun, "order of the error", ddim_on(oracles.EVEN), name="first order sold as second")
fault(order_2, our_heun, "order of the error", partial(heun, second=lambda predict, xs, s: predict(xs, s + 1).eps),
      name="second slope at the wrong time")


# --- samplers: the record --------------------------------------------------------------------------------------------

@fault(record, ddpm, "xT is left alone|a state is left alone")
def state_changed_in_place(predict, xT, schedule, ts=None, *, noise=None):
    "One buffer for all states: whoever keeps the steps keeps the same picture many times."
    for step in ddpm(predict, xT, schedule, ts, noise=noise):
        yield step._replace(xs=xT.copy_(step.xs), xt=xT)

@fault(record, ddpm, "numbers of the steps")
def steps_counted_from_1(predict, xT, schedule, ts=None, *, noise=None):
    for step in ddpm(predict, xT, schedule, ts, noise=noise): yield step._replace(i=step.i + 1)

@fault(record, ddpm, "dtype of the state")
def state_in_another_dtype(predict, xT, schedule, ts=None, *, noise=None):
    for step in ddpm(predict, xT, schedule, ts, noise=noise): yield step._replace(xs=step.xs.double())


# --- predictions -----------------------------------------------------------------------------------------------------

clip = partial(oracles.check_clip, schedule=S)

@fault(clip, clipped, r"pair \(x0, eps\) is consistent")
def x0_clamped_and_the_old_eps_kept(predict, schedule):
    return lambda xt, t: Prediction(predict(xt, t).x0.clamp(-1, 1), predict(xt, t).eps)

@fault(clip, clipped, "an x0 in range is left alone")
def stretched_per_image(predict, schedule):
    "Each image from its own minimum … maximum to -1 … 1: colours are no longer the model's."
    def stretched(xt, t):
        x0 = predict(xt, t).x0
        low, high = x0.amin((1, 2, 3), keepdim=True), x0.amax((1, 2, 3), keepdim=True)
        return PREDICTIONS["x0"]((x0 - low) / (high - low) * 2 - 1, xt, t, schedule)
    return stretched

@fault(clip, clipped, "x0 is held in")
def not_clipped(predict, schedule): return predict

@fault(partial(oracles.check_context_rows, schedule=S), predictor, "each sample has its own context")
def first_context_for_all(net, schedule, context):
    return lambda xt, t: prediction_from_eps(
        net(xt, torch.full((len(xt),), t), context[:1].expand(len(xt), -1)), xt, t, schedule)


# --- schedules and times ---------------------------------------------------------------------------------------------

fault(oracles.check_terminal_signal, S, "signal left at T: 0.080", labs(), name="the betas of T=1000 with T=500")

def check_all_times(timesteps):
    for n in range(1, 501): oracles.check_times(timesteps(n), 500, n)

fault(check_all_times, S.timesteps, "there are", lambda n: list(range(500, 0, -(500 // n))) + [0],
      name="T//n as stride")
fault(check_all_times, S.timesteps, "go from 499 to 0", lambda n: [499, *S.timesteps(n)[1:]],
      name="times that start at T-1")
fault(check_all_times, S.timesteps, "go from 500 to 1", lambda n: [*S.timesteps(n)[:-1], 1], name="times that end at 1")
fault(check_all_times, S.timesteps, "fall strictly",
      lambda n: [round(500 * (k / n)**2) for k in range(n, -1, -1)], name="squares rounded onto one another")
fault(check_all_times, S.timesteps, "are whole", lambda n: torch.linspace(500, 0, n + 1).tolist(),
      name="fractional times")


# --- the posterior ---------------------------------------------------------------------------------------------------

def posterior_with(var):
    "The right mean with another variance."
    return lambda x0, xt, t, s, schedule: (posterior(x0, xt, t, s, schedule)[0], torch.tensor(var(t, s)).to(xt))

composition = partial(oracles.check_posterior_composes, schedule=S)
simulation = partial(oracles.check_posterior_by_simulation, schedule=S, t=300, s=100)
fault(composition, posterior, "variance of two steps", posterior_with(lambda t, s: 1 - ab(t) / ab(s)),
      name="beta for the variance of the posterior, composed")
fault(simulation, posterior, "variance of x_s", posterior_with(lambda t, s: 1 - ab(t) / ab(s)),
      name="beta for the variance of the posterior, simulated")

@fault(simulation, posterior, "slope of x_s|mean of x_s")
def posterior_of_one_step_for_a_stride(x0, xt, t, s, schedule): return posterior(x0, xt, t, t - 1, schedule)


# --- noise -----------------------------------------------------------------------------------------------------------

def first_noise(draw): oracles.check_noise_streams(draw, per_sample_noise)
def steps_noise(draw): oracles.check_noise_streams(initial_noise, draw)

fault(first_noise, initial_noise, "noise is normal, moment 1",
      lambda n, shape, seed: torch.rand((n, *shape), generator=oracles.seeded(seed)), name="uniform noise")
fault(first_noise, initial_noise, "noise is normal, moment 4",
      lambda n, shape, seed: (torch.rand((n, *shape), generator=oracles.seeded(seed)) - 0.5) * 12**0.5,
      name="uniform noise of the right mean and variance")
fault(first_noise, initial_noise, "no two draws",
      lambda n, shape, seed: initial_noise(1, shape, seed=seed).expand(n, *shape),
      name="the same noise for every sample")
fault(first_noise, initial_noise, "no two draws",
      lambda n, shape, seed: per_sample_noise(seed, n)(torch.empty(n, *shape)),
      name="the first noise again in the first step")
fault(steps_noise, per_sample_noise, "no two draws",
      lambda seed, n: lambda xt: initial_noise(n, xt.shape[1:], seed=seed + 7), name="the same noise in every step")
fault(steps_noise, per_sample_noise, "no two draws", lambda seed, n: per_sample_noise(0, n),
      name="a seed that is ignored")

@fault(oracles.check_noise_per_sample, per_sample_noise, "seed and index alone")
def one_generator_for_the_batch(seed, n):
    "Sample 7 changes when 8 are drawn instead of 16."
    g = oracles.seeded(seed)
    return lambda xt: torch.randn(xt.shape, generator=g)


# --- adding noise and the loss ---------------------------------------------------------------------------------------

noising, per_image = partial(oracles.check_add_noise, schedule=S), partial(oracles.check_per_image_times, schedule=S)
def table(t, x): return S.alpha_bar[t].view(-1, *[1] * (x.ndim - 1)).to(x)

@fault(noising, add_noise, "variance of x_1:")
def missing_root(x0, t, eps, schedule): return table(t, x0).sqrt() * x0 + (1 - table(t, x0)) * eps

@fault(noising, add_noise, "variance of x_1:")
def alpha_bar_of_the_time_before(x0, t, eps, schedule):
    return table(t - 1, x0).sqrt() * x0 + (1 - table(t - 1, x0)).sqrt() * eps

@fault(noising, add_noise, "variance of x_1:")
def beta_in_place_of_root_of_beta(x0, t, eps, schedule):
    x = x0
    for k in range(1, t + 1): x = (1 - schedule.beta[k]).sqrt() * x + schedule.beta[k] * torch.randn(
        x0.shape, generator=oracles.seeded(k), dtype=x0.dtype)
    return x

@fault(noising, add_noise, "mean of x_20")
def alpha_in_place_of_alpha_bar(x0, t, eps, schedule):
    return schedule.alpha[t].sqrt() * x0 + schedule.beta[t].sqrt() * eps

@fault(noising, add_noise, "mean of x_")
def uniform_noise_in_training(x0, t, eps, schedule):
    return add_noise(x0, t, torch.rand(x0.shape, generator=oracles.seeded(), dtype=x0.dtype), schedule)

@fault(per_image, add_noise, "each image has its own time")
def times_along_the_width(x0, t, eps, schedule):
    "alpha_bar[t] has shape (n,) and meets the last axis of the images: no error where n is the width."
    ab = schedule.alpha_bar[t]
    return ab.sqrt() * x0 + (1 - ab).sqrt() * eps

@fault(per_image, add_noise, "each image has its own time")
def first_time_for_all(x0, t, eps, schedule):
    return add_noise(x0, int(torch.as_tensor(t).flatten()[0]), eps, schedule)

by_hand = partial(oracles.check_loss, schedule=S, kind="eps")

def loss_with(draw_times=lambda n, T, g: torch.randint(1, T + 1, (n,), generator=g), noised=add_noise,
              target=lambda x0, eps: eps, reduction="mean"):
    "The loss of DDPM, algorithm 1, with one part replaced."
    def loss(net, x0, context, schedule, *, generator=None):
        t = draw_times(len(x0), schedule.T, generator)
        eps = torch.randn(x0.shape, generator=generator)
        return F.mse_loss(net(noised(x0, t, eps, schedule), t), target(x0, eps), reduction=reduction)
    return loss

def one_time(n, T, g): return torch.randint(1, T + 1, (1,), generator=g).expand(n)
def from_0(n, T, g): return torch.randint(0, T, (n,), generator=g)
fault(by_hand, loss_with(), "noisy images in the loss", loss_with(noised=missing_root),
      name="missing root, in the loss")
fault(by_hand, loss_with(), "noisy images in the loss", loss_with(noised=alpha_bar_of_the_time_before),
      name="alpha_bar[t-1], in the loss")
fault(by_hand, loss_with(), "value of the loss", loss_with(target=lambda x0, eps: x0),
      name="the image as target of eps")
fault(by_hand, loss_with(), "value of the loss", loss_with(target=lambda x0, eps: -eps), name="the sign of the noise")
fault(by_hand, loss_with(), "value of the loss", loss_with(reduction="sum"), name="a sum in place of the mean")
fault(by_hand, loss_with(), "times in the loss", loss_with(one_time), name="one time for the whole batch")
fault(oracles.check_loss_times, loss_with(), "how often each time", loss_with(one_time),
      name="one time, seen in the counts")
fault(oracles.check_loss_times, loss_with(), "how often each time", loss_with(from_0), name="times 0 … T-1")
for kind in PREDICTIONS:
    check = partial(oracles.check_target, from_target=PREDICTIONS[kind], kind=kind, schedule=S)
    fault(check, prediction_target, "read back", lambda *a: -prediction_target(*a), name=f"the sign of {kind}")
fault(partial(oracles.check_target, from_target=PREDICTIONS["v"], kind="v", schedule=S), prediction_target, "read back",
      lambda kind, x0, eps, t, schedule: prediction_target("v", eps, x0, t, schedule), name="x0 and eps swapped in v")


# --- how tests compare -----------------------------------------------------------------------------------------------

def tells_apart(equal):
    "`equal` must refuse tensors that differ."
    for a, b in (([1.0, -1, 5], [0.0, 0, 5]), ([torch.nan, 1], [torch.nan, 1]), ([1.0, 1], [1.0])):
        with pytest.raises(AssertionError): equal(torch.tensor(a), torch.tensor(b))

def refuses(equal):
    try: tells_apart(equal)
    except pytest.fail.Exception as failure: raise AssertionError(str(failure)) from failure

@fault(refuses, assert_close, "DID NOT RAISE")
def signed_sum(a, b):
    "The differences cancel: [1, -1, 5] is taken for [0, 0, 5]."
    assert abs((a - b).sum()) < 1e-6


# --- the table -------------------------------------------------------------------------------------------------------

table_of_faults = pytest.mark.parametrize("fault", FAULTS, ids=[fault.name.replace("_", " ") for fault in FAULTS])

@table_of_faults
def test_ours_passes(fault): fault.check(fault.ours)

@table_of_faults
def test_wrong_version_is_caught(fault):
    with pytest.raises(AssertionError, match=fault.words): fault.check(fault.wrong)

def test_names_are_different(): assert len({fault.name for fault in FAULTS}) == len(FAULTS)

def test_our_loss_is_the_loss_of_the_table():
    by_hand(prediction_loss)
    oracles.check_loss_times(prediction_loss)
