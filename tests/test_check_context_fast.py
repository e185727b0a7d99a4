"The checkers of lessons 3 and 4: right answers written in other ways are accepted, each wrong one is refused for its own reason."
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diffusion_course import check_context, check_fast, context, fast_sampling, sampling

ROOT = Path(__file__).parents[1]
EXERCISES = {
    ("L3_Context", check_context): ["one_hot", "drop_context", "guided", "clipped_pair", "guided_sampler"],
    ("L4_FastSampling", check_fast): ["ddim_step", "sigma", "noisy_step", "look_ahead", "fast_sampler"],
}
CHECKERS = {name: getattr(module, name) for (_, module), names in EXERCISES.items() for name in names}


# --- lesson 3 ---

def guided_walk(ask, c, scale, xT, S, noise, w=lambda s: s, none=lambda c: c * 0, flip=False, noisy=True, start=None):
    x = xT.clone()
    for t in reversed(range(1, (start or S.T) + 1)):
        a, b = ask(x, t, c), ask(x, t, none(c))
        if flip: a, b = b, a
        mean, var = sampling.posterior(w(scale) * a + (1 - w(scale)) * b, x, t, t - 1, S)
        x = mean + math.sqrt(var) * noise(x) * noisy
    return x

def guided_library(ask, c, scale, xT, S, noise):
    def predict(c): return lambda xt, t: sampling.prediction_from_x0(ask(xt, t, c), xt, t, S)
    *_, step = sampling.ddpm(context.guided(predict(c), predict(c * 0), scale), xT, S, noise=noise)
    return step.xs

def eps_of(x0, xt, ab): return (xt - ab**0.5 * x0) / (1 - ab)**0.5
def overwritten(c, u, p):
    c[u < p] = 0
    return c

RIGHT = {
    "one_hot": [lambda l, n: F.one_hot(l, n).float(), lambda l, n: (l[:, None] == torch.arange(n)).double(), lambda l, n: context.one_hot(l, range(n))],
    "drop_context": [lambda c, u, p: c * (u >= p).float().unsqueeze(1), lambda c, u, p: c.masked_fill(u.lt(p)[:, None], 0.0), lambda c, u, p: (c.T * ~(u < p)).T],
    "guided": [lambda c, u, s: s * c + (1 - s) * u, lambda c, u, s: c + (s - 1) * (c - u), lambda c, u, s: torch.lerp(u, c, s)],
    "clipped_pair": [lambda x, xt, ab: (x.clip(-1, 1), eps_of(x.clip(-1, 1), xt, ab.item())), lambda x, xt, ab: [F.hardtanh(x), eps_of(F.hardtanh(x), xt, ab).numpy()]],
    "guided_sampler": [guided_walk, guided_library],
}
WRONG = {
    "one_hot": {"dtype": lambda l, n: F.one_hot(l, n), "column of its own": lambda l, n: 1.0 * l, "as a column": lambda l, n: l.view(-1, 1).float(), "changed places: one row": lambda l, n: torch.eye(n)[:, l],
                "too far right": lambda l, n: torch.eye(n)[(l - 1) % n].roll(2, 1), "0 and 1": lambda l, n: 1 - torch.eye(n)[l], "whole row": lambda l, n: l[:, None].float().repeat(1, n)},
    "drop_context": {"coin of its first row": lambda c, u, p: c * 0 if u[0] < p else c * 1, "dropped the others": lambda c, u, p: c * (u < p)[:, None], "nn.Dropout": lambda c, u, p: c * (u >= p)[:, None] / (1 - p),
                     "became -1": lambda c, u, p: torch.where((u < p)[:, None], -torch.ones_like(c), c), "equal shares": lambda c, u, p: torch.where((u < p)[:, None], torch.full_like(c, 0.2), c),
                     "fewer contexts": lambda c, u, p: c[~(u < p)], "multiplied by u": lambda c, u, p: (c.T * u).T, "nothing is dropped": lambda c, u, p: c.clone(), "overwrote": overwritten},
    "guided": {"Ho and Salimans": lambda c, u, s: (1 + s) * c - s * u, "changed places": lambda c, u, s: s * u + (1 - s) * c, "difference alone": lambda c, u, s: s * c - s * u, "only makes it larger": lambda c, u, s: s * c,
               "added, not subtracted": lambda c, u, s: u + s * (c + u), "no effect beyond 1": lambda c, u, s: u + min(s, 1) * (c - u), "clipped": lambda c, u, s: (u + s * (c - u)).clamp(-1, 1)},
    "clipped_pair": {"still belongs to the old": lambda x, xt, ab: (x.clamp(-1, 1), eps_of(x, xt, ab)), "eps was clipped": lambda x, xt, ab: (x.clamp(-1, 1), eps_of(x.clamp(-1, 1), xt, ab).clamp(-1, 1)),
                     "xt was clipped": lambda x, xt, ab: (x.clamp(-1, 1), eps_of(x.clamp(-1, 1), xt.clamp(-1, 1), ab)), "squeezed": lambda x, xt, ab: (x / x.abs().max(), eps_of(x / x.abs().max(), xt, ab)),
                     "nothing was clipped": lambda x, xt, ab: (x, eps_of(x, xt, ab)), "0 … 1": lambda x, xt, ab: (x.clamp(0, 1), eps_of(x.clamp(0, 1), xt, ab)),
                     "roots are missing": lambda x, xt, ab: (x.clamp(-1, 1), (xt - ab * x.clamp(-1, 1)) / (1 - ab)), "expected 2 values": lambda x, xt, ab: x.clamp(-1, 1)},
    "guided_sampler": {"there is no guidance": lambda a, c, s, *rest: guided_walk(a, c, 1.0, *rest), "Ho and Salimans": lambda *args: guided_walk(*args, w=lambda s: s + 1), "flee": lambda *args: guided_walk(*args, flip=True),
                       "difference is zero": lambda a, c, s, *rest: guided_walk(a, c, s, *rest, none=lambda c: c), "all classes at once": lambda *args: guided_walk(*args, none=torch.ones_like),
                       "no noise": lambda *args: guided_walk(*args, noisy=False), "started at T - 1": lambda a, c, s, x, S, n: guided_walk(a, c, s, x, S, n, start=S.T - 1)},
}


