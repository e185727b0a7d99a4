"Lesson 7: edits compose with any sampler, and where the posterior has a closed form they are held to it."
import json
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import oracles
from conftest import ROOT
from diffusion_course import check_edit
from diffusion_course.editing import Measure, ddnm, ddpm_invert, dps, forward, from_sketch, grey, inpaint, replayed, seen, smaller, steered
from diffusion_course.fast_sampling import ddim, dpmpp_2m, heun
from diffusion_course.sampling import (Prediction, Schedule, clipped, ddpm, ideal_predictor, initial_noise, per_sample_noise, prediction_from_x0,
                                       predictor, sample)
from diffusion_course.training import add_noise
from diffusion_course.views import averaged, viewed, windowed
from oracles import close, normal, random_images, random_unet, seeded

S, F = Schedule.cosine(100), Schedule.flow(100)
schedules = pytest.mark.parametrize("schedule", [S, F, Schedule.linear(60), Schedule.cosine(100).shifted(2)], ids=str)
HALF = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4) # of 4 x 4 pixels the left half is kept


def last(walk):
    *_, step = walk
    return step.xs


# --- from a sketch ----------------------------------------------------------------------------------------------------

MU, STD = 0.3, 0.5

def check_sketch(edit, schedule=S, t=60):
    "Gaussian data, no fresh noise: a point keeps its quantile, so the end is known for each sketch and noise (the ODE's closed form)."
    predict = oracles.gaussian_predictor(MU, STD, schedule)
    sketch = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    xt = add_noise(sketch, t, initial_noise(9, (1,)).double(), schedule)
    close(edit(predict, sketch, schedule, t), oracles.gaussian_ode(xt, t, 0, MU, STD, schedule), "the end of each sketch", rtol=0, atol=0.06)

def wrong_sketch(noised=lambda t, T: t, start=lambda t, T: t, scale=lambda x, ab: x):
    def edit(predict, sketch, schedule, t):
        eps, T = initial_noise(len(sketch), sketch.shape[1:]).double(), schedule.T
        x = add_noise(scale(sketch, schedule.alpha_bar[t]), noised(t, T), eps, schedule)
        return last(ddim(predict, x, schedule, list(range(start(t, T), -1, -1))))
    return edit

@schedules
def test_a_sketch_ends_where_the_ode_ends(schedule):
    check_sketch(partial(from_sketch, sampler=ddim), schedule, t=int(0.6 * schedule.T))

