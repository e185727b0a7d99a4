"The fast samplers against four independent oracles (tests/oracles.py), for every number of steps; wrong versions at the end."
import math
from functools import partial
from itertools import pairwise

import oracles
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from oracles import labs, random_images, smooth_predictor
from torch.testing import assert_close

from diffusion_course.context import guided
from diffusion_course.fast_sampling import blended, ddim, ddim_sigma, dpmpp_2m, heun, invert, renoised
from diffusion_course.sampling import (PREDICTIONS, Prediction, Schedule, Step, clipped, ddpm, ideal_predictor, initial_noise, per_sample_noise,
                                       prediction_from_x0, predictor, sample, visited)

NS = (1, 2, 3, 7, 10, 13, 30, 33, 50, 60, 100, 499, 500)
LINEAR, COSINE = Schedule.linear(500), Schedule.cosine(500)
SCHEDULES = pytest.mark.parametrize("schedule", [LINEAR, COSINE, labs()], ids=["linear", "cosine", "labs"])
SAMPLERS = {"ddim": ddim, "ddim eta 0.5": partial(ddim, eta=0.5), "ddim eta 1": partial(ddim, eta=1.0), "heun": heun, "dpmpp_2m": dpmpp_2m, "dpmpp_2m eta 1": partial(dpmpp_2m, eta=1.0)}
EVERY = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
DETERMINISTIC = pytest.mark.parametrize("sampler", [ddim, heun, dpmpp_2m])


def last(sampler, *args, **kwargs):
    *_, step = sampler(*args, **kwargs)
    return step.xs


# --- 1. analytic ---

