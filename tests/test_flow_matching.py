"Lesson 5: the straight line is a schedule, Euler's method is DDIM, and pairs may be chosen."
import json
from functools import partial
from itertools import pairwise, permutations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

import oracles
from conftest import ROOT
from diffusion_course import check_flow
from diffusion_course.fast_sampling import ddim, dpmpp_2m, heun
from diffusion_course.flow_matching import Pairs, clock, coupled_noise, detour, on_schedule, pair_loss, straight
from diffusion_course.sampling import (PREDICTIONS, Prediction, Schedule, clipped, ddpm, ideal_predictor, initial_noise, prediction_from_eps,
                                       prediction_from_u, predictor, sample, signal_and_noise)
from diffusion_course.training import add_noise, fresh_noise, prediction_loss, prediction_target, train, uniform_times
from diffusion_course.unet import ContextUnet
from oracles import random_images, random_unet, seeded

F = Schedule.flow(500)
schedules = pytest.mark.parametrize("schedule", [F, Schedule.flow(7), Schedule.cosine(), Schedule.linear(), Schedule.cosine().shifted(2)], ids=str)


# --- the schedule ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [1, 2, 7, 500, 1000])
def test_flow_is_the_straight_line(T):
    schedule, tau = Schedule.flow(T), torch.arange(T + 1, dtype=torch.float64) / T
    assert schedule.alpha_bar[0] == 1 and schedule.alpha_bar[-1] == 0
    signal, noise = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
    assert_close(signal * tau, noise * (1 - tau), rtol=1e-12, atol=1e-12) # the same mix as (1 - tau) x0 + tau eps
    assert_close(clock(schedule), tau, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize("T", [0, -1, 2.5, "500", True])
def test_flow_refuses(T):
    with pytest.raises((ValueError, TypeError)): Schedule.flow(T)

@pytest.mark.parametrize("factor", [0.5, 2, 3])
def test_shift_is_that_of_stable_diffusion_3(factor):
    "2403.03206, section 5.3.2: tau' = f tau / (1 + (f - 1) tau)."
    tau = clock(F)
    assert_close(clock(F.shifted(factor)), factor * tau / (1 + (factor - 1) * tau), rtol=1e-9, atol=1e-12)

@schedules
def test_straight_coordinates(schedule):
    x0, eps = torch.randn(2, 4, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    for t in {0, 1, schedule.T // 2, schedule.T}:
        tau = clock(schedule)[t]
        assert_close(straight(add_noise(x0, t, eps, schedule), t, schedule), (1 - tau) * x0 + tau * eps)
    with pytest.raises(ValueError): straight(x0, schedule.T + 1, schedule)
    with pytest.raises(ValueError): straight(x0, -1, schedule)

@pytest.mark.parametrize("sampler", [ddpm, ddim, heun, dpmpp_2m, partial(dpmpp_2m, eta=1.0), partial(ddim, eta=0.5)],
                         ids=["ddpm", "ddim", "heun", "2m", "2m, eta 1", "ddim, eta 0.5"])
@pytest.mark.parametrize("n", [3, 10, 33, 500])
def test_every_sampler_walks_the_flow(sampler, n):
    images = random_images(64)
    x = sample(ideal_predictor(images, F), F, 8, sampler=sampler, steps=n)
    assert torch.cdist(x.flatten(1), images.flatten(1)).amin(1).max() / 768**0.5 <= 1e-3

def test_no_picture_in_pure_noise():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="no signal"): prediction_from_eps(x, x, 500, F)
    with pytest.raises(ValueError, match="no signal"): sample(predictor(lambda x, t: x, F, kind="eps"), F, 2, steps=3)


# --- the velocity ------------------------------------------------------------------------------------------------------

@schedules
def test_u_gives_back_the_pair(schedule): oracles.check_target(prediction_target, prediction_from_u, "u", schedule)

@schedules
def test_u_is_the_slope_of_the_line(schedule):
    "And it is the v of lesson 2, scaled: u = (signal + noise) v + (noise - signal) x_t / (signal + noise) … by the pair."
    x0, eps = torch.randn(2, 4, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    t = max(1, schedule.T // 3)
    signal, noise = signal_and_noise(t, x0, schedule)
    xt = signal * x0 + noise * eps
    by_u = prediction_from_u(eps - x0, xt, t, schedule)
    by_v = PREDICTIONS["v"](signal * eps - noise * x0, xt, t, schedule)
    assert_close(by_u, by_v, rtol=1e-9, atol=1e-9)

@schedules
def test_error_of_u_beside_that_of_v(schedule):
    "|u_hat - u| = (signal + noise) |v_hat - v| for any answer, so the two losses are one, weighted."
    x0, eps, wrong = torch.randn(3, 4, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    for t in {1, schedule.T // 2 or 1, schedule.T}:
        signal, noise = signal_and_noise(t, x0, schedule)
        pred = PREDICTIONS["v"](wrong, signal * x0 + noise * eps, t, schedule)
        def error(kind): return prediction_target(kind, *pred, t, schedule) - prediction_target(kind, x0, eps, t, schedule)
        assert_close(error("u"), (signal + noise) * error("v"), rtol=1e-8, atol=1e-8)

def test_the_loss_over_tau_is_that_of_v_over_the_angle():
    "The weight of u and the clock of flow cancel, whatever the errors are (2303.00848)."
    fine = Schedule.flow(20_000)
    ab, tau = fine.alpha_bar, clock(fine)
    angle, weight = ab.sqrt().acos(), (ab.sqrt() + (1 - ab).sqrt()).square()
    for error in (angle.sin(), torch.ones_like(angle), (3 * angle).cos().square()):
        assert_close(torch.trapezoid(weight * error, tau), torch.trapezoid(error, angle), rtol=1e-6, atol=0)
        assert (torch.trapezoid(error, tau) - torch.trapezoid(error, angle)).abs() > 1e-2 # without the weight it is not


# --- Euler -------------------------------------------------------------------------------------------------------------

def euler(predict, x, schedule, ts, sign=1):
    "Euler's method on the straight line, from its own formulas."
    tau, x = clock(schedule).tolist(), x
    total = (schedule.alpha_bar.sqrt() + (1 - schedule.alpha_bar).sqrt()).tolist()
    x = x / total[ts[0]]
    for t, s in pairwise(ts):
        pred = predict(x * total[t], t)
        x = x + sign * (tau[s] - tau[t]) * (pred.eps - pred.x0)
    return x

@schedules
@pytest.mark.parametrize("n", [1, 3, 7])
def test_euler_is_ddim(schedule, n):
    predict, x = oracles.smooth_predictor(schedule, 12), torch.randn(4, 3, 2, 2, generator=seeded(), dtype=torch.float64)
    ts = schedule.timesteps(n)
    *_, last = ddim(predict, x, schedule, ts)
    assert_close(euler(predict, x, schedule, ts), last.xs, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(euler(predict, x, schedule, ts, sign=-1), last.xs, atol=1e-2)

@pytest.mark.parametrize("n", [2, 5, 10, 20])
def test_diffusers_walks_the_same_flow(n):
    "FlowMatchEulerDiscreteScheduler without a shift, given our taus; its velocity is noise - data, as ours."
    scheduler, ts = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=1.0), F.timesteps(n)
    scheduler.set_timesteps(sigmas=clock(F)[ts[:-1]].tolist())
    predict, x = oracles.smooth_predictor(F, 12), torch.randn(4, 3, 2, 2, generator=seeded())
    total = (F.alpha_bar.sqrt() + (1 - F.alpha_bar).sqrt()).tolist()
    theirs = x
    for t, step in zip(scheduler.timesteps, ddim(predict, x, F, ts)):
        pred = predict(theirs * total[step.t], step.t)
        theirs = scheduler.step(pred.eps - pred.x0, t, theirs).prev_sample
        assert_close(straight(step.xs, step.s, F), theirs, rtol=2e-5, atol=2e-5)

def test_gaussian_flow_has_a_closed_form():
    "Data N(mu, std²): each point keeps its quantile, and the walk meets it at a rate of first order."
    mu, std = 0.3, 0.5
    x = torch.randn(1000, 1, generator=seeded(), dtype=torch.float64)
    predict = oracles.gaussian_predictor(mu, std, F)
    off = [(sample_end(predict, x, n) - (mu + std * x)).abs().max().item() for n in (20, 40, 80)]
    assert off[0] < 0.2 and 1.7 < off[0] / off[1] < 2.3 and 1.7 < off[1] / off[2] < 2.3

def sample_end(predict, x, n):
    *_, last = ddim(predict, x, F, F.timesteps(n))
    return last.xs


# --- how straight ------------------------------------------------------------------------------------------------------

def test_detour():
    line = torch.linspace(0, 1, 9).view(9, 1, 1, 1, 1) * torch.randn(1, 5, 3, 4, 4, generator=seeded())
    assert_close(detour(line), torch.zeros(5), rtol=0, atol=1e-6)
    corner = torch.tensor([[0.0, 0], [1, 0], [1, 1]]).view(3, 1, 2)
    assert_close(detour(corner), torch.tensor([1 - 2**0.5 / 2]))
    uneven = torch.tensor([[0.0, 0], [0.1, 0], [1, 0]]).view(3, 1, 2)
    assert detour(uneven) == 0
    both = torch.cat([corner, uneven], dim=1)
    assert_close(detour(both), torch.tensor([1 - 2**0.5 / 2, 0.0]))


# --- pairs -------------------------------------------------------------------------------------------------------------

def test_coupled_noise_is_the_best_order():
    x0 = torch.randn(6, 3, 2, 2, generator=seeded(5))
    eps, paired = fresh_noise(x0, None, seeded(1)), coupled_noise(x0, None, seeded(1))
    assert_close(paired.flatten(1).sort(0).values, eps.flatten(1).sort(0).values) # the same noises
    def cost(noise): return (x0 - noise).square().sum().item()
    assert cost(paired) <= min(cost(eps[list(p)]) for p in permutations(range(6))) + 1e-4 < cost(eps)

def test_coupled_noise_stays_within_a_context():
    x0, context = torch.randn(40, 1, 2, 2, generator=seeded()), torch.eye(4)[torch.arange(40) % 4]
    eps, paired = (f(x0, context, seeded(3)) for f in (fresh_noise, coupled_noise))
    for k in range(4):
        rows = context[:, k] == 1
        assert_close(paired[rows].flatten(1).sort(0).values, eps[rows].flatten(1).sort(0).values)
        assert not torch.equal(paired[rows], eps[rows])
    assert not torch.equal(paired, coupled_noise(x0, None, seeded(3))) # over all it would be another order

def test_coupled_noise_is_a_function_of_the_generator():
    x0 = torch.randn(8, 3, 4, 4, generator=seeded()).double()
    a, b, c = (coupled_noise(x0, None, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == x0.dtype
    assert coupled_noise(x0[:1], torch.eye(5)[:1], seeded()).shape == (1, 3, 4, 4)

def test_coupling_reaches_the_loss():
    x0 = random_images(16, (3, 4, 4))
    seen = []
    def net(xt, t): seen.append(xt); return torch.zeros_like(xt)
    net.predicts = "u"
    plain, paired = (prediction_loss(net, x0, None, F, noise=noise, generator=seeded()).item() for noise in (fresh_noise, coupled_noise))
    assert paired < plain # a network that says nothing pays |eps - x0|², which pairs make small
    assert not torch.equal(*seen)

def test_pair_loss_by_hand():
    x0, start, context = *torch.randn(2, 5, 3, 4, 4, generator=seeded()), torch.eye(5)
    pairs = torch.stack([Pairs(x0, start, context)[i][0] for i in range(5)])
    net = random_unet(predicts="u")
    t = uniform_times(5, F.T, seeded(4))
    xt = add_noise(x0, t, start, F)
    want = (net(xt, t, context) - (start - x0)).square().mean()
    assert_close(pair_loss(net, pairs, context, F, generator=seeded(4)), want)
    swapped = torch.cat([start, x0], dim=1)
    assert abs(pair_loss(net, swapped, context, F, generator=seeded(4)) - want) > 1e-3

def test_pairs_without_context():
    x0, start = torch.randn(2, 5, 3, 4, 4)
    data = Pairs(x0, start)
    assert len(data) == 5 and torch.equal(data[2], torch.cat([x0[2], start[2]]))
    net = ContextUnet(n_feat=8, predicts="v", n_context=0)
    (step,) = train(net, data, Schedule.cosine(), steps=1, batch_size=4, loss=pair_loss, device="cpu")
    assert step.loss > 0

def test_pairs_refuse():
    x = torch.randn(4, 3, 2, 2)
    with pytest.raises(ValueError, match="start"): Pairs(x, x[:3])
    with pytest.raises(ValueError, match="start"): Pairs(x, x[:, :1])
    with pytest.raises(ValueError, match="3 contexts for 4 pairs"): Pairs(x, x, torch.eye(3))
    with pytest.raises(ValueError, match="even number"): pair_loss(random_unet(), x, torch.eye(5)[:4], F)

def test_pairs_that_belong_together_need_one_step():
    "From x to -x: a network that has learnt it goes there in one step, as in fifty."
    def net(xt, t):
        signal, noise = signal_and_noise(t, xt, F)
        x = xt / (signal + noise) # (1 - tau) x0 + tau (-x0) = (1 - 2 tau) x0
        tau = (t / F.T).view(-1, 1, 1, 1)
        return torch.where((tau - 0.5).abs() < 1e-3, 0, -2 * x / (1 - 2 * tau))
    start = random_images(3, (3, 4, 4))
    predict = predictor(net, F, kind="u")
    for n in (1, 3, 7):
        *_, last = ddim(predict, start, F, F.timesteps(n))
        assert_close(last.xs, -start, rtol=1e-4, atol=1e-4)


# --- two clocks --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("own, walked", [(Schedule.cosine(), F), (F, Schedule.cosine()), (Schedule.cosine(), Schedule.linear()), (F, F)], ids=str)
def test_on_schedule_asks_at_the_same_noise_level(own, walked):
    images = random_images(16, (3, 4, 4))
    there, here = on_schedule(ideal_predictor(images, own), own, walked), ideal_predictor(images, walked)
    for t in (60, 200, 350):
        xt = add_noise(images, t, torch.randn(images.shape, generator=seeded(t)), walked)
        assert_close(there(xt, t).x0, here(xt, t).x0, rtol=0, atol=0.05)
        oracles.check_pair(there(xt, t), xt, t, walked)
    x = sample(there, walked, 6, sampler=ddim, steps=12, shape=(3, 4, 4))
    assert torch.cdist(x.flatten(1), images.flatten(1)).amin(1).max() < 1e-2

def test_on_schedule_by_the_nearest_time():
    asked = []
    def predict(xt, t):
        asked.append(t)
        return Prediction(xt, xt)
    other = on_schedule(predict, Schedule.cosine(), F)
    other(torch.zeros(2, 3, 2, 2), 250)
    other(torch.zeros(2, 3, 2, 2), torch.tensor([1, 500]))
    assert isinstance(asked[0], int) and asked[1].tolist()[1] == 500 and asked[1][0] >= 1
    assert abs(clock(Schedule.cosine())[asked[0]] - 0.5) < 2e-3
    with pytest.raises(ValueError): other(torch.zeros(2, 3, 2, 2), 501)
    with pytest.raises(ValueError): other(torch.zeros(2, 3, 2, 2), 0)

def test_on_schedule_hands_on_what_sample_needs():
    net, context = random_unet(predicts="v"), torch.eye(5)[torch.arange(7) % 5]
    predict = on_schedule(clipped(predictor(net, Schedule.cosine(), context), Schedule.cosine()), Schedule.cosine(), F)
    assert predict.net is net
    whole, parts = (sample(predict, F, 7, sampler=ddim, steps=3, shape=(3, 4, 4), batch_size=size) for size in (7, 3))
    assert_close(whole, parts, rtol=1e-4, atol=1e-4)


# --- the checkers ------------------------------------------------------------------------------------------------------

def wide(tau): return tau.reshape(-1, 1, 1, 1)
def loss_of(mix, target, time=lambda tau: tau):
    return lambda net, x0, eps, tau: ((net(mix(x0, eps, wide(tau)), time(tau)) - target(x0, eps)) ** 2).mean()
def line(x0, eps, tau): return x0 + tau * (eps - x0)
def walk_down(velocity, x, n):
    for tau in torch.linspace(1, 0, n + 1)[:-1].tolist(): x = x - velocity(x, tau) / n
    return x

RIGHT = {"noise_from_velocity": [lambda u, x, tau: x + u - tau * u, lambda u, x, tau: (x - tau * u) + u],
         "clock": [lambda ab: 1 / (1 + (ab / (1 - ab)).sqrt()), lambda ab: ((1 - ab) / ab).sqrt() / (1 + ((1 - ab) / ab).sqrt())],
         "flow_loss": [loss_of(line, lambda x0, eps: eps - x0), lambda net, x0, eps, tau: torch.nn.functional.mse_loss(net(line(x0, eps, wide(tau)), tau), eps - x0)],
         "euler": [walk_down, lambda velocity, x, n: walk_down(lambda x, tau: velocity(x, tau), x, n)],
         "detour": [detour, lambda xs: torch.stack([1 - (w[-1] - w[0]).norm() / sum((b - a).norm() for a, b in pairwise(w)) for w in xs.unbind(1)])]}
WRONG = {"noise_from_velocity": {"sign": lambda u, x, tau: x - (1 - tau) * u, "this is x0": lambda u, x, tau: x - tau * u, "tau on": lambda u, x, tau: x + tau * u,
                                 "whole line": lambda u, x, tau: x + u},
         "clock": {"share of the signal": lambda ab: ab.sqrt() / (ab.sqrt() + (1 - ab).sqrt()), "roots": lambda ab: 1 - ab, "factor of the noise": lambda ab: (1 - ab).sqrt(),
                   "sigma": lambda ab: ((1 - ab) / ab).sqrt()},
         "flow_loss": {"changed places": loss_of(lambda x0, eps, tau: line(eps, x0, tau), lambda x0, eps: eps - x0), "sign": loss_of(line, lambda x0, eps: x0 - eps),
                       "target is the noise": loss_of(line, lambda x0, eps: eps), "told 1 - tau": loss_of(line, lambda x0, eps: eps - x0, lambda tau: 1 - tau)},
         "euler": {"to more noise": lambda velocity, x, n: walk_down(lambda x, tau: -velocity(x, tau), x, n), "told 1 - tau": lambda velocity, x, n: walk_down(lambda x, tau: velocity(x, 1 - tau), x, n)},
         "detour": {"not detour": lambda xs: 1 - detour(xs), "averaged": lambda xs: detour(xs).mean()}}

@pytest.mark.parametrize("name, i", [(name, i) for name in RIGHT for i in range(2)])
def test_right_answers(name, i):
    for _ in range(10): assert getattr(check_flow, name)(RIGHT[name][i])

@pytest.mark.parametrize("name, word", [(name, word) for name in WRONG for word in WRONG[name]])
def test_wrong_answers_are_named(name, word):
    for _ in range(10):
        result = getattr(check_flow, name)(WRONG[name][word])
        assert not result and word in result.message, result

@pytest.mark.parametrize("name", RIGHT)
def test_the_lesson_holds_stub_and_solution(name):
    cells = ["".join(c["source"]) for c in json.loads((ROOT / "nbs/L5_FlowMatching.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert any(cell.rstrip().endswith(f"check.{name}(my_{name})") for cell in cells)
    assert any(f"assert check.{name}(solved_{name})" in cell for cell in cells)

@pytest.mark.parametrize("name", RIGHT)
def test_unsolved(name):
    result = getattr(check_flow, name)(lambda *args: None)
    assert not result and "nothing came back" in result.message