@pytest.mark.parametrize("wrong", [dict(noised=lambda t, T: t // 2), dict(start=lambda t, T: T), dict(noised=lambda t, T: 0), dict(scale=lambda x, ab: x / ab.sqrt())],
                         ids=["too little noise", "walked from T", "no noise", "signal not scaled"])
def test_wrong_sketches_are_noticed(wrong):
    check_sketch(wrong_sketch())
    with pytest.raises(AssertionError): check_sketch(wrong_sketch(**wrong))

@pytest.mark.parametrize("sampler", [ddpm, ddim, heun, dpmpp_2m, partial(dpmpp_2m, eta=1.0)], ids=["ddpm", "ddim", "heun", "2m", "2m, eta 1"])
def test_a_sketch_is_kept_from_low_and_forgotten_from_high(sampler):
    images = random_images(8, (3, 4, 4))
    predict, crude = ideal_predictor(images, S), (images + 0.2 * torch.randn(images.shape, generator=seeded(1))).clamp(-1, 1)
    low = from_sketch(predict, crude, S, 20, sampler=sampler)
    assert_close(low, images, rtol=0, atol=1e-2)
    high = from_sketch(predict, crude[:1].repeat(200, 1, 1, 1), S, S.T, sampler=sampler, steps=20)
    assert (torch.cdist(high.flatten(1), images.flatten(1)).argmin(1) == 0).float().mean() < 0.3 # one in eight by chance

def test_a_sketch_depends_on_itself_and_its_own_noise():
    predict, x = predictor(random_unet(), S), random_images(4, (3, 4, 4))
    all_four, first = (from_sketch(predict, x[:n], S, 50, steps=5, seed=3) for n in (4, 1))
    assert_close(all_four[:1], first, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, from_sketch(predict, x[:1], S, 50, steps=5, seed=4), atol=1e-2)

@pytest.mark.parametrize("change, word", [(dict(sketch=random_images(1) * 100), "255"), (dict(sketch=random_images(1) * math.nan), "nan"), (dict(t=0), "t=0"), (dict(t=101), "T=100"),
                                          (dict(t=2.0), "t=2.0"), (dict(steps=51), "T=50"), (dict(steps=0), "steps"), (dict(sketch=torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), "127.5")])
def test_bad_sketches(change, word):
    given = dict(sketch=random_images(1), t=50, steps=None) | change
    with pytest.raises((ValueError, TypeError), match=word): from_sketch(ideal_predictor(random_images(2), S), schedule=S, **given)


# --- inpainting -------------------------------------------------------------------------------------------------------

RHO, KNOWN = 0.8, 0.5
C = STD**2 * torch.tensor([[1, RHO], [RHO, 1]], dtype=torch.float64)

def two_pixels(schedule):
    "The best prediction for two correlated Gaussian pixels around MU, x of shape (n, 2)."
    def predict(xt, t):
        ab = float(schedule.alpha_bar[t])
        gain = ab**0.5 * C @ torch.linalg.inv(ab * C + (1 - ab) * torch.eye(2).double())
        return prediction_from_x0(MU + (xt - ab**0.5 * MU) @ gain.T, xt, t, schedule)
    return predict

def check_inpaint(sampler, n=4000):
    "What is known stays; on the way it has the noise of its time; and with many rounds the rest comes near to the posterior."
    g = normal(1)
    known, mask = torch.tensor([[KNOWN, 0.0]]).double(), torch.tensor([1, 0])
    steps = list(sampler(two_pixels(S), g(torch.empty(n, 2, dtype=torch.float64)), S, S.timesteps(50), known=known, mask=mask, resample=10, noise=g))
    for step in steps[:-1]:
        ab, first = float(S.alpha_bar[step.s]), step.xs[:, 0]
        close(first.mean().item(), ab**0.5 * KNOWN, f"mean of what is held at {step.s}", rtol=0, atol=5 * ((1 - ab) / n) ** 0.5)
        close(first.var().item(), 1 - ab, f"variance of what is held at {step.s}", rtol=5 * (2 / n) ** 0.5, atol=0)
        ab, first = float(S.alpha_bar[step.t]), step.xt[:, 0]
        close(first.var().item(), 1 - ab if step.i else 1.0, f"variance of what is held, back at {step.t}", rtol=5 * (2 / n) ** 0.5, atol=0)
    end, second = steps[-1].xs, steps[-1].xs[:, 1]
    assert (end[:, 0] == KNOWN).all(), "what is known is changed"
    close(second.mean().item(), MU + RHO * (KNOWN - MU), "mean of the posterior", rtol=0, atol=0.04)
    close(second.var().item(), STD**2 * (1 - RHO**2), "variance of the posterior", rtol=0.35, atol=0)

def wrong_inpaint(level=lambda t, s: s, up=forward, keep=lambda m: m, rounds=lambda r: r, end=lambda x, known, m: x):
    def sampler(predict, xT, schedule, ts, *, known, mask, resample, noise):
        from diffusion_course.sampling import Step, posterior
        known, m, xt = known.expand_as(xT), keep(mask).bool(), xT
        for i, (t, s) in enumerate(pairwise(ts)):
            for again in range(rounds(resample) if s else 1):
                if again: xt = up(xs, s, t, noise(xt), schedule)
                pred = predict(xt, t)
                mean, var = posterior(pred.x0, xt, t, s, schedule)
                z = noise(xt) if s else torch.zeros_like(xt)
                xs = torch.where(m, add_noise(known, level(t, s), z, schedule), mean + var.sqrt() * z)
            yield Step(i, t, s, xt, end(xs, known, m) if s == 0 else xs, pred)
            xt = xs

    return sampler

def test_inpainting_comes_near_to_the_posterior():
    check_inpaint(inpaint)
    check_inpaint(wrong_inpaint())

@pytest.mark.parametrize("wrong", [dict(level=lambda t, s: t if s else 0), dict(level=lambda t, s: 0), dict(keep=lambda m: 1 - m), dict(rounds=lambda r: 1),
                                   dict(up=lambda xs, s, t, z, schedule: xs + (1 - schedule.alpha_bar[t] / schedule.alpha_bar[s]).sqrt().item() * z),
                                   dict(up=lambda xs, s, t, z, schedule: schedule.alpha_bar[t].sqrt().item() * xs + (1 - schedule.alpha_bar[t]).sqrt().item() * z),
                                   dict(up=lambda xs, s, t, z, schedule: xs)],
                         ids=["level of t", "no noise", "mask turned round", "no rounds", "up without scaling", "up as from time 0", "no way up"])
def test_wrong_inpainting_is_noticed(wrong):
    with pytest.raises(AssertionError): check_inpaint(wrong_inpaint(**wrong))

@schedules
def test_one_round_by_hand(schedule):
    "Against the kernel of DDPM by conditioning a joint Gaussian, with the noise written out."
    images, ts = random_images(3, (1, 4, 4)), schedule.timesteps(5)
    predict, xT = ideal_predictor(images, schedule), initial_noise(3, (1, 4, 4))
    x, noise, ab = xT, per_sample_noise(2, 3), schedule.alpha_bar.tolist()
    for t, s in pairwise(ts):
        a, b, var = oracles.ddpm_kernel(ab[t], ab[s])
        z = noise(x) if s else torch.zeros_like(x)
        drawn = a * predict(x, t).x0 + b * x + max(var, 0) ** 0.5 * z
        x = HALF * (ab[s] ** 0.5 * images + (1 - ab[s]) ** 0.5 * z) + (1 - HALF) * drawn
    assert_close(last(inpaint(predict, xT, schedule, ts, known=images, mask=HALF, noise=per_sample_noise(2, 3))), x, rtol=1e-4, atol=1e-4)

def test_the_known_half_decides():
    "Three pictures, two of which have the left half in common: only these may come, in about their shares in the data."
    a, other, c = random_images(3, (3, 4, 4))
    b = HALF * a + (1 - HALF) * other
    predict = ideal_predictor(torch.stack([a, a, a, b, c]), S)
    x = sample(predict, S, 300, sampler=partial(inpaint, known=a[None], mask=HALF, resample=4), steps=20, shape=(3, 4, 4))
    far = torch.cdist(x.flatten(1), torch.stack([a, b, c]).flatten(1))
    assert far.amin(1).max() < 0.05 and (far.argmin(1) < 2).all()
    assert abs((far.argmin(1) == 0).float().mean() - 0.75) < 0.12

def test_steps_and_calls():
    calls = []
    inner = ideal_predictor(random_images(2, (3, 4, 4)), S)
    def predict(xt, t): calls.append(t); return inner(xt, t)
    ts = [100, 60, 20, 0]
    steps = list(inpaint(predict, initial_noise(2, (3, 4, 4)), S, ts, known=random_images(1, (3, 4, 4)), mask=HALF, resample=3, noise=normal()))
    assert [(step.t, step.s) for step in steps] == list(pairwise(ts)) and calls == [100] * 3 + [60] * 3 + [20]
    for step in steps: oracles.check_pair(step.pred, step.xt, step.t, S)

@pytest.mark.parametrize("kind", ["eps", "x0", "v", "u"])
def test_inpainting_with_any_network_size_and_batch(kind):
    net, known = random_unet(predicts=kind), random_images(1, (3, 8, 12)) / 2
    mask = torch.rand(1, 1, 8, 12, generator=seeded()) < 0.5
    predict = clipped(predictor(net, S, torch.eye(5)), S)
    walk = partial(inpaint, known=known, mask=mask, resample=2)
    whole, parts = (sample(predict, S, 5, sampler=walk, steps=3, shape=(3, 8, 12), batch_size=size) for size in (5, 2))
    assert_close(whole, parts, rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.where(mask, whole, 0), torch.where(mask, known, 0).expand_as(whole)) and not whole.requires_grad

@pytest.mark.parametrize("change, word", [(dict(mask=torch.ones(4, 4)), "every pixel"), (dict(mask=torch.zeros(4, 4)), "no pixel"), (dict(mask=HALF / 2), "0 and 1"), (dict(mask=HALF[:3]), "mask has shape"),
                                          (dict(mask=HALF.expand(2, 3, 3, 4, 4)), "mask has shape"), (dict(known=random_images(2, (3, 4, 4))), "known has shape"), (dict(known=random_images(1, (1, 4, 4))), "known has shape"),
                                          (dict(known=random_images(1, (3, 4, 4)) * 9), "known goes from"), (dict(known=None), "expected a tensor"), (dict(mask=[[1, 0]]), "expected a tensor"),
                                          (dict(resample=0), "resample=0"), (dict(resample=1.5), "resample"), (dict(ts=[50, 60, 0]), "fall")])
def test_bad_inpainting(change, word):
    given = dict(known=random_images(1, (3, 4, 4)), mask=HALF, resample=1, ts=[100, 50, 0]) | change
    with pytest.raises((ValueError, TypeError), match=word): last(inpaint(ideal_predictor(random_images(2, (3, 4, 4)), S), initial_noise(3, (3, 4, 4)), S, **given))

def test_what_is_not_kept_may_be_anything():
    known = torch.where(HALF.bool(), random_images(1, (3, 4, 4)), torch.tensor(math.nan))
    x = last(inpaint(ideal_predictor(random_images(2, (3, 4, 4)), S), initial_noise(1, (3, 4, 4)), S, [100, 50, 0], known=known, mask=HALF, noise=normal()))
    assert x.isfinite().all()

def test_forward_composes():
    "Up from 0 to s and from s to t has the mean and the variance of the way from 0 to t."
    x, (z1, z2) = torch.tensor([0.7]), torch.eye(2)
    def both(a, b, x=x): return forward(forward(x, 0, 30, a, S), 30, 70, b, S)
    zero = torch.zeros(1)
    assert_close(both(zero, zero).double(), S.alpha_bar[70].sqrt() * 0.7 * torch.ones(1).double(), rtol=1e-5, atol=1e-6)
    parts = both(z1, z2, torch.zeros(2))
    assert_close(parts.square().sum().double(), 1 - S.alpha_bar[70], rtol=1e-5, atol=1e-6)


# --- the noises of a walk ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ts", [S.timesteps(20), [60, 40, 20, 5, 0], list(range(100, -1, -1)), [50, 0]], ids=len)
def test_ddpm_comes_back_with_its_noises(ts):
    images = random_images(4, (3, 4, 4)).double()
    predict, other = oracles.smooth_predictor(S, 48), oracles.smooth_predictor(S, 48, seed=1)
    xT, zs = ddpm_invert(predict, images, S, ts, noise=normal(3))
    draw = normal(3)
    states = [add_noise(images, t, draw(images), S) for t in ts[:-1]]
    assert torch.equal(xT, states[0]) and zs.shape == (len(ts) - 2, *images.shape)
    steps = list(ddpm(predict, xT, S, ts, noise=replayed(zs)))
    for step, xt in zip(steps, states): assert_close(step.xt, xt, rtol=1e-6, atol=1e-6)
    assert_close(steps[-1].xs, predict(states[-1], ts[-2]).x0, rtol=1e-6, atol=1e-6)
    if len(zs): assert not torch.allclose(last(ddpm(other, xT, S, ts, noise=replayed(zs))), steps[-1].xs, atol=1e-2)

def test_each_state_has_a_noise_of_its_own():
    "Otherwise the z of the steps would hold no trace of the picture; this is what makes them fit for edits."
    x0 = torch.zeros(2000, 1).double()
    seen_states = []
    def predict(xt, t): seen_states.append(xt); return prediction_from_x0(torch.zeros_like(xt), xt, t, S)
    ddpm_invert(predict, x0, S, [90, 60, 30, 0], noise=normal())
    assert abs(torch.corrcoef(torch.cat(seen_states, 1).T)[0, 1]) < 0.1


# --- measurements -----------------------------------------------------------------------------------------------------

MEASURES = {"grey": (grey(), (3, 4, 4)), "smaller": (smaller(), (3, 4, 4)), "smaller by 4": (smaller(4), (1, 8, 4)), "seen": (seen(HALF), (2, 4, 4)), "grey of 2": (grey(2), (2, 4, 4))}
measures = pytest.mark.parametrize("name", MEASURES)

def matrix(A, shape):
    eye = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return A.of(eye).flatten(1).T # (m, d)

@measures
def test_back_is_the_pseudoinverse_and_gain_is_true(name):
    A, shape = MEASURES[name]
    M, eye = matrix(A, shape), torch.eye(math.prod(A.of(torch.zeros(1, *shape)).shape)).double()
    B = A.back(eye.view(-1, *A.of(torch.zeros(1, *shape)).shape[1:])).flatten(1).T
    assert_close(B, torch.linalg.pinv(M), rtol=1e-6, atol=1e-8)
    used = M.square().sum(1) > 0
    assert_close((M @ M.T)[used][:, used], A.gain * torch.eye(int(used.sum())).double())

def check_ddnm(project, name):
    "The nearest picture to the prediction that has this measurement, by least squares with a constraint."
    A, shape = MEASURES[name]
    predict, xt = oracles.smooth_predictor(S, math.prod(shape)), torch.randn(3, *shape, generator=seeded(), dtype=torch.float64)
    y, M = A.of(torch.rand(3, *shape, generator=seeded(1), dtype=torch.float64)), matrix(A, shape)
    for t in (1, 40, 100):
        x0 = predict(xt, t).x0
        want = x0.flatten(1) + torch.linalg.lstsq(M, (y - A.of(x0)).flatten(1).T, driver="gelsd").solution.T
        pred = project(predict, A, y, S)(xt, t)
        close(pred.x0.flatten(1), want, "the projection", rtol=1e-6, atol=1e-8)
        oracles.check_pair(pred, xt, t, S)

@measures
def test_ddnm_is_a_projection(name): check_ddnm(ddnm, name)

def other_ddnm(change):
    def project(predict, A, y, schedule):
        return lambda xt, t: change(predict(xt, t), A, y, xt, t)
    return project
WRONG_DDNM = {"half way": lambda p, A, y, xt, t: prediction_from_x0(p.x0 + A.back(y - A.of(p.x0)) / 2, xt, t, S), "eps of before": lambda p, A, y, xt, t: Prediction(p.x0 + A.back(y - A.of(p.x0)), p.eps),
              "back(y) alone": lambda p, A, y, xt, t: prediction_from_x0(A.back(y), xt, t, S), "sign": lambda p, A, y, xt, t: prediction_from_x0(p.x0 - A.back(y - A.of(p.x0)), xt, t, S),
              "transposed in place of the pseudoinverse": lambda p, A, y, xt, t: prediction_from_x0(p.x0 + A.gain * A.back(y - A.of(p.x0)), xt, t, S)}

@pytest.mark.parametrize("wrong", WRONG_DDNM)
def test_wrong_projections_are_noticed(wrong):
    with pytest.raises(AssertionError): check_ddnm(other_ddnm(WRONG_DDNM[wrong]), "smaller")

@pytest.mark.parametrize("sampler", [ddpm, ddim, heun, dpmpp_2m], ids=["ddpm", "ddim", "heun", "2m"])
@schedules
def test_what_ddnm_draws_agrees_with_its_measurement(sampler, schedule):
    images = random_images(8, (3, 4, 4))
    y = smaller().of(images)
    x = sample(ddnm(ideal_predictor(images, schedule), smaller(), y, schedule), schedule, 8, sampler=sampler, steps=20, shape=(3, 4, 4))
    assert_close(smaller().of(x), y, rtol=0, atol=1e-3)

def test_the_gradient_finds_the_picture_and_the_projection_does_not():
    "One measurement, one picture that fits: DDNM leaves what it does not see to the predictor, which decides too early."
    images = random_images(8, (3, 4, 4))
    y, ideal = smaller().of(images), ideal_predictor(images, S)
    def off(predict): return (sample(predict, S, 8, steps=100, shape=(3, 4, 4)) - images).flatten(1).norm(dim=1)
    assert (off(dps(ideal, smaller(), y, S, 0.1, 1 / 3)) < 0.1).float().mean() > 0.7
    assert (off(ddnm(ideal, smaller(), y, S)) < 0.1).float().mean() < 0.7

def test_a_wrong_measurement_is_refused():
    predict = ideal_predictor(random_images(2, (3, 4, 4)), S)
    with pytest.raises(ValueError, match="pseudoinverse"): ddnm(predict, seen(HALF), random_images(1, (3, 4, 4)), S)
    with pytest.raises(ValueError, match="pseudoinverse"): ddnm(predict, Measure(lambda x: x[:, :1], lambda y: y.expand(-1, 3, -1, -1) / 2), torch.ones(1, 1, 4, 4), S)
    with pytest.raises(ValueError, match="y has shape"): ddnm(predict, grey(), torch.zeros(2, 1, 4, 4), S)(torch.zeros(3, 3, 4, 4), 5)
    with pytest.raises(ValueError, match="y has shape"): dps(predict, grey(), torch.zeros(1, 1, 2, 2), S, 0.1)(torch.zeros(3, 3, 4, 4), 5)
    for bad in (dict(std=0), dict(std=-1), dict(std=math.nan), dict(std=0.1, spread=-1)):
        with pytest.raises(ValueError, match="expected"): dps(predict, grey(), torch.zeros(1, 1, 4, 4), S, **bad)
    with pytest.raises(ValueError, match="k=0"): smaller(0)


# --- along a gradient -------------------------------------------------------------------------------------------------

def posterior_mean(name, xt, t, y, std, schedule, v=STD**2):
    "E[x0 | x_t, y] for independent Gaussian pixels, by conditioning the joint Gaussian of (x0; x_t, y) at once."
    A, shape = MEASURES[name]
    M, ab = matrix(A, shape), float(schedule.alpha_bar[t])
    M = M[(M.square().sum(1) > 0)]
    rows = matrix(A, shape).square().sum(1) > 0
    d = math.prod(shape)
    H = torch.cat([ab**0.5 * torch.eye(d).double(), M])
    cov = v * H @ H.T + torch.diag(torch.cat([torch.full((d,), 1 - ab), torch.full((len(M),), std**2)]).double())
    seen_now = torch.cat([xt.flatten(1), y.flatten(1)[:, rows]], 1) - MU * H.sum(1)
    return MU + seen_now @ torch.linalg.solve(cov, v * H)

def check_dps(guide, name, schedule=S, std=0.2):
    shape = MEASURES[name][1]
    xt, A = torch.randn(3, *shape, generator=seeded(), dtype=torch.float64), MEASURES[name][0]
    y = A.of(torch.rand(3, *shape, generator=seeded(1), dtype=torch.float64))
    predict = guide(oracles.gaussian_predictor(MU, STD, schedule), A, y, schedule, std, STD**2)
    for t in (1, schedule.T // 2, schedule.T - 1):
        pred = predict(xt, t)
        close(pred.x0.flatten(1), posterior_mean(name, xt, t, y, std, schedule), f"E[x0 | x_t, y] at {t}", rtol=1e-5, atol=1e-6)
        oracles.check_pair(pred, xt, t, schedule)

@measures
@schedules
def test_dps_with_the_spread_is_exact_for_gaussian_pixels(name, schedule): check_dps(dps, name, schedule)

def without_the_network(predict, A, y, schedule, std, spread):
    def answer(xt, t):
        pred, ab = predict(xt, t), float(schedule.alpha_bar[t])
        up = A.gain * A.back(y - A.of(pred.x0)) / (std**2 + A.gain * spread * (1 - ab) / (spread * ab + 1 - ab))
        return prediction_from_x0(pred.x0 + (1 - ab) / ab**0.5 * up, xt, t, schedule)
    return answer
WRONG_DPS = {"no spread": lambda *args: dps(*args[:-1]), "without the network": without_the_network,
             "mismatch of x_t": lambda p, A, y, s, std, v: dps(lambda xt, t: Prediction(xt, p(xt, t).eps), A, y, s, std, v),
             "gain forgotten": lambda p, A, y, s, std, v: dps(p, A._replace(gain=1.0), y, s, std, v), "std in place of variance": lambda p, A, y, s, std, v: dps(p, A, y, s, std, v**0.5)}

@pytest.mark.parametrize("wrong", WRONG_DPS)
def test_wrong_gradients_are_noticed(wrong):
    with pytest.raises(AssertionError): check_dps(WRONG_DPS[wrong], "smaller")

def check_second_pixel(guide, schedule=S, std=0.3):
    "Of two correlated Gaussian pixels the first is measured: E[x0 | x_t, y] of both, by conditioning the joint Gaussian of (x0; x_t, y)."
    xt, y = torch.randn(5, 2, generator=seeded(), dtype=torch.float64), torch.tensor([[0.9, 0.0]], dtype=torch.float64)
    for t in (1, schedule.T // 2, schedule.T - 1):
        ab, eye = float(schedule.alpha_bar[t]), torch.eye(2, dtype=torch.float64)
        doubt = torch.linalg.inv(torch.linalg.inv(C) + ab / (1 - ab) * eye) # of x0, given x_t
        H = torch.cat([ab**0.5 * eye, eye[:1]])
        cov = H @ C @ H.T + torch.diag(torch.tensor([1 - ab, 1 - ab, std**2], dtype=torch.float64))
        known = torch.cat([xt, y[:, :1].expand(5, 1)], 1) - MU * H.sum(1)
        pred = guide(two_pixels(schedule), seen(torch.tensor([1.0, 0.0])), y, schedule, 1 / (std**2 + doubt[0, 0].item()))(xt, t)
        close(pred.x0, MU + known @ torch.linalg.solve(cov, H @ C), f"both pixels at {t}", rtol=1e-6, atol=1e-8)
        oracles.check_pair(pred, xt, t, schedule)

def by_the_gradient(predict, A, y, schedule, scale):
    return steered(predict, lambda x0: -(A.of(x0) - y).square().flatten(1).sum(1) / 2, schedule, scale)

def by_the_shortcut(predict, A, y, schedule, scale):
    "The gradient with respect to x0, used as if it were the one with respect to x_t."
    def answer(xt, t):
        x0, ab = predict(xt, t).x0, float(schedule.alpha_bar[t])
        return prediction_from_x0(x0 + (1 - ab) / ab**0.5 * scale * A.back(y - A.of(x0)), xt, t, schedule)
    return answer

@schedules
def test_a_measured_pixel_moves_the_one_that_is_not_seen(schedule): check_second_pixel(by_the_gradient, schedule)

@pytest.mark.parametrize("wrong", [by_the_shortcut, lambda p, A, y, s, scale: by_the_gradient(p, A, y, s, 2 * scale), lambda p, A, y, s, scale: p], ids=["shortcut", "without the half", "not steered"])
def test_a_second_pixel_that_stays_is_noticed(wrong):
    with pytest.raises(AssertionError): check_second_pixel(wrong)

def test_samples_have_the_posterior_and_dps_its_bias():
    n, std, v = 8000, 0.3, STD**2
    schedule, y, as_it_is = Schedule.cosine(300), torch.tensor([[0.8]]).double(), Measure(lambda x: x, lambda y: y)
    weight, g = v / (v + std**2), normal(5)
    mean, var = MU + weight * (0.8 - MU), v * (1 - weight)
    def moments(spread):
        x = last(ddpm(dps(oracles.gaussian_predictor(MU, STD, schedule), as_it_is, y, schedule, std, spread), g(torch.empty(n, 1).double()), schedule, noise=g))
        return x.mean().item(), x.var().item()
    right, biased = moments(v), moments(0.0)
    assert abs(right[0] - mean) < 5 * (var / n) ** 0.5 + 0.005 and abs(right[1] / var - 1) < 0.1
    assert biased[0] > mean + 0.03 and biased[1] < 0.85 * var # too near to y, too sure

def test_a_linear_wish_tilts_a_gaussian():
    "exp(a x0) moves the mean of N(m, c) by a c, whatever x_t is."
    predict, a = oracles.gaussian_predictor(MU, STD, S), 0.7
    xt = torch.randn(4, 1, 2, 2, generator=seeded(), dtype=torch.float64)
    for t in (1, 50, 99):
        ab = float(S.alpha_bar[t])
        c = STD**2 * (1 - ab) / (STD**2 * ab + 1 - ab)
        for scale in (2.0, lambda t: 2.0):
            pred = steered(predict, lambda x0: a * x0.flatten(1).sum(1), S, scale)(xt, t)
            assert_close(pred.x0, predict(xt, t).x0 + 2 * a * c, rtol=1e-6, atol=1e-8)
            oracles.check_pair(pred, xt, t, S)

def test_a_wish_keeps_to_its_sample_and_leaves_no_trace():
    net = random_unet().requires_grad_(True)
    predict = steered(predictor(net, S), lambda x0: -x0.square().flatten(1).sum(1), S, 0.3)
    x = initial_noise(3, (3, 4, 4))
    with torch.no_grad(): all_three, first = predict(x, 40), predict(x[:1], 40)
    assert_close(all_three.x0[:1], first.x0, rtol=1e-4, atol=1e-5)
    assert not all_three.x0.requires_grad and not x.requires_grad and all(p.grad is None for p in net.parameters())
    assert predict.net is net and not hasattr(predict, "part")

def test_where_no_signal_is_left_the_prediction_stays():
    images = random_images(2, (3, 4, 4))
    plain = ideal_predictor(images, F)
    def smooth(xt, t): return prediction_from_x0(torch.tanh(xt), xt, t, F)
    x = initial_noise(2, (3, 4, 4))
    assert_close(steered(smooth, lambda x0: x0.flatten(1).sum(1), F, 5.0)(x, F.T), smooth(x, F.T))
    assert plain(x, F.T).x0.isfinite().all()

@pytest.mark.parametrize("wish, word", [(lambda x0: x0.sum(), "one number for each"), (lambda x0: x0.flatten(1), "one number for each"), (lambda x0: 3.0, "one number for each"),
                                        (lambda x0: x0.detach().flatten(1).sum(1), "depend on x0"), (lambda x0: (x0 > 0).float().flatten(1).sum(1), "depend on x0")])
def test_bad_wishes(wish, word):
    with pytest.raises(ValueError, match=word): steered(predictor(random_unet(), S), wish, S)(initial_noise(2, (3, 4, 4)), 40)


# --- two at once ------------------------------------------------------------------------------------------------------

def test_views_and_windows_work_in_batches():
    net, context = random_unet(), torch.eye(5)[torch.arange(7) % 5]
    predict = predictor(net, S, context)
    def flip(x): return x.flip(-1)
    both = clipped(averaged(predict, viewed(predict, flip, flip), windowed(predict, size=4, stride=2)), S)
    assert both.net is net
    whole, parts = (sample(both, S, 7, sampler=ddim, steps=3, shape=(3, 8, 8), batch_size=size) for size in (7, 3))
    assert_close(whole, parts, rtol=1e-3, atol=1e-3)

def test_a_symmetric_mean_draws_symmetric_pictures():
    predict = predictor(random_unet(), S)
    def flip(x): return x.flip(-1)
    both = averaged(predict, viewed(predict, flip, flip))
    xt = initial_noise(2, (3, 4, 4))
    assert_close(both(flip(xt), 30).x0, flip(both(xt, 30).x0), rtol=1e-4, atol=1e-5)
    oracles.check_pair(both(xt, 30), xt, 30, S)


# --- the checkers ------------------------------------------------------------------------------------------------------

def ddim_fill(predict, xT, schedule, n, known, mask, x0_of=lambda x0, known, mask: torch.where(mask > 0, known, x0)):
    x, ab = xT, schedule.alpha_bar.tolist()
    for t, s in pairwise(schedule.timesteps(n)):
        x0 = x0_of(predict(x, t).x0, known, mask)
        x = ab[s] ** 0.5 * x0 + ((1 - ab[s]) / (1 - ab[t])) ** 0.5 * (x - ab[t] ** 0.5 * x0)
    return x

RIGHT = {"hold": [lambda xs, known, m, z, ab: torch.where(m > 0, ab.sqrt() * known + (1 - ab).sqrt() * z, xs), lambda xs, known, m, z, ab: xs + m * (ab.sqrt() * known + (1 - ab).sqrt() * z - xs)],
         "back_up": [lambda xs, z, s, t: (t / s) ** 0.5 * xs + (1 - t / s) ** 0.5 * z, lambda xs, z, s, t: (t.sqrt() * xs + (s - t).sqrt() * z) / s.sqrt()],
         "recolour": [lambda x0, y: x0 + (y - x0.mean(1, keepdim=True)), lambda x0, y: y.expand_as(x0) + (x0 - x0.mean(1, keepdim=True))],
         "steer": [lambda x0, eps, up, ab, k: (x0 + k * (1 - ab) / ab.sqrt() * up, eps - k * (1 - ab).sqrt() * up),
                   lambda x0, eps, up, ab, k: ((ab.sqrt() * x0 + (1 - ab).sqrt() * eps - (1 - ab).sqrt() * (eps - k * (1 - ab).sqrt() * up)) / ab.sqrt(), eps - k * (1 - ab).sqrt() * up)],
         "fill": [ddim_fill, lambda *args: ddim_fill(*args, x0_of=lambda x0, known, m: m * known + (1 - m) * x0)]}
WRONG = {"hold": {"wrong way round": lambda xs, known, m, z, ab: torch.where(m > 0, xs, ab.sqrt() * known + (1 - ab).sqrt() * z), "known pixels are clean": lambda xs, known, m, z, ab: torch.where(m > 0, known, xs),
                  "roots": lambda xs, known, m, z, ab: torch.where(m > 0, ab * known + (1 - ab) * z, xs)},
         "back_up": {"no clean picture": lambda xs, z, s, t: t.sqrt() * xs + (1 - t).sqrt() * z, "roots": lambda xs, z, s, t: t / s * xs + (1 - t / s) * z, "noise is missing": lambda xs, z, s, t: (t / s).sqrt() * xs,
                     "variance grows": lambda xs, z, s, t: xs + (1 - t / s).sqrt() * z},
         "recolour": {"grey picture": lambda x0, y: y.expand_as(x0), "sign": lambda x0, y: x0 - y + x0.mean(1, keepdim=True), "scaled": lambda x0, y: x0 * y / x0.mean(1, keepdim=True), "third of the way": lambda x0, y: x0 + (y - x0.mean(1, keepdim=True)) / 3},
         "steer": {"down the gradient": lambda x0, eps, up, ab, k: (x0 - k * (1 - ab) / ab.sqrt() * up, eps + k * (1 - ab).sqrt() * up), "x0 did not move": lambda x0, eps, up, ab, k: (x0, eps - k * (1 - ab).sqrt() * up),
                   "eps did not move": lambda x0, eps, up, ab, k: (x0 + k * (1 - ab) / ab.sqrt() * up, eps)},
         "fill": {"wrong way round": lambda *args: ddim_fill(*args, x0_of=lambda x0, known, m: torch.where(m > 0, x0, known)), "plain DDIM": lambda *args: ddim_fill(*args, x0_of=lambda x0, known, m: x0),
                  "everywhere": lambda *args: ddim_fill(*args, x0_of=lambda x0, known, m: known.expand_as(x0))}}

@pytest.mark.parametrize("name, i", [(name, i) for name in RIGHT for i in range(2)])
def test_right_answers(name, i):
    for _ in range(10):
        result = getattr(check_edit, name)(RIGHT[name][i])
        assert result, result

@pytest.mark.parametrize("name, word", [(name, word) for name in WRONG for word in WRONG[name]])
def test_wrong_answers_are_named(name, word):
    for _ in range(10):
        result = getattr(check_edit, name)(WRONG[name][word])
        assert not result and word in result.message, result

@pytest.mark.parametrize("name", RIGHT)
def test_the_lesson_holds_stub_and_solution(name):
    cells = ["".join(c["source"]) for c in json.loads((ROOT / "nbs/L7_Editing.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert any(cell.rstrip().endswith(f"check.{name}(my_{name})") for cell in cells)
    assert any(f"assert check.{name}(solved_{name})" in cell for cell in cells)

@pytest.mark.parametrize("name", RIGHT)
def test_unsolved(name):
    result = getattr(check_edit, name)(lambda *args: None)
    assert not result and "nothing came back" in result.message
