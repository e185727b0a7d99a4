"Each exercise checker accepts right answers however they are written, and gives every wrong answer its own reason."
import json
import math
import random
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusion_course import check, sampling, training

ROOT = Path(__file__).parents[1]
EXERCISES = {
    "L1_Sampling": ["alpha_bar", "x0_from_eps", "times", "posterior", "ddpm"],
    "L2_Training": ["add_noise", "learning_rate", "moving_average", "noise_loss", "training_loop"],
}
NAMES = [name for names in EXERCISES.values() for name in names]


# Right answers, each checker's in at least two ways of writing

def alpha_bar_loop(betas):
    result = [1.0]
    for beta in betas: result.append(result[-1] * (1 - float(beta)))
    return result

def posterior_by_precision(x0, xt, t, s, schedule): # Bayes' rule: precisions add
    ab_t, ab_s = schedule.alpha_bar[t].item(), schedule.alpha_bar[s].item()
    a = ab_t / ab_s
    if s == 0: return x0, 0.0
    precision = 1 / (1 - ab_s) + a / (1 - a)
    return (math.sqrt(ab_s) / (1 - ab_s) * x0 + math.sqrt(a) / (1 - a) * xt) / precision, 1 / precision

def ddpm_with_case(predict, xT, schedule, noise):
    x = xT
    for s in reversed(range(schedule.T)):
        pred = predict(x, s + 1)
        if s == 0: return pred.x0
        mean, var = sampling.posterior(pred.x0, x, s + 1, s, schedule)
        x = torch.normal(0.0, 0.0, x.shape) + mean + noise(x) * math.sqrt(var)

def ddpm_beforehand(predict, xT, schedule, noise):
    draws, x = [noise(xT) for _ in range(schedule.T)], xT.clone()
    for z, t in zip(draws, range(schedule.T, 0, -1)):
        mean, var = sampling.posterior(predict(x, np.int64(t)).x0, x, t, t - 1, schedule)
        x.copy_(mean + var.sqrt() * z)
    return x.numpy()

def ddpm_of_the_library(predict, xT, schedule, noise):
    for step in sampling.ddpm(predict, xT, schedule, noise=noise): pass
    return step.xs

def add_noise_in_numpy(x0, t, eps, schedule):
    ab = schedule.alpha_bar.numpy()[t.numpy()][:, None, None, None]
    return np.sqrt(ab) * x0.numpy() + np.sqrt(1 - ab) * eps.numpy()

def add_noise_by_image(x0, t, eps, schedule):
    sigma = schedule.sigma
    return torch.stack([(x + sigma[i] * e) / (1 + sigma[i] ** 2).sqrt() for x, i, e in zip(x0, t, eps)])

def add_noise_in_place(x0, t, eps, schedule):
    ab = schedule.alpha_bar[t].float()[:, None, None, None]
    return x0.mul_(ab**0.5).add_(eps.mul_((1 - ab) ** 0.5))

def rate_in_torch(step, steps, warmup):
    rise, fall = torch.tensor((step + 1) / warmup), torch.cos(torch.tensor(math.pi / 2 * (step - warmup) / (steps - warmup))) ** 2
    return rise if step < warmup else fall

def average_in_place(old, new, k, decay): return old.lerp_(new, 1 - min(decay, (1 + k) / (10 + k)))

def average_by_difference(old, new, k, decay): return (new + max(0, min(decay, (1 + k) / (10 + k))) * (old - new)).tolist()

def loss_by_hand(net, x0, schedule):
    eps = torch.normal(torch.zeros_like(x0), torch.ones_like(x0))
    t = (torch.rand(len(x0)) * schedule.T).long() + 1
    return (eps - net(add_noise_by_image(x0, t, eps, schedule).float(), t)).pow(2).sum() / x0.numel()

def loss_with_numpy_noise(net, x0, schedule):
    t = torch.from_numpy(np.random.randint(1, schedule.T + 1, len(x0)))
    eps = torch.from_numpy(np.random.randn(*x0.shape)).float()
    return F.mse_loss(net(training.add_noise(x0, t, eps, schedule), t, None), eps)

