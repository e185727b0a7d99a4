"""Flow matching beside diffusion: the same network, optimiser, batches and seconds; only schedule, kind of prediction, times and pairs differ
(and the average of the weights, 0.995 for noise prediction and 0.99 for the others: the best found for each).

    OMP_NUM_THREADS=1 python benchmarks/flow.py          writes results/flow.md and .json; an hour of one core

Six recipes with three seeds each, 1,575 steps of 32 sprites: two minutes of one core here. Each model is sampled by DDIM and by DPM-Solver++(2M) with and
without fresh noise; for each number of calls a recipe has the sampler with the lowest mean KID on these samples. The difference from v on the cosine schedule is taken seed by
seed, and its error is over the seeds. All start from the same noise and are compared with the same held-out sprites.

Models and verdicts are kept in build/flow, so that an interrupted run goes on; when all is written they move to build/flow.done. `--seeds` trains and judges
only these, so that several processes can share the work.
"""
import argparse
import json
import shutil
import statistics
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from diffusion_course.context import one_hot, with_dropped_context
from diffusion_course.fast_sampling import ddim, dpmpp_2m
from diffusion_course.flow_matching import coupled_noise
from diffusion_course.metrics import class_accuracy, features, kid
from diffusion_course.muon import muon
from diffusion_course.precision import fast
from diffusion_course.sampling import Schedule, clipped, predictor, sample
from diffusion_course.sprites import Sprites
from diffusion_course.training import fresh_noise, middle_times, prediction_loss, train, uniform_times
from diffusion_course.unet import ContextUnet
from machine import RESULTS, machine

MODELS = Path(__file__).parents[1] / "build" / "flow"
COSINE, FLOW = Schedule.cosine(), Schedule.flow()
RECIPES = { # kind of prediction, schedule, times, noise, average
    "v, cosine, middle times": ("v", COSINE, middle_times, fresh_noise, 0.99),
    "eps, cosine, middle times": ("eps", COSINE, middle_times, fresh_noise, 0.995),
    "v, cosine, uniform times": ("v", COSINE, uniform_times, fresh_noise, 0.99),
    "u, flow, uniform times": ("u", FLOW, uniform_times, fresh_noise, 0.99),
    "u, flow, logit-normal times": ("u", FLOW, middle_times, fresh_noise, 0.99),
    "u, flow, uniform, assigned pairs": ("u", FLOW, uniform_times, coupled_noise, 0.99)}
SAMPLERS = {"DDIM": ddim, "2M": dpmpp_2m, "2M with fresh noise": partial(dpmpp_2m, eta=1.0)}
CALLS = {"DDIM": (1, 2, 4, 8, 5, 10, 20), "2M": (5, 10, 20, 50), "2M with fresh noise": (5, 10, 20, 50)}
FEW, MANY = (1, 2, 4, 8), (5, 10, 20, 50)
BASE, STEPS = "v, cosine, middle times", 1575


def file_of(name, seed): return MODELS / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"


