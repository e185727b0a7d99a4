"""How good are one, two and four network calls? The shipped network that jumps beside the solvers of its teacher, by two judges.

    python benchmarks/few_steps.py            writes results/few_steps.md and .json; about an hour of two cores
    python benchmarks/few_steps.py --trials   the trials alone, again

Every row draws 2,000 sprites from the same noises and classes; errors of differences are paired. The second judge has another architecture (5x5 kernels,
group norm, pooling by the maximum, 96 features), another seed and other pictures (none of the reference is among them). No judge was used in any training. Coverage is of 2,000 held-out sprites.
The trials are short trainings from the shipped sprites, one seed each, 500 sprites: they show large differences only.
Verdicts are kept in build/few_steps, so that an interrupted run goes on; remove that folder for a new one.
"""
import argparse
import copy
import hashlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_course import judge as judging
from diffusion_course.checkpoints import pretrained, pretrained_file
from diffusion_course.context import drop_context, guided, one_hot
from diffusion_course.fast_sampling import ddim, dpmpp_2m, heun
from diffusion_course.few_steps import consistency_loss, jumps, match, store_walks, walk_loss
from diffusion_course.metrics import FeatureNet, class_accuracy, coverage, features, kid, kid_difference
from diffusion_course.precision import fast
from diffusion_course.sampling import clipped, ddpm, predictor, sample
from diffusion_course.sprites import Sprites
from diffusion_course.training import train
from machine import RESULTS, in_turns, machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from pretrain import guided_by

KEPT = Path(__file__).parents[1] / "build" / "few_steps"
N = 2000
SDE = partial(dpmpp_2m, eta=1.0)