@pytest.mark.parametrize("n", NS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_ddim_gaussian_exact(schedule, eta, n):
    oracles.check_gaussian_exact(partial(ddim, eta=eta), schedule, schedule.timesteps(n), kernel=oracles.ddim_kernel(eta))

@pytest.mark.parametrize("ts", [[500, 3, 1, 0], [40, 39, 7, 0], [1, 0], LINEAR.timesteps(20, "quadratic")], ids=str)
def test_ddim_gaussian_exact_on_odd_grids(ts): oracles.check_gaussian_exact(ddim, LINEAR, ts, kernel=oracles.ddim_kernel(0))

@pytest.mark.parametrize("sampler, order", [(ddim, 1), (heun, 2), (dpmpp_2m, 2)], ids=["ddim", "heun", "dpmpp_2m"])
def test_order_of_the_error(sampler, order): oracles.check_error_order(sampler, order)

@pytest.mark.parametrize("sampler, order", [(ddpm, 1), (partial(ddim, eta=0.5), 1), (partial(dpmpp_2m, eta=0.5), 2), (partial(dpmpp_2m, eta=1.0), 2)],
                         ids=["ddpm", "ddim eta 0.5", "dpmpp_2m eta 0.5", "dpmpp_2m eta 1"])
def test_order_of_the_distribution(sampler, order): oracles.check_spread_order(sampler, order)


# --- 2. ideal denoiser ---

@EVERY
def test_lands_on_each_image_as_often_as_it_should(sampler): oracles.check_shares(sampler, COSINE, COSINE.timesteps(200))

@EVERY
@pytest.mark.parametrize("n", NS)
def test_lands(sampler, n): oracles.check_lands(sampler, LINEAR, LINEAR.timesteps(n), n=4)

@EVERY
@pytest.mark.parametrize("n", [1, 7, 30, 33])
@pytest.mark.parametrize("schedule", [COSINE, labs()], ids=["cosine", "labs"])
def test_lands_on_other_schedules(sampler, schedule, n): oracles.check_lands(sampler, schedule, schedule.timesteps(n), n=4)


# --- 3. diffusers ---

@pytest.mark.parametrize("prediction_type, tolerance", [("sample", 1e-4), ("epsilon", 1e-3)]) # its float32 tables blur eps near t = 0
@pytest.mark.parametrize("n", NS)
def test_ddim_is_diffusers(n, prediction_type, tolerance):
    scheduler = oracles.diffusers_scheduler(DDIMScheduler, timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True, prediction_type=prediction_type)
    xT = initial_noise(2, (3, 4, 4)).double()
    oracles.check_against_diffusers(ddim, scheduler, n, smooth_predictor(labs(), 48), xT, labs(), tolerance=tolerance)

@pytest.mark.parametrize("n", [2, 10, 50, 100])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_is_diffusers(n, eta):
    scheduler = oracles.diffusers_scheduler(DDIMScheduler, timestep_spacing="leading", steps_offset=0, set_alpha_to_one=True)
    xT = initial_noise(2, (3, 4, 4)).double()
    oracles.check_against_diffusers(partial(ddim, eta=eta), scheduler, n, smooth_predictor(labs(), 48), xT, labs(), tolerance=2e-4, eta=eta)

@pytest.mark.parametrize("n", [n for n in NS if 3 <= n < 499]) # with 499 and 500 its rounded grid repeats a time
def test_dpmpp_2m_is_diffusers(n):
    scheduler = oracles.diffusers_scheduler(DPMSolverMultistepScheduler, solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint",
                                            final_sigmas_type="zero", lower_order_final=False)
    xT = initial_noise(2, (3, 4, 4)).double()
    oracles.check_against_diffusers(dpmpp_2m, scheduler, n, smooth_predictor(labs(), 48), xT, labs(), tolerance=2e-4)

@pytest.mark.parametrize("n", [n for n in NS if 3 <= n < 499])
def test_noisy_dpmpp_2m_is_diffusers(n):
    scheduler = oracles.diffusers_scheduler(DPMSolverMultistepScheduler, solver_order=2, algorithm_type="sde-dpmsolver++", solver_type="midpoint",
                                            final_sigmas_type="zero", lower_order_final=False)
    xT = initial_noise(2, (3, 4, 4)) # it draws its noise in float32
    oracles.check_against_diffusers(partial(dpmpp_2m, eta=1.0), scheduler, n, smooth_predictor(labs(), 48), xT, labs(), tolerance=1e-3)


# --- 4. identities ---

@SCHEDULES
def test_eta_1_on_the_full_grid_is_ddpm(schedule):
    xT, predict = initial_noise(3, (3, 4, 4)).double(), smooth_predictor(schedule, 48)
    ours, theirs = (list(s(predict, xT, schedule, noise=oracles.normal())) for s in (partial(ddim, eta=1.0), ddpm))
    for a, b in zip(ours, theirs, strict=True): assert_close(a.xs, b.xs, rtol=1e-8, atol=1e-8)

@pytest.mark.parametrize("n", NS)
def test_eta_1_on_any_grid_is_ddpm_there(n):
    xT, predict = initial_noise(3, (3, 4, 4)).double(), smooth_predictor(LINEAR, 48)
    walk = [last(s, predict, xT, LINEAR, LINEAR.timesteps(n), noise=oracles.normal()) for s in (partial(ddim, eta=1.0), ddpm)]
    assert_close(*walk, rtol=1e-8, atol=1e-8)

@EVERY
@pytest.mark.parametrize("n", [1, 2, 13, 30])
@SCHEDULES
def test_record(sampler, n, schedule): oracles.check_steps(sampler, smooth_predictor(schedule, 48), initial_noise(3, (3, 4, 4)), schedule, schedule.timesteps(n))

@EVERY
def test_batch_split(sampler):
    net = oracles.random_unet()
    oracles.check_batch_split(sampler, clipped(predictor(net, COSINE), COSINE), COSINE, steps=7, shape=(3, 8, 8))

@DETERMINISTIC
def test_deterministic_samplers_ask_for_no_noise(sampler):
    def refuse(xt): raise AssertionError("asked for noise")
    last(sampler, smooth_predictor(LINEAR, 48), initial_noise(2, (3, 4, 4)), LINEAR, LINEAR.timesteps(13), noise=refuse)

@DETERMINISTIC
def test_network_calls(sampler):
    calls = []
    def predict(xt, t): calls.append(t); return prediction_from_x0(torch.tanh(xt), xt, t, LINEAR)
    last(sampler, predict, initial_noise(2, (2,)), LINEAR, LINEAR.timesteps(10))
    assert len(calls) == (19 if sampler is heun else 10)

@EVERY
def test_composes_with_guidance_context_and_clipping(sampler):
    net = oracles.random_unet()
    cond, uncond = (predictor(net, COSINE, c) for c in (torch.eye(5)[:1], None))
    images = sample(clipped(guided(cond, uncond, 2.0), COSINE), COSINE, 2, sampler=sampler, steps=5, shape=(3, 8, 8))
    assert images.shape == (2, 3, 8, 8) and images.abs().max() <= 1

def test_same_noise_more_steps_same_image():
    "For smooth data the deterministic samplers agree more and more with the finest grid."
    predict, xT = oracles.gaussian_predictor(0.3, 0.5, LINEAR), initial_noise(4, (2,)).double()
    exact = oracles.gaussian_ode(xT, 500, 0, 0.3, 0.5, LINEAR)
    errors = [(last(ddim, predict, xT, LINEAR, LINEAR.timesteps(n)) - exact).abs().max() for n in (5, 20, 100, 500)]
    assert errors == sorted(errors, reverse=True)


# --- inversion, blending, pieces ---

def test_inversion_and_back():
    "To noise and back is first order: ten times the steps, a tenth of the error."
    predict, x0 = oracles.gaussian_predictor(0.3, 0.5, LINEAR), torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    def errors(n):
        ts = LINEAR.timesteps(n)
        xT = invert(predict, x0, LINEAR, ts)
        there, back = xT - oracles.gaussian_ode(x0, 0, 500, 0.3, 0.5, LINEAR), last(ddim, predict, xT, LINEAR, ts) - x0
        return there.abs().max(), back.abs().max()
    for coarse, fine in zip(errors(50), errors(500)): assert fine < 0.02 and coarse / 15 < fine < coarse / 7

@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_blended_noise_keeps_its_variance(share):
    a, b = torch.randn(2, 200_000, generator=oracles.seeded())
    assert_close(blended(a, b, share).var(), torch.tensor(1.0), rtol=0, atol=0.02)

def test_ends_of_a_blend():
    a, b = torch.randn(2, 10, generator=oracles.seeded())
    assert_close(blended(a, b, 0), a)
    assert_close(blended(a, b, 1), b)

@pytest.mark.parametrize("t, s", [(500, 499), (500, 100), (2, 1), (1, 0), (300, 0)])
def test_sigma_of_eta_1_is_the_posterior(t, s):
    _, _, var = oracles.ddpm_kernel(float(LINEAR.alpha_bar[t]), float(LINEAR.alpha_bar[s]))
    assert math.isclose(ddim_sigma(t, s, LINEAR), math.sqrt(var), rel_tol=1e-9, abs_tol=1e-12)

@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, 7])
def test_bad_eta(eta, sampler):
    with pytest.raises(ValueError, match="eta"): last(partial(sampler, eta=eta), smooth_predictor(LINEAR, 2), initial_noise(1, (2,)), LINEAR, [500, 0])