# --- lesson 4 ---

def x0_of(xt, eps, ab): return (xt - (1 - ab)**0.5 * eps) / ab**0.5
def ddim_step(xt, eps, ab_t, ab_s): return ab_s**0.5 * x0_of(xt, eps, ab_t) + (1 - ab_s)**0.5 * eps
def in_sigmas(xt, eps, ab_t, ab_s): # as an Euler step for x / sqrt(alpha_bar) in sigma
    sigma_t, sigma_s = ((1 - ab) / ab for ab in (ab_t, ab_s))
    return ab_s.sqrt() * (xt / ab_t.sqrt() + (sigma_s.sqrt() - sigma_t.sqrt()) * eps)

def walk(predict, xT, S, n, pairs=None, stale=False, step=None):
    x = xT
    for t, s in list(pairwise(S.timesteps(n))) if pairs is None else pairs:
        pred = predict(xT if stale else x, t)
        x = step(pred, x, t, s) if step else S.alpha_bar[s].item()**0.5 * pred.x0 + (1 - S.alpha_bar[s].item())**0.5 * pred.eps
    return x

def library_walk(predict, xT, S, n):
    *_, step = fast_sampling.ddim(predict, xT, S, S.timesteps(n))
    return step.xs.numpy()

def strided(S, n): return [(t, t - S.T // n) for t in range(S.T, 0, -(S.T // n))]

RIGHT |= {
    "ddim_step": [ddim_step, in_sigmas],
    "sigma": [lambda t, s, eta: eta * ((1 - s) / (1 - t))**0.5 * (1 - t / s)**0.5, lambda t, s, eta: float(eta * ((1 - s) * (s - t) / (s * (1 - t)))**0.5)],
    "noisy_step": [lambda x, e, z, ab, s: ab**0.5 * x + (1 - ab - s * s)**0.5 * e + z * s],
    "look_ahead": [lambda x, b, h, hb: (1 + h / hb / 2) * x - h / hb / 2 * b],
    "fast_sampler": [walk, library_walk],
}
WRONG |= {
    "ddim_step": {"this is the predicted x0": lambda xt, e, t, s: x0_of(xt, e, t), "without its noise": lambda xt, e, t, s: s**0.5 * x0_of(xt, e, t), "where you come from": lambda xt, e, t, s: s**0.5 * x0_of(xt, e, t) + (1 - t)**0.5 * e,
                  "roots are missing": lambda xt, e, t, s: s * (xt - (1 - t) * e) / t + (1 - s) * e, "changed places": lambda xt, e, t, s: ddim_step(xt, e, s, t), "not shrunk": lambda xt, e, t, s: x0_of(xt, e, t) + (1 - s)**0.5 * e,
                  "posterior": lambda xt, e, t, s: (s**0.5 * (1 - t / s) * x0_of(xt, e, t) + (t / s)**0.5 * (1 - s) * xt) / (1 - t), "clipped here": lambda xt, e, t, s: s**0.5 * x0_of(xt, e, t).clamp(-1, 1) + (1 - s)**0.5 * e},
    "sigma": {"this is the variance": lambda t, s, eta: eta**2 * (1 - s) / (1 - t) * (1 - t / s), "roots are missing": lambda t, s, eta: eta * (1 - s) / (1 - t) * (1 - t / s), "went under the root": lambda t, s, eta: (eta * (1 - s) / (1 - t) * (1 - t / s))**0.5,
              "no effect": lambda t, s, eta: ((1 - s) / (1 - t) * (1 - t / s))**0.5, "sigma-hat": lambda t, s, eta: eta * (1 - t / s)**0.5, "second factor": lambda t, s, eta: eta * ((1 - s) / (1 - t))**0.5,
              "upside down": lambda t, s, eta: eta * ((1 - t) / (1 - s) * (1 - t / s))**0.5, "has no root": lambda t, s, eta: eta * ((1 - s) / (1 - t))**0.5 * (1 - t / s)},
    "noisy_step": {"on top": lambda x, e, z, ab, s: ab**0.5 * x + (1 - ab)**0.5 * e + s * z, "standard deviations do not": lambda x, e, z, ab, s: ab**0.5 * x + ((1 - ab)**0.5 - s) * e + s * z, "its square": lambda x, e, z, ab, s: ab**0.5 * x + (1 - ab - s).clamp(min=0)**0.5 * e + s * z,
                   "fresh noise is missing": lambda x, e, z, ab, s: ab**0.5 * x + (1 - ab - s**2)**0.5 * e, "full strength": lambda x, e, z, ab, s: ab**0.5 * x + (1 - ab - s**2)**0.5 * e + z,
                   "each other": lambda x, e, z, ab, s: ab**0.5 * x + (1 - ab - s**2)**0.5 * z + s * e, "where its root belongs": lambda x, e, z, ab, s: ab * x + (1 - ab - s**2)**0.5 * e + s * z},
    "look_ahead": {"half as far": lambda x, b, h, hb: x + h / hb * (x - b), "upside down": lambda x, b, h, hb: x + hb / h / 2 * (x - b), "looks back": lambda x, b, h, hb: x - h / hb / 2 * (x - b), "lies behind": lambda x, b, h, hb: (x + b) / 2,
                   "equally long": lambda x, b, h, hb: 1.5 * x - 0.5 * b, "start at the new": lambda x, b, h, hb: b + h / hb / 2 * (x - b), "first order": lambda x, b, h, hb: x},
    "fast_sampler": {"wraps": lambda p, x, S, n: walk(p, x, S, n, strided(S, n)), "more steps than n": lambda p, x, S, n: walk(p, x, S, n, [(t, max(s, 0)) for t, s in strided(S, n)]), "last step": lambda p, x, S, n: walk(p, x, S, n, list(pairwise(S.timesteps(n)))[:-1]),
                     "all T steps": lambda p, x, S, n: walk(p, x, S, S.T), "one time back": lambda p, x, S, n: walk(p, x, S, n, [(t, t - 1) for t in S.timesteps(n)[:-1]]), "asked about xT": lambda p, x, S, n: walk(p, x, S, n, stale=True),
                     "that of time t": lambda p, x, S, n: walk(p, x, S, n, step=lambda pred, x, t, s: S.alpha_bar[s].item()**0.5 * pred.x0 + (1 - S.alpha_bar[t].item())**0.5 * pred.eps),
                     "DDPM without": lambda p, x, S, n: walk(p, x, S, n, step=lambda pred, x, t, s: sampling.posterior(pred.x0, x, t, s, S)[0]),
                     "roots are missing": lambda p, x, S, n: walk(p, x, S, n, step=lambda pred, x, t, s: S.alpha_bar[s].item() * pred.x0 + (1 - S.alpha_bar[s].item()) * pred.eps)},
}


def cases(table): return [pytest.param(name, answer, id=f"{name}: {key}") for name, answers in table.items() for key, answer in (answers.items() if isinstance(answers, dict) else enumerate(answers))]

@pytest.mark.parametrize("name, answer", cases(RIGHT))
def test_right_answers(name, answer):
    for _ in range(2): assert CHECKERS[name](answer), CHECKERS[name](answer)

@pytest.mark.parametrize("name, words, answer", [pytest.param(name, words, answer, id=f"{name}: {words}") for name, answers in WRONG.items() for words, answer in answers.items()])
def test_wrong_answers(name, words, answer):
    result = CHECKERS[name](answer)
    assert not result and words in result.message, result.message

@pytest.mark.parametrize("name", CHECKERS)
def test_every_checker_has_its_table(name):
    assert len(RIGHT[name]) >= 1 and len(WRONG[name]) >= 7
    stub = CHECKERS[name](lambda *args: None)
    assert not stub and "nothing came back" in stub.message

@pytest.mark.parametrize("lesson, module", EXERCISES, ids=lambda x: getattr(x, "__name__", x))
def test_the_lesson_holds_stubs_and_solutions(lesson, module):
    cells = ["".join(c["source"]) for c in json.loads((ROOT / "nbs" / f"{lesson}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    for name in EXERCISES[lesson, module]:
        assert any(cell.rstrip().endswith(f"check.{name}(my_{name})") for cell in cells), f"no stub of {name}"
        assert any(f"assert check.{name}(solved_{name})" in cell for cell in cells), f"no solution of {name}"