def loop(order): # order: e.g. "lzbs", with the loss l, zero_grad z, backward b, step s
    def train(net, batches, optimizer, loss):
        losses = []
        for x0 in batches:
            for letter in order:
                if letter == "l": value = loss(net, x0)
                if letter == "z": optimizer.zero_grad()
                if letter == "b": value.backward()
                if letter == "s": optimizer.step()
            losses.append(value.item())
        return losses
    return train

def loop_without_optimizer_zero(net, batches, optimizer, loss):
    losses = np.zeros(len(batches))
    for i, x0 in enumerate(batches):
        net.zero_grad()
        value = loss(net, x0)
        value.backward()
        optimizer.step()
        losses[i] = value.detach()
    return losses

RIGHT = {
    "alpha_bar": [lambda b: torch.cat([torch.ones(1), torch.cumprod(1 - b, 0)]), alpha_bar_loop,
                  lambda b: np.concatenate([[1], np.cumprod(1 - b.numpy())]), lambda b: F.pad((1 - b).log().cumsum(0), (1, 0)).exp()],
    "x0_from_eps": [lambda xt, eps, ab: (xt - (1 - ab).sqrt() * eps) / ab.sqrt(), lambda xt, eps, ab: xt / ab**.5 - (1 / ab - 1) ** .5 * eps,
                    lambda xt, eps, ab: (xt.numpy() - math.sqrt(1 - ab) * eps.numpy()) / math.sqrt(ab),
                    lambda xt, eps, ab: xt.sub_(eps.mul_((1 - ab) ** .5)).div_(ab**.5)],
    "times": [lambda T, n: [T * (n - k) // n for k in range(n + 1)], lambda T, n: [round(T * k / n) for k in range(n, -1, -1)],
              lambda T, n: np.linspace(T, 0, n + 1).round().astype(int), lambda T, n: list(torch.arange(n, -1, -1) * T // n),
              lambda T, n: tuple(-(-T * k // n) for k in range(n, -1, -1)), lambda T, n: sampling.Schedule.linear(T).timesteps(n)],
    "posterior": [sampling.posterior, posterior_by_precision,
                  lambda *a: tuple(x.numpy() for x in sampling.posterior(*a)), lambda *a: list(sampling.posterior(*a))],
    "ddpm": [ddpm_with_case, ddpm_beforehand, ddpm_of_the_library],
    "add_noise": [training.add_noise, add_noise_in_numpy, add_noise_by_image, add_noise_in_place],
    "learning_rate": [lambda k, n, w: (k + 1) / w if k < w else .5 + .5 * math.cos(math.pi * (k - w) / (n - w)), rate_in_torch,
                      lambda k, n, w: min((k + 1) / w, np.cos(np.pi / 2 * max(0, k - w) / (n - w)) ** 2)],
    "moving_average": [lambda old, new, k, d: min(d, (1 + k) / (10 + k)) * old + (1 - min(d, (1 + k) / (10 + k))) * new,
                       lambda old, new, k, d: training.ramped_average(d)(old, new, torch.tensor(k)), average_in_place, average_by_difference],
    "noise_loss": [lambda net, x0, schedule: training.noise_prediction_loss(net, x0, None, schedule), loss_by_hand, loss_with_numpy_noise],
    "training_loop": [loop("lzbs"), loop("zlbs"), loop("lbsz"), loop("zzlbs"), loop_without_optimizer_zero],
}


# Wrong answers, each with words that only its own reason holds

def walk(add, skip=0, stop=0, once=False, stale=False, give="x0"):
    def f(predict, xT, schedule, noise):
        x, fixed = xT, noise(xT) if once else None
        for t in range(schedule.T - skip, stop, -1):
            mean, var = sampling.posterior(getattr(predict(xT if stale else x, t), give), x, t, t - 1, schedule)
            x = add(mean, var, fixed if once else noise(x), schedule.beta[t], t)
        return x
    return f

def good(mean, var, z, beta, t): return mean + var.sqrt() * z

def noisy(weigh, view=(-1, 1, 1, 1), shift=0):
    def f(x0, t, eps, schedule):
        a, b = weigh(schedule.alpha_bar[t - shift].reshape(view))
        return a * x0 + b * eps
    return f

def rate(rise=lambda k, w: (k + 1) / w, fall=lambda p: .5 + .5 * math.cos(math.pi * p), late=True):
    return lambda k, n, w: rise(k, w) if k < w else fall((k - w) / (n - w) if late else k / n)

def average(d, a=lambda d: d, b=lambda d: 1 - d):
    def f(old, new, k, decay):
        used = d(decay, (k + 1) / (k + 10))
        return a(used) * old + b(used) * new
    return f

def loss(times=lambda n, T: torch.randint(1, T + 1, (n,)), noise=torch.randn_like, mix=None, target="eps", ask=lambda net, xt, t: net(xt, t),
         reduce=lambda d: d.square().mean()):
    def f(net, x0, schedule):
        t, eps = times(len(x0), schedule.T), noise(x0)
        index = t.long().reshape(-1, *[1] * (t.ndim == 1) * 3).clamp(max=schedule.T)
        ab = schedule.alpha_bar[index].float()
        xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps if mix is None else mix(x0, ab, eps)
        return reduce(ask(net, xt, t) - {"eps": eps, "x0": x0}[target])
    return f

def seeded_times(n, T): return torch.randint(1, T + 1, (n,), generator=torch.Generator().manual_seed(0))
def seeded_noise(x0): return torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))

def loop_zero_once(net, batches, optimizer, loss):
    optimizer.zero_grad()
    return loop("lbs")(net, batches, optimizer, loss)

def loop_keeps_graph(net, batches, optimizer, loss):
    losses = []
    for x0 in batches:
        losses.append(loss(net, x0))
        optimizer.zero_grad(); losses[-1].backward(); optimizer.step()
    return losses

def loop_first_batch_only(net, batches, optimizer, loss): return loop("lzbs")(net, batches[:1], optimizer, loss)

def loss_unused(net, batches, optimizer, loss):
    with torch.no_grad(): return loop("lzbs")(net, batches, optimizer, loss)

def post(mean=None, var=None):
    def f(x0, xt, t, s, schedule):
        right = sampling.posterior(x0, xt, t, s, schedule)
        ab_t, ab_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
        return (mean(x0, xt, ab_t, ab_s) if mean else right[0]), (var(ab_t, ab_s, right[1]) if var else right[1])
    return f

def swapped_times(x0, xt, t, s, schedule):
    ab_s, ab_t = schedule.alpha_bar[t], schedule.alpha_bar[s]
    a = ab_t / ab_s
    return (ab_s.sqrt() * (1 - a) * x0 + a.sqrt() * (1 - ab_s) * xt) / (1 - ab_t), (1 - ab_s) / (1 - ab_t) * (1 - a)

def step_alpha(x0, xt, t, s, schedule): # DDPM's own formula, with s in place of t - 1
    ab_t, ab_s, a = schedule.alpha_bar[t], schedule.alpha_bar[s], schedule.alpha[t]
    return (ab_s.sqrt() * schedule.beta[t] * x0 + a.sqrt() * (1 - ab_s) * xt) / (1 - ab_t), (1 - ab_s) / (1 - ab_t) * schedule.beta[t]

def labs_walk(T, n): # the labs' indices: the last one is negative
    ts = list(range(T, 0, -(T // n)))
    return [*ts, ts[-1] - T // n]

WRONG = {
    "alpha_bar": [
        (lambda b: np.cumprod(1 - b.numpy()), "Put a 1 in front"),
        (lambda b: [1] + np.cumprod(b.numpy()).tolist(), "multiplied the betas"),
        (lambda b: torch.cat([torch.ones(1), 1 - torch.cumsum(b, 0)]), "added the betas up"),
        (lambda b: torch.cat([torch.ones(1), 1 - b]), "one step keeps"),
        (lambda b: torch.cat([torch.ones(1), torch.cumprod((1 - b) ** .5, 0)]), "leave out the root"),
        (lambda b: torch.cat([torch.ones(1), (1 - b[1:]).cumprod(0) * (1 - b[0])]), "overwrote"),
        (lambda b: F.pad((1 - b).cumprod(0), (1, 0)), "alpha_bar[0] is 0"),
        (lambda b: torch.ones(len(b) + 1), "Hint"),
        (lambda b: torch.ones(len(b) + 1, dtype=torch.int64), "decimals were cut off"),
        (lambda b: torch.ones(1, len(b) + 1), "expected shape (2,), got (1, 2)"),
        (lambda b: torch.full((len(b) + 1,), torch.nan), "NaN"),
        (lambda b: 1j * torch.ones(len(b) + 1), "complex"),
        (lambda b: {"alpha_bar": b}, "of type dict"),
        (lambda b: "one", "of type str"),
        (lambda b: torch.rand(len(b) + 1), "another answer each time"),
    ],
    "x0_from_eps": [
        (lambda xt, eps, ab: (xt - (1 - ab) * eps) / ab**.5, "1 - alpha_bar where its square root"),
        (lambda xt, eps, ab: (xt - (1 - ab)**.5 * eps) / ab, "not by its square root"),
        (lambda xt, eps, ab: (xt - (1 - ab) * eps) / ab, "both square roots"),
        (lambda xt, eps, ab: xt - (1 - ab)**.5 * eps, "divide by that factor"),
        (lambda xt, eps, ab: (xt + (1 - ab)**.5 * eps) / ab**.5, "take it away"),
        (lambda xt, eps, ab: (xt - ab**.5 * eps) / (1 - ab)**.5, "changed places"),
        (lambda xt, eps, ab: ((xt - (1 - ab)**.5 * eps) / ab**.5).clip(-1, 1), "clipped"),
        (lambda xt, eps, ab: ((xt - (1 - ab)**.5 * eps) / ab**.5)[:1], "expected shape (2, 3, 8, 8), got (1, 3, 8, 8)"),
        (lambda xt, eps: xt, "same arguments as the stub"),
    ],
    "times": [
        (lambda T, n: range(T, 0, -T // n), "never reaches 0"),
        (lambda T, n: list(range(T, 0, -(T // n))) + [0], "the list makes 32 steps"),
        (labs_walk, "wraps to the noisy end"),
        (lambda T, n: np.linspace(T, 0, n + 1), "must be whole numbers"),
        (lambda T, n: [round(T * k / n) for k in range(n + 1)], "rise"),
        (lambda T, n: [T * k // n for k in range(n - 1, -1, -1)], "start at T"),
        (lambda T, n: [T - k for k in range(n)] + [0], "uneven"),
        (lambda T, n: [T, T, *(T * k // n for k in range(n - 2, -1, -1))] if n > 1 else [T, 0], "comes twice"),
        (lambda T, n: [], "empty"),
        (lambda T, n: T, "return a list"),
        (lambda T, n: [["a"]], "must be whole numbers"),
    ],
    "posterior": [
        (post(var=lambda ab_t, ab_s, v: 1 - ab_t / ab_s), "the beta of the way forward"),
        (post(var=lambda ab_t, ab_s, v: v**.5), "standard deviation"),
        (swapped_times, "s and t have changed places"),
        (lambda x0, xt, *rest: sampling.posterior(xt, x0, *rest), "each other's factor"),
        (post(mean=lambda x0, xt, a, b: (b * (1 - a / b) * x0 + a / b * (1 - b) * xt) / (1 - a)), "in the mean the square roots are missing"),
        (step_alpha, "a single step keeps"),
        (post(mean=lambda x0, xt, a, b: b**.5 * x0, var=lambda a, b, v: 1 - b), "forgets where you are"),
        (lambda *a: sampling.posterior(*a)[0], "expected 2 values, mean and variance"),
        (lambda *a: sampling.posterior(*a)[::-1], "mean: expected shape (1, 3, 4, 4), got ()"),
        (lambda *a: (sampling.posterior(*a)[0], None), "variance is of type NoneType"),
    ],
    "ddpm": [
        (walk(lambda mean, *_: mean), "no noise was added back"),
        (walk(lambda mean, var, z, beta, t: mean + var * z), "by the variance where its square root"),
        (walk(lambda mean, var, z, beta, t: mean + z if t > 1 else mean), "full strength"),
        (walk(lambda mean, var, z, beta, t: mean + z), "ends as noise"),
        (walk(lambda mean, var, z, beta, t: mean + beta**.5 * z), "in the last step too"),
        (walk(lambda mean, var, z, beta, t: mean + beta**.5 * z if t > 1 else mean), "beta[t] for the variance"),
        (walk(good, once=True), "the same noise"),
        (walk(good, stale=True), "about xT in every step"),
        (walk(good, give="eps"), "pred.eps in place of pred.x0"),
        (walk(good, stop=1), "stopped at time 1"),
        (walk(good, skip=1), "started at T - 1"),
        (walk(lambda mean, var, z, beta, t: mean + var.sqrt() * torch.randn_like(z)), "another answer each time"),
        (lambda predict, xT, schedule, noise: sampling.ddpm(predict, xT, schedule, noise=noise), "of type generator"),
        (lambda predict, xT, schedule, noise: schedule.alpha_bar[schedule.T + 1], "IndexError"),
    ],
    "add_noise": [
        (noisy(lambda ab: (ab**.5, 1 - ab)), "times too small at t = 1"),
        (noisy(lambda ab: (ab, (1 - ab)**.5)), "the signal fades too fast"),
        (noisy(lambda ab: (ab, 1 - ab)), "both square roots"),
        (noisy(lambda ab: ((1 - ab)**.5, ab**.5)), "changed places"),
        (lambda x0, t, eps, schedule: x0 * schedule.alpha_bar[t]**.5 + eps * (1 - schedule.alpha_bar[t])**.5, "spread over image columns"),
        (noisy(lambda ab: (ab**.5, (1 - ab)**.5), shift=1), "of time t - 1"),
        (noisy(lambda ab: (ab**.5, 0)), "no noise was added"),
        (noisy(lambda ab: (1, (1 - ab)**.5)), "all the signal was kept"),
        (lambda x0, t, eps, schedule: training.add_noise(x0, t, torch.rand_like(x0), schedule), "another answer each time"),
        (lambda x0, t, eps, schedule: training.add_noise(x0, t, -eps, schedule), "Hint"),
    ],
    "learning_rate": [
        (rate(rise=lambda k, w: k / w), "learns nothing"),
        (rate(rise=lambda k, w: (k + 1) // w), "cuts the decimals off"),
        (rate(rise=lambda k, w: 1), "the warm-up is missing"),
        (rate(fall=lambda p: 1), "the decay is missing"),
        (rate(fall=lambda p: 1 - p), "straight line"),
        (rate(late=False), "jumps"),
        (rate(fall=lambda p: math.cos(math.pi * p)), "cos alone"),
        (rate(fall=lambda p: 1 + math.cos(math.pi * p)), "halve"),
        (rate(fall=lambda p: .5 - .5 * math.cos(math.pi * p)), "not 1 - cos"),
        (lambda k, n, w: [1.0], "expected shape (), got (1,)"),
    ],
    "moving_average": [
        (average(min, lambda d: 1 - d, lambda d: d), "changed places"),
        (average(lambda decay, ramp: decay), "ramp is missing"),
        (average(max), "the larger of"),
        (average(lambda decay, ramp: ramp), "never stops"),
        (average(min, b=lambda d: 1), "in full"),
        (lambda old, new, k, decay: new, "nothing is averaged"),
        (lambda old, new, k, decay: old, "Hint"),
    ],
    "noise_loss": [
        (loss(times=lambda n, T: torch.randint(0, T, (n,))), "t = 0 was drawn"),
        (loss(times=lambda n, T: torch.randint(0, T + 1, (n,))), "t = 0 was drawn"),
        (loss(times=lambda n, T: torch.randint(1, T, (n,))), "randint leaves its end out"),
        (loss(times=lambda n, T: torch.randint(1, T + 1, ()).expand(n)), "the whole batch has one time"),
        (loss(times=lambda n, T: torch.randint(1, T + 1, ())), "net wants times of shape (256,)"),
        (loss(times=seeded_times), "the times are the same in every call"),
        (loss(times=lambda n, T: torch.randint(1, T // 2 + 1, (n,)) * 2), "only the times [2, 4, 6, 8]"),
        (loss(ask=lambda net, xt, t: net(xt, t / 8)), "dtype torch.float32"),
        (loss(ask=lambda net, xt, t: xt), "never called"),
        (loss(ask=lambda net, xt, t: net(xt[:, :1], t)), "shown numbers of shape (256, 1, 4, 4), expected"),
        (loss(mix=lambda x0, ab, eps: x0), "the clean images"),
        (loss(mix=lambda x0, ab, eps: ab.sqrt() * x0 + (1 - ab) * eps), "where sqrt(1 - alpha_bar) eps belongs"),
        (loss(mix=lambda x0, ab, eps: ab.sqrt() * x0), "there is no noise in xt"),
        (loss(mix=lambda x0, ab, eps: ab * x0 + (1 - ab).sqrt() * 3 * eps), "not 0 and 1"),
        (loss(noise=torch.rand_like), "the noise is uniform"),
        (loss(noise=lambda x0: torch.rand_like(x0) * 2 - 1), "the noise is uniform"),
        (loss(noise=lambda x0: torch.randn(x0[:1].shape).expand(x0.shape)), "all images got the same noise"),
        (loss(noise=seeded_noise), "the noise is the same in every call"),
        (loss(target="x0"), "with x0, but it is asked for the noise"),
        (loss(reduce=lambda d: d.square().sum()), "this is a sum"),
        (loss(reduce=lambda d: d.abs().mean()), "absolute error"),
        (loss(reduce=lambda d: d.square().mean().sqrt()), "leave out the root"),
        (loss(reduce=lambda d: d.square().mean((1, 2, 3))), "got shape (256,)"),
        (loss(reduce=lambda d: d.square().mean().item()), "without .item()"),
        (loss(reduce=lambda d: d.square().mean().detach()), "no gradient"),
        (loss(reduce=lambda d: d.square().mean() / 2), "the mean of (net(xt, t) - eps)²"),
    ],
    "training_loop": [
        (loop("lbs"), "zero_grad() was never called"),
        (loop_zero_once, "once only"),
        (loop("lbzs"), "came between backward and step"),
        (loop("lzsb"), "step came before backward"),
        (loop("lszb"), "step came before backward"),
        (loop("lzb"), "step() was never called"),
        (loop("lzs"), "backward() was never called"),
        (loop_keeps_graph, "append value.item()"),
        (loop_first_batch_only, "losses: expected shape (3,), got (1,)"),
        (loop("lzbslzbs"), "Hint"),
        (loss_unused, "RuntimeError"),
    ],
}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def cases(table): return [pytest.param(name, answer, id=f"{name}-{i}") for name, answers in table.items() for i, answer in enumerate(answers)]


@pytest.mark.parametrize("name, answer", cases(RIGHT))
def test_accepts_right_answers_however_written(name, answer):
    for _ in range(3): # every call draws other inputs
        result = getattr(check, name)(answer)
        assert result, result
        assert repr(result).startswith("correct: ") and "\n" not in repr(result)


@pytest.mark.parametrize("name, wrong", cases(WRONG))
def test_each_wrong_answer_gets_its_own_reason(name, wrong):
    answer, words = wrong
    for _ in range(3):
        result = getattr(check, name)(answer)
        assert not result and result.message.startswith("not yet: ") and "\n" not in result.message
        assert words in result.message, result


@pytest.mark.parametrize("name", NAMES)
def test_reasons_differ_between_mistakes(name):
    "The key words of one mistake are not in the reason for another."
    reasons = [(words, getattr(check, name)(answer).message) for answer, words in WRONG[name]]
    for words, _ in reasons:
        hits = {other for other, message in reasons if words in message}
        assert hits == {words} or words == "Hint" or words == "another answer each time", (words, hits)


def ellipsis(*args): ...
def raises(*args): raise NotImplementedError
def gives_ellipsis(*args): return ...

@pytest.mark.parametrize("stub", [ellipsis, raises, gives_ellipsis])
@pytest.mark.parametrize("name", NAMES)
def test_unsolved_stub_gets_a_friendly_line(name, stub):
    assert getattr(check, name)(stub).message == f"not yet: {check.UNSOLVED}"


def slip(*args):
    numbers = []
    return numbers[3]

@pytest.mark.parametrize("name", NAMES)
def test_error_in_the_answer_is_explained_in_one_line(name):
    message = getattr(check, name)(slip).message
    line = slip.__code__.co_firstlineno + 2
    assert message == f"not yet: your code raised IndexError: list index out of range (line {line}: return numbers[3])"


@pytest.mark.parametrize("value", [3, 2.5, "text", torch.ones(2), [1, 2], {}, object(), float("nan"), (None, None), np.zeros((2, 0)), 1j, 10**40])
@pytest.mark.parametrize("name", NAMES)
def test_any_value_is_judged_without_an_error(name, value):
    for answer in (value, lambda *args: value):
        result = getattr(check, name)(answer)
        assert not result and result.message.startswith("not yet: ") and len(result.message) < 400


@pytest.mark.parametrize("name", NAMES)
def test_wrong_number_of_arguments(name):
    message = getattr(check, name)(lambda: 1).message
    assert "TypeError" in message and "same arguments as the stub" in message


def test_error_inside_a_library_call_names_the_learners_line():
    def answer(x0, t, eps, schedule):
        return training.add_noise(x0, t + 1000, eps, schedule)
    message = check.add_noise(answer).message
    assert "ValueError" in message and f"line {answer.__code__.co_firstlineno + 1}: return training.add_noise" in message


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_untouched(name):
    def states(): return random.getstate(), [str(part) for part in np.random.get_state()], torch.random.get_rng_state().tolist()
    def careless(*args):
        random.seed(1); np.random.seed(1); torch.manual_seed(1)
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    for answer in (RIGHT[name][0], WRONG[name][0][0], slip, ellipsis, careless):
        before = states()
        getattr(check, name)(answer)
        assert states() == before


def test_inputs_are_fresh_and_cannot_be_spoiled():
    seen = []
    def spoil(xt, eps, ab):
        seen.append(xt.clone())
        xt.zero_(); eps.zero_()
        return xt
    check.x0_from_eps(spoil)
    n, first = len(seen), seen[0]
    result = check.x0_from_eps(spoil)
    assert not result and not torch.equal(first, seen[n]), "two checks drew the same inputs"
    assert check.add_noise(add_noise_in_place), "the truth saw inputs that the answer had overwritten"


def test_the_number_in_the_reason_is_computed():
    schedule = sampling.Schedule.linear()
    x0 = torch.zeros(1, 1, 1, 1)
    right = training.add_noise(x0, 1, x0 + 1, schedule)
    times = float(right / (1 - schedule.alpha_bar[1]))
    assert f"{times:.0f} times too small at t = 1" in check.add_noise(noisy(lambda ab: (ab**.5, 1 - ab))).message


def test_a_callable_object_and_a_partial_are_fine():
    class Answer:
        def __call__(self, xt, eps, ab): return (xt - (1 - ab).sqrt() * eps) / ab.sqrt()
    assert check.x0_from_eps(Answer()) and check.add_noise(partial(training.add_noise))


def test_result_shows_once_and_is_a_truth_value():
    result = check.alpha_bar(RIGHT["alpha_bar"][0])
    assert repr(result) == str(result) == result.message and bool(result) is result.ok is True
    assert bool(check.alpha_bar(ellipsis)) is False


def test_checkers_raise_what_is_not_the_learners_fault():
    "A mistake in a checker itself must not pass as a wrong answer; an interrupt must stop the cell."
    @check.checker
    def broken(answer): return 1 / 0
    with pytest.raises(ZeroDivisionError): broken(slip)
    def interrupted(*args): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): check.alpha_bar(interrupted)


@pytest.mark.parametrize("lesson", EXERCISES)
def test_lessons_use_every_checker(lesson):
    "Each exercise has a stub that ends with the check, and a folded solution that CI runs."
    code = ["".join(cell["source"]) for cell in json.loads((ROOT / "nbs" / f"{lesson}.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    if not any("check." in source for source in code): pytest.skip(f"{lesson} has no exercises yet")
    for name in EXERCISES[lesson]:
        assert any(source.splitlines()[-1].startswith(f"check.{name}(") for source in code), f"no stub for {name}"
        solutions = [source for source in code if f"assert check.{name}(" in source]
        assert solutions and all(source.startswith("#| code-fold: true") for source in solutions), f"no folded solution for {name}"