@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_bad_share(share):
    with pytest.raises(ValueError, match="share"): blended(torch.zeros(1), torch.zeros(1), share)

@EVERY
@pytest.mark.parametrize("ts", [[], [500], [500, 250, 1], [250, 500, 0], [501, 0], [500, 500, 0]], ids=str)
def test_bad_times(sampler, ts):
    with pytest.raises(ValueError, match="expected times"): list(sampler(smooth_predictor(LINEAR, 2), initial_noise(1, (2,)), LINEAR, ts))

def test_bad_times_of_an_inversion():
    with pytest.raises(ValueError, match="expected times"): invert(smooth_predictor(LINEAR, 2), torch.zeros(1, 2), LINEAR, [0, 250, 500])


# --- wrong versions ---

def solver(step):
    "A sampler from step(now, before, h, h_before, xt, t, s, schedule) -> Prediction."
    def sampler(predict, xT, schedule, ts=None, *, noise=None):
        xt, before, h_before = xT, None, None
        for i, (t, s) in enumerate(pairwise(visited(schedule, ts))):
            now = pred = predict(xt, t)
            h = (schedule.sigma[t] / schedule.sigma[s]).log().item()
            if before is not None and s > 0: pred = step(now, before, h, h_before, xt, t, s, schedule)
            xs = renoised(pred, s, schedule)
            yield Step(i, t, s, xt, xs, pred)
            xt, before, h_before = xs, now, h
    return sampler

def extrapolated(weight, pair=prediction_from_x0):
    return solver(lambda now, before, h, h_before, xt, t, s, schedule: pair(now.x0 + weight(h, h_before) * (now.x0 - before.x0), xt, t, schedule))

WRONG_ORDER = {
    "ratio of the steps upside down": extrapolated(lambda h, h_before: h_before / (2 * h) * 2),
    "half a ratio forgotten": extrapolated(lambda h, h_before: h / h_before),
    "extrapolated to the wrong side": extrapolated(lambda h, h_before: -h / (2 * h_before)),
    "x0 extrapolated and the old eps kept": solver(lambda now, before, h, h_before, xt, t, s, schedule:
                                                   Prediction(now.x0 + h / (2 * h_before) * (now.x0 - before.x0), now.eps)),
}