class SecondJudge(FeatureNet):
    "No relative of the shipped judge: other kernels, norm, non-linearity, pooling and width."
    def __init__(self):
        super().__init__(widths=(24, 32, 48, 96))
        def block(a, b, k): return nn.Conv2d(a, b, k, padding=k // 2), nn.GroupNorm(4, b), nn.GELU()
        self.body = nn.Sequential(*block(3, 32, 5), nn.MaxPool2d(2), *block(32, 64, 3), nn.MaxPool2d(2), *block(64, 96, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten())


def second_judge(seed=17):
    data = Sprites.draw(8000, seed=11, split="heldout")
    reference = {image.tobytes() for image in Sprites.draw(2 * N, seed=1, split="heldout").images}
    fitted, unseen = (np.array([i for i in part if data.images[i].tobytes() not in reference]) for part in judging.halves(data))
    torch.manual_seed(seed)
    net, g = SecondJudge(), torch.Generator().manual_seed(seed)
    judging._learn(net, data, fitted, data.class_names, 1500, g, lr=2e-3)
    net.eval().requires_grad_(False)
    judging._standardise(net, data)
    return net, judging._accuracy(net, data, unseen, data.class_names, g)


def kept(name, make):
    "What `make` gives, from an earlier run with the same shipped models if there was one."
    models = "".join(hashlib.sha256(pretrained_file(model).read_bytes()).hexdigest()[:4] for model in ("sprites", "sprites-fast"))
    path = KEPT / models / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    return torch.load(path, weights_only=False)


def rows():
    "table -> calls -> how to draw: (network, sampler, steps, guidance)."
    return {"DDPM": {500: ("sprites", ddpm, 500, 1.0)},
            "2M, no fresh noise": {n: ("sprites", dpmpp_2m, n, 1.0) for n in (2, 4, 5, 7, 10, 16)},
            "2M, fresh noise": {n: ("sprites", SDE, n, 1.0) for n in (5, 7, 10, 20)},
            "the teacher: 2M, guidance 1.5": {2 * n: ("sprites", dpmpp_2m, n, 1.5) for n in (4, 8, 16)},
            "the teacher: 2M, fresh noise, guidance 1.5": {2 * n: ("sprites", SDE, n, 1.5) for n in (4, 8, 16)},
            "jumps": {n: ("sprites-fast", jumps, n, 1.0) for n in (1, 2, 3, 4, 8, 16)},
            "the same network, DDIM": {n: ("sprites-fast", ddim, n, 1.0) for n in (2, 3, 4, 8, 16)},
            "the same network, Heun": {2 * n - 1: ("sprites-fast", heun, n, 1.0) for n in (2, 3, 4)},
            "the same network, jumps, guidance 2": {2 * n: ("sprites-fast", jumps, n, 2.0) for n in (1, 2, 4)}}


def draw(model, sampler, steps, guidance, n=N):
    net, schedule = pretrained(model) if isinstance(model, str) else model
    context, net = one_hot(torch.arange(n) % 5), fast(net)
    predict = predictor(net, schedule, context)
    if guidance != 1: predict = guided(predict, predictor(net, schedule), guidance)
    return sample(clipped(predict, schedule), schedule, n, sampler=sampler, steps=steps, seed=1)


def speed():
    "64 sprites in two calls and in 500: seconds, medians of five."
    jobs = {"two_calls": partial(draw, pretrained("sprites-fast"), jumps, 2, 1.0, n=64), "ddpm": partial(draw, pretrained("sprites"), ddpm, 500, 1.0, n=64)}
    found = in_turns(jobs, rounds=5, warm_up=1)
    return found | {"ratio": found["ddpm"] / found["two_calls"]}


# --- trials ------------------------------------------------------------------------------------------------------------

def after(loop):
    for step in loop: pass
    return step.ema


def trials():
    "name -> calls -> (KID, error), class accuracy, coverage by jumps and by DDIM."
    net, schedule = pretrained("sprites")
    def student(): return copy.deepcopy(net).requires_grad_(True)
    def stored(scale, seed): return store_walks(guided_by(net, schedule, scale), drop_context(one_hot(torch.arange(4000) % 5), 0.1, torch.Generator().manual_seed(0)), schedule, seed=seed)
    def learnt(walks, error, steps=800): return after(train(student(), walks, schedule, steps=steps, batch_size=64, lr=1.2e-3, ema=0.99, loss=partial(walk_loss, ts=walks.ts, error=error)))
    def agreed():
        tuned, data = student(), Sprites.draw(20_000, seed=0)
        for gap in (64, 32, 16, 8): tuned = after(train(tuned.requires_grad_(True), data, schedule, steps=150, batch_size=64, lr=5e-4, ema=0.99, seed=gap, loss=partial(consistency_loss, gap=gap)))
        return tuned
    plain, led = (kept(f"walks-{scale}", partial(stored, scale, 7)) for scale in (1.0, 1.5))
    rounded = partial(F.smooth_l1_loss, beta=0.015)
    def matching(start, steps=150, **kw):
        return after(match(copy.deepcopy(start).requires_grad_(True), guided_by(net, schedule, kw.pop("scale", 1.5)), led, schedule, fake=student(), steps=steps, **kw))
    based = lambda: kept("student-absolute", lambda: learnt(led, rounded))
    def longer(steps=900): # what 150 steps of matching cost
        return after(train(copy.deepcopy(based()).requires_grad_(True), led, schedule, steps=steps, batch_size=64, lr=1.2e-3, ema=0.99, seed=1, loss=partial(walk_loss, ts=led.ts, error=rounded)))
    recipes = {"ends of guided walks, absolute error": based,
               "the same, squared error": lambda: learnt(led, F.mse_loss),
               "ends of walks without guidance": lambda: learnt(plain, rounded),
               "agrees with itself, gaps 64 to 8, 600 steps": agreed,
               "guided walks, then matched": lambda: matching(based()),
               "the same, teacher without guidance": lambda: matching(based(), scale=1.0),
               "the same, nothing held": lambda: matching(based(), hold=0.0),
               "the same, one turn of the fake network": lambda: matching(based(), turns=1),
               "the same, as long again on the ends": longer,
               "matched from the start, and held on walks": lambda: matching(net),
               "agrees with itself, then matched": lambda: matching(kept("student-agreed", agreed))}
    real, found, labels = features(Sprites.draw(2000, seed=1, split="heldout").batch(range(2000))[0]), {}, torch.arange(500) % 5
    for name, make in recipes.items():
        trained = kept(f"trial {name}", make)
        found[name] = {}
        for calls, sampler in ((1, jumps), (2, jumps), (4, jumps), (2, ddim), (4, ddim)):
            x = draw((trained, schedule), sampler, calls, 1.0, n=500)
            found[name][f"{calls} {sampler.__name__}"] = dict(kid=kid(features(x), real), accuracy=class_accuracy(x, labels), coverage=coverage(features(x), real[:500]))
        print(name, {key: round(row["kid"][0], 3) for key, row in found[name].items()}, flush=True)
    return found


# --- the tables --------------------------------------------------------------------------------------------------------

def verdicts(judge, drawn, real):
    labels, seen = torch.arange(N) % 5, {}
    for table, calls in drawn.items():
        for n, x in calls.items(): seen[table, n] = features(x, judge=judge)
    reference, alike = features(real, judge=judge), seen["DDPM", 500]
    found = {}
    for (table, n), a in seen.items():
        found.setdefault(table, {})[n] = dict(kid=kid(a, reference), difference=kid_difference(a, alike, reference), coverage=coverage(a, reference),
                                              accuracy=class_accuracy(drawn[table][n], labels, judge=judge))
    return found


def as_table(found, floor):
    lines = ["| | network calls | KID | minus that of DDPM in 500 calls (paired) | class accuracy | coverage |", "|---|---|---|---|---|---|"]
    for table, calls in found.items():
        for n, row in calls.items():
            (mean, error), (d, e) = row["kid"], row["difference"]
            lines.append(f"| {table} | {n} | {mean:.3f} ± {error:.3f} | {d:+.3f} ± {e:.3f} | {row['accuracy']:.1%} | {row['coverage']:.3f} |")
    return "\n".join([*lines, f"| other real sprites | | {floor['kid'][0]:.4f} ± {floor['kid'][1]:.4f} | | {floor['accuracy']:.1%} | {floor['coverage']:.3f} |"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", action="store_true", help="the trials alone")
    args = parser.parse_args()
    tried = trials()
    written = RESULTS / "few_steps.json"
    if args.trials: found = json.loads(written.read_text()) | {"trials": tried}
    else:
        drawn = {table: {n: kept(f"{table} {n}", partial(draw, *how)) for n, how in calls.items()} for table, calls in rows().items()}
        held = Sprites.draw(2 * N, seed=1, split="heldout")
        (real, _), (more, context) = held.batch(range(N)), held.batch(range(N, 2 * N))
        other, accuracy = second_judge()
        found = {"machine": machine(), "second judge accuracy": accuracy}
        for name, judge in (("shipped judge", None), ("second judge", other)):
            a, b = features(real, judge=judge), features(more, judge=judge)
            found[name] = verdicts(judge, drawn, real)
            found[f"{name}, floor"] = dict(kid=kid(b, a), coverage=coverage(b, a), accuracy=class_accuracy(more, context.argmax(1), judge=judge))
        found |= {"speed": speed(), "trials": tried}
    written.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "few_steps.md").write_text(report(json.loads(written.read_text())))


def report(found):
    trial = ["| trial | 1 call | 2 calls | 4 calls | 2 calls, DDIM | 4 calls, DDIM |", "|---|---|---|---|---|---|"]
    for name, calls in found["trials"].items():
        trial.append(f"| {name} | " + " | ".join(f"{row['kid'][0]:.3f} ± {row['kid'][1]:.3f}, {row['accuracy']:.1%}, {row['coverage']:.2f}" for row in calls.values()) + " |")
    few, many, ratio = found["speed"].values()
    return f"""# Few network calls

{found["machine"]}. {N:,} sprites in each row, all from the same noises, x0 clipped; the reference are {N:,} held-out sprites. Repeat with:

    python benchmarks/few_steps.py

**Speed:** 64 sprites take {1000 * few:.0f} ms in two calls and {many:.1f} s in 500 calls of DDPM: **{ratio:.0f} times** as long (medians of five, in turn).

## By the shipped judge

{as_table(found["shipped judge"], found["shipped judge, floor"])}

## By a second judge

Another architecture, seed and other pictures; right about {found["second judge accuracy"]:.1%} of unseen sprites. Its KID has another scale, so only the order can be compared.

{as_table(found["second judge"], found["second judge, floor"])}

## Trials

Short trainings from the shipped sprites, one seed each: 4,000 walks and 800 steps of 64 on their ends (about two minutes of two cores); matching is 150 steps (about two). KID ± error, class accuracy and coverage of 500 sprites.

{chr(10).join(trial)}
"""


if __name__ == "__main__": main()