def trained(name, seed, data):
    "Train and keep, or nothing where it is there already."
    path = file_of(name, seed)
    if path.exists(): return
    kind, schedule, times, noise, average = RECIPES[name]
    torch.manual_seed(seed)
    loss = with_dropped_context(partial(prediction_loss, times=times, noise=noise))
    for step in train(ContextUnet(n_feat=24, predicts=kind), data(), schedule, steps=STEPS, batch_size=32, ema=average, optimizer=muon, loss=loss,
                      seed=seed, device="cpu"): pass
    weights = {k: v.contiguous() for k, v in step.ema.state_dict().items()}
    safetensors.torch.save_file(weights, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    print(path.name, flush=True)


def judged(name, seed, real, n):
    "KID and class accuracy for each sampler and number of calls; kept beside the model, and not measured again."
    path = file_of(name, seed)
    kept = path.with_suffix(f".{n}.json")
    if kept.exists(): return json.loads(kept.read_text())
    kind, schedule, *_ = RECIPES[name]
    net = ContextUnet(n_feat=24, predicts=kind)
    net.load_state_dict(safetensors.torch.load_file(path))
    labels = torch.arange(n) % 5
    predict = clipped(predictor(fast(net.eval()), schedule, one_hot(labels)), schedule)
    found = []
    for sampler, calls in CALLS.items():
        for steps in calls:
            images = sample(predict, schedule, n, sampler=SAMPLERS[sampler], steps=steps, seed=1, batch_size=100)
            found.append(dict(sampler=sampler, calls=steps, kid=kid(features(images), real)[0], class_accuracy=class_accuracy(images, labels)))
    kept.write_text(json.dumps(found))
    print(kept.name, flush=True)
    return found


def best(verdicts, calls, samplers):
    "The sampler with the lowest mean KID over the seeds, and its KIDs and accuracies."
    def of(sampler): return [next(row for row in rows if (row["sampler"], row["calls"]) == (sampler, calls)) for rows in verdicts]
    return min((of(sampler) for sampler in samplers if calls in CALLS[sampler]), key=lambda rows: statistics.mean(row["kid"] for row in rows))


def summed_up(verdicts, calls, samplers):
    "(table, differences from BASE): a list over the calls for each recipe."
    chosen = {name: [best(rows, k, samplers) for k in calls] for name, rows in verdicts.items()}
    table = {name: [dict(sampler=rows[0]["sampler"], kid=statistics.median(r["kid"] for r in rows), kids=[r["kid"] for r in rows],
                         class_accuracy=statistics.median(r["class_accuracy"] for r in rows)) for rows in columns] for name, columns in chosen.items()}
    def difference(rows, base):
        off = [a["kid"] - b["kid"] for a, b in zip(rows, base)]
        return statistics.mean(off), statistics.stdev(off) / len(off) ** 0.5
    return table, {name: [difference(*pair) for pair in zip(columns, chosen[BASE])] for name, columns in chosen.items() if name != BASE}


def lines_of(title, calls, table, differences):
    yield from ["", f"## {title}", "", "| recipe | " + " | ".join(f"{k} call{'s' * (k > 1)}" for k in calls) + " |", "|---|" + "---|" * len(calls)]
    for name, row in table.items():
        cells = (f"{c['kid']:.3f} ({min(c['kids']):.3f} … {max(c['kids']):.3f}), {c['class_accuracy']:.0%}, {c['sampler']}" for c in row)
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield from ["", f"Difference of the KID from *{BASE}*, seed by seed, with its standard error:", "", "| recipe | " + " | ".join(map(str, calls)) + " |",
                "|---|" + "---|" * len(calls)]
    for name, row in differences.items():
        yield f"| {name} | " + " | ".join(f"{mean:+.3f} ± {error:.3f}" for mean, error in row) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400, help="samples judged for each model, sampler and number of calls")
    parser.add_argument("--seeds", type=int, nargs="+", help="train and judge these only, and write nothing")
    args = parser.parse_args()
    MODELS.mkdir(parents=True, exist_ok=True)
    def data(): return Sprites.draw(20_000)
    real, more = (features(Sprites.draw(2000, seed=seed, split="heldout").batch(range(2000))[0]) for seed in (1, 2))
    verdicts = {name: [] for name in RECIPES}
    for seed in args.seeds or range(3):
        for name in RECIPES:
            trained(name, seed, data)
            verdicts[name].append(judged(name, seed, real, args.samples))
    if args.seeds: return
    table, differences = summed_up(verdicts, MANY, tuple(SAMPLERS))
    still, still_differences = summed_up(verdicts, MANY, ("DDIM", "2M"))
    few, few_differences = summed_up(verdicts, FEW, ("DDIM",))
    floor = kid(more, real)
    (RESULTS / "flow.json").write_text(json.dumps(dict(machine=machine(), samples=args.samples, floor=floor, calls=MANY, table=table, differences=differences, still=still, still_differences=still_differences,
                                                       few_calls=FEW, few=few, few_differences=few_differences), indent=1))
    text = ["# Flow matching beside diffusion", "",
            f"{machine()}; one thread. {STEPS:,} steps of 32 sprites, three seeds; median over the seeds of the KID (lower is better; lowest and highest in brackets) of "
            f"{args.samples} samples, x0 clipped, median class accuracy, and the sampler (the best of three on these samples). The average of the weights is 0.995 for noise prediction and 0.99 for the others. Real against real: {floor[0]:.4f} ± {floor[1]:.4f}. Repeat with:", "",
            f"    OMP_NUM_THREADS=1 python benchmarks/flow.py --samples {args.samples}",
            *lines_of("The best of three samplers", MANY, table, differences),
            *lines_of("The best without fresh noise", MANY, still, still_differences), *lines_of("Very few calls: DDIM", FEW, few, few_differences)]
    (RESULTS / "flow.md").write_text("\n".join(text) + "\n")
    done = MODELS.with_suffix(".done")
    shutil.rmtree(done, ignore_errors=True)
    MODELS.rename(done)


if __name__ == "__main__": main()