def test_the_scaffold_of_the_wrong_versions_is_right(): oracles.check_error_order(extrapolated(lambda h, h_before: h / (2 * h_before)), 2)

@pytest.mark.parametrize("wrong", WRONG_ORDER.values(), ids=WRONG_ORDER)
def test_wrong_multistep_solvers_are_caught(wrong):
    with pytest.raises(AssertionError, match="order of the error"): oracles.check_error_order(wrong, 2)

def test_clamped_x0_with_the_old_eps_is_caught():
    def stale(predict): return lambda xt, t: Prediction(predict(xt, t).x0.clamp(-0.5, 0.5), predict(xt, t).eps)
    predict, xT = smooth_predictor(LINEAR, 48), initial_noise(3, (3, 4, 4))
    with pytest.raises(AssertionError, match="pair"): oracles.check_steps(ddim, stale(predict), xT, LINEAR, LINEAR.timesteps(10))

def test_variance_for_standard_deviation_is_caught(monkeypatch):
    import diffusion_course.fast_sampling as module
    monkeypatch.setattr(module, "ddim_sigma", lambda t, s, schedule, eta=1.0: ddim_sigma(t, s, schedule, eta) ** 2)
    with pytest.raises(AssertionError): oracles.check_gaussian_exact(partial(ddim, eta=1.0), LINEAR, LINEAR.timesteps(30), kernel=oracles.ddim_kernel(1.0))

def test_noise_that_is_not_taken_from_the_direction_is_caught(monkeypatch):
    "The noise of equation 16 added on top of the full direction to x_t (sigma forgotten under the root of equation 12)."
    import diffusion_course.fast_sampling as module
    monkeypatch.setattr(module, "renoised", lambda pred, s, schedule, sigma=0.0: renoised(pred, s, schedule))
    with pytest.raises(AssertionError): oracles.check_gaussian_exact(partial(ddim, eta=1.0), LINEAR, LINEAR.timesteps(30), kernel=oracles.ddim_kernel(1.0))

@pytest.mark.parametrize("wrong", ["no room made", "remembers another x0"])
def test_wrong_noisy_solvers_are_caught(monkeypatch, wrong):
    import diffusion_course.fast_sampling as module
    if wrong == "no room made": monkeypatch.setattr(module, "renoised", lambda pred, s, schedule, sigma=0.0: renoised(pred, s, schedule))
    else: monkeypatch.setattr(module, "prediction_from_x0", lambda x0, xt, t, schedule: prediction_from_x0(x0 * 1.01, xt, t, schedule))
    with pytest.raises(AssertionError, match="order of the spread"): oracles.check_spread_order(partial(dpmpp_2m, eta=1.0), 2)

def test_less_noise_than_eta_says_is_caught(monkeypatch):
    "The variance in place of the standard deviation: room is made for it, so the distribution stays right, and only the other library tells."
    import diffusion_course.fast_sampling as module
    monkeypatch.setattr(module, "ddim_sigma", lambda t, s, schedule, eta=1.0: ddim_sigma(t, s, schedule, eta) ** 2)
    with pytest.raises(AssertionError, match="diffusers"): test_noisy_dpmpp_2m_is_diffusers(10)


# --- a schedule that leaves no signal at all (zero terminal SNR, Lin and others, 2305.08891) --------------------------

@pytest.mark.parametrize("sampler", [ddpm, ddim, partial(ddim, eta=1.0), heun, dpmpp_2m, partial(dpmpp_2m, eta=1.0)])
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_no_signal_at_time_T(sampler, n):
    schedule = Schedule(torch.linspace(1, 0, 51))
    images = oracles.random_images(4, (3, 4, 4))
    *_, step = sampler(ideal_predictor(images, schedule), initial_noise(8, (3, 4, 4)), schedule, schedule.timesteps(n), noise=per_sample_noise(0, 8))
    assert step.xs.isfinite().all()
    if n == 50: assert oracles.distance_to_nearest(step.xs, images).max() < 1e-3

def test_noise_prediction_needs_signal():
    schedule, x = Schedule([1, 0.5, 0]), torch.randn(2, 3)
    for kind, read in PREDICTIONS.items():
        if kind == "eps":
            with pytest.raises(ValueError, match="predicts v or x0"): read(x, x, 2, schedule)
            with pytest.raises(ValueError, match="predicts v or x0"): read(x, x, torch.tensor([1, 2]), schedule)
        else: assert all(part.isfinite().all() for part in read(x, x, 2, schedule))
