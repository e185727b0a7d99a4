"""How good, and how fast? Our samplers beside each other, and those of three other libraries around the same network.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py          writes results/sampling.md, .json and .png; about an hour

(1) Quality over network calls: the shipped model under each sampler. All start from the same noise and are compared with the same real sprites, so each row also
has the difference from DDPM in all 500 calls with its paired error, and says whether it is as good within a margin that was fixed before.
(2) The same weights under other libraries' samplers, each at its best valid setting.
(3) Speed of the samplers: one network, 64 sprites in 20 calls; what a sampler adds to its network calls.
(4) Our own speed in float32 and bfloat16, on one thread and two, with the paired difference in quality.

Each part is kept in build/ as soon as it is measured, so that an interrupted run goes on; when all are measured, they are removed, and the next run begins
anew. `--until PART` stops there: the parts with speeds come first and want an idle machine, the others do not.
"""
import argparse
import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

import peers
from diffusion_course.checkpoints import pretrained
from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import ddim, dpmpp_2m, heun
from diffusion_course.metrics import class_accuracy, features, kid, kid_difference
from diffusion_course.plots import quality_curve
from diffusion_course.precision import PRECISIONS, fast
from diffusion_course.sampling import Step, clipped, ddpm, initial_noise, per_sample_noise, predictor, sample
from diffusion_course.sprites import Sprites
from machine import RESULTS, in_turns, machine

MARGIN = 0.03 # of KID: two rows whose difference is surely smaller count as equally good
CALLS = (5, 10, 20, 50)
BUILD = Path(__file__).parents[1] / "build"
SEEDS = (1, 2, 3) # of the noise
MEMORY = """
import resource

from diffusion_course.checkpoints import pretrained
from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import ddim
from diffusion_course.sampling import clipped, predictor, sample
net, schedule = pretrained("sprites")
sample(clipped(predictor(net, schedule, one_hot("hero")), schedule), schedule, 64, sampler=ddim, steps=20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def extrapolated(predict, xT, schedule, ts=None, *, gam=2.0, noise=None):
    """DDIM whose noise is extrapolated from the last two answers: gam eps - (gam - 1) eps_before. 1 is DDIM, 1.5 the midpoint (Adams-Bashforth)
    for equal steps, 2 the accelerated sampler of smalldiffusion."""
    xt, before = xT, None
    for i, (t, s) in enumerate(zip(ts, ts[1:])):
        pred = predict(xt, t)
        eps = pred.eps if before is None else gam * pred.eps - (gam - 1) * before
        before = pred.eps
        # x / sqrt(alpha_bar) moves along eps by the change of sigma
        scaled = xt / schedule.alpha_bar[t].sqrt().float() + (schedule.sigma[s] - schedule.sigma[t]).float() * eps
        xs = scaled * schedule.alpha_bar[s].sqrt().float()
        yield Step(i, t, s, xt, xs, pred)
        xt = xs


def heun_in(calls): return (calls + 1) // 2 # its calls are 2 steps - 1


OURS = {"DDPM": ddpm, "DDIM": ddim, "DDIM, eta 0.5": partial(ddim, eta=0.5), "DPM-Solver++(2M)": dpmpp_2m,
        "DPM-Solver++(2M), eta 1": partial(dpmpp_2m, eta=1.0), "Heun": heun,
        "extrapolated, gam 1.5": partial(extrapolated, gam=1.5), "extrapolated, gam 2": partial(extrapolated, gam=2.0)}


def ours(sampler, predict, schedule, indices, seed, calls):
    steps = heun_in(calls) if sampler is heun else calls
    return sample(predict, schedule, indices, sampler=sampler, steps=steps, seed=seed)


def theirs(sampler, predict, schedule, indices, seed, calls):
    torch.manual_seed(seed) # some draw their noise from the global generator
    return sampler(predict, schedule, initial_noise(indices, seed=seed), calls)


# --- quality ---

def spread(images, labels):
    "How far the images of a class are from their mean image: root mean square, mean over the classes."
    classes = [images[labels == k] for k in range(5)]
    return torch.stack([(x - x.mean(0)).square().mean().sqrt() for x in classes]).mean().item()


def drawn(draw, sampler, calls, n, part=100):
    "n samples for each seed: their features, class accuracy and spread."
    net, schedule = pretrained("sprites")
    found, labels = [], torch.arange(n) % 5
    for seed in SEEDS:
        for i in torch.arange(n).split(part):
            predict = clipped(predictor(fast(net), schedule, one_hot(labels[i])), schedule)
            with torch.no_grad(): found.append(draw(sampler, predict, schedule, i.tolist(), seed, calls))
    images, labels = torch.cat(found), labels.repeat(len(SEEDS))
    return features(images), class_accuracy(images, labels), spread(images, labels)


def rows(draw, jobs, n, real, best):
    for name, sampler, calls in jobs:
        own, accuracy, far = drawn(draw, sampler, calls, n)
        row = dict(sampler=name, calls=2 * heun_in(calls) - 1 if sampler is heun else calls, kid=kid(own, real), class_accuracy=accuracy, spread=far,
                   minus_best=kid_difference(own, best, real) if best is not None else (0.0, 0.0))
        print(row, flush=True)
        yield row, own


def quality(n, real):
    everything = list(rows(ours, [("DDPM", ddpm, 500)], n, real, None))
    best = everything[0][1]
    jobs = [(name, sampler, calls) for name, sampler in OURS.items() for calls in CALLS]
    everything += rows(ours, jobs, n, real, best)
    peers_rows = list(rows(theirs, [(name, sampler, calls) for name, sampler in peers.SAMPLERS.items() for calls in (10, 20)], n, real, best))
    return [row for row, _ in everything], [row for row, _ in peers_rows]


def verdict(row):
    mean, error = row["minus_best"]
    if row["calls"] == 500: return ""
    if abs(mean) + 2 * error < MARGIN: return "as good"
    if mean - 2 * error > MARGIN: return "worse"
    return "better" if mean + 2 * error < -MARGIN else "open"


# --- speed ---

def sampler_speed(rounds, n=64, calls=20):
    "Seconds of each sampler around one network, in turns, and of the network alone."
    net, schedule = pretrained("sprites")
    predict = clipped(predictor(net.eval(), schedule, one_hot(torch.arange(n) % 5)), schedule)
    x, t, context = torch.randn(n, 3, 16, 16), torch.full((n,), 100), one_hot(torch.arange(n) % 5)
    def network_alone():
        for _ in range(calls): net(x, t, context)
    jobs = {"the network alone": network_alone}
    for name, sampler in OURS.items():
        if sampler is not heun and "gam" not in name: jobs[f"ours, {name}"] = partial(ours, sampler, predict, schedule, n, 0, calls)
    for name, sampler in peers.SAMPLERS.items(): jobs[name] = partial(theirs, sampler, predict, schedule, n, 0, calls)
    with torch.no_grad(): return in_turns(jobs, rounds, warm_up=1)


def convolutions(net, inputs, dtype):
    "A function that runs the convolutions of one call of `net`, and nothing else."
    seen = []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append((m, i[0]))) for m in net.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad(): net(*inputs)
    for hook in hooks: hook.remove()
    layers = [(copy.deepcopy(m).to(dtype), x.to(dtype)) for m, x in seen]
    def run():
        for layer, x in layers: layer(x)
    return run


def own_speed(rounds, n=64):
    "Our sampling in both precisions on one thread and two; the convolutions alone beside it."
    net, schedule = pretrained("sprites")
    labels = one_hot(torch.arange(n) % 5)
    inputs = torch.randn(n, 3, 16, 16), torch.full((n,), 100), labels
    jobs = {}
    for name, dtype in PRECISIONS.items():
        inside = fast(net) if dtype else net
        predict = clipped(predictor(inside, schedule, labels), schedule)
        for calls in (10, 20): jobs[name, calls] = partial(ours, dpmpp_2m, predict, schedule, n, 0, calls)
        jobs[name, "conv"] = convolutions(net, inputs, dtype or torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad(): seconds = in_turns(jobs, rounds, warm_up=1)
        found += [dict(threads=threads, precision=name, calls=calls, seconds=seconds[name, calls], convolutions=calls * seconds[name, "conv"])
                  for name in PRECISIONS for calls in (10, 20)]
    torch.set_num_threads(1)
    return found


def half_the_bits(n, real):
    "What bfloat16 changes, from the same noise: the difference of KID with its paired error."
    net, schedule = pretrained("sprites")
    labels = torch.arange(n) % 5
    def images(net): return features(sample(clipped(predictor(net, schedule, one_hot(labels)), schedule), schedule, n, sampler=dpmpp_2m, steps=20, seed=1))
    return kid_difference(images(fast(net)), images(net), real)


def peak_memory(): # MiB, of a process that does nothing else
    return float(subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout)


# --- report ---

def quality_table(found):
    lines = ["| sampler | network calls | KID | class accuracy | spread | KID minus DDPM-500 (paired) | beside DDPM-500 |", "|---|---|---|---|---|---|---|"]
    return lines + [f"| {r['sampler']} | {r['calls']} | {r['kid'][0]:.3f} ± {r['kid'][1]:.3f} | {r['class_accuracy']:.1%} | {r['spread']:.3f} | "
                    f"{r['minus_best'][0]:+.3f} ± {r['minus_best'][1]:.3f} | {verdict(r)} |" for r in found]


def report(results, args):
    alone, (half, half_error), (floor, floor_error) = results["sampler speed"]["the network alone"], results["half"], results["floor"]
    lines = ["# Sampling: quality and speed", "",
             f"{results['machine']}. " + ", ".join(f"{name} {version}" for name, version in peers.VERSIONS.items()) + ". Repeat with:", "",
             f"    OMP_NUM_THREADS=1 python benchmarks/sampling.py --samples {args.samples} --rounds {args.rounds}", "",
             f"KID (lower is better) and class accuracy of {len(SEEDS)} × {args.samples} samples of the shipped model (noise of seeds {', '.join(map(str, SEEDS))}), "
             f"x0 clipped, against {len(SEEDS) * args.samples} held-out sprites; real against real: {floor:.4f} ± {floor_error:.4f}. "
             f"*As good*: the difference and two of its errors are within {MARGIN}; *worse* or *better*: beyond it by two errors; *open*: neither. "
             f"Spread: root mean square distance from the mean image of the class; of real sprites {results['real spread']:.3f}.", "",
             "## Our samplers", "", *quality_table(results["ours"]), "",
             "## The same weights under other libraries' samplers", "", *quality_table(results["theirs"]), "",
             "## Samplers around one network: 64 sprites in 20 calls", "",
             f"The same network in float32 on one thread; median of {args.rounds} rounds in turns.", "",
             "| sampler | seconds | beside the network alone |", "|---|---|---|",
             *(f"| {name} | {s:.2f} | {s / alone:.2f} |" for name, s in sorted(results["sampler speed"].items(), key=lambda item: item[1])), "",
             "## Our speed: 64 sprites by DPM-Solver++(2M)", "",
             "bfloat16: `fast(net)`. On the right the convolutions of the same calls, and nothing else.", "",
             "| threads | precision | network calls | seconds | of the convolutions alone |", "|---|---|---|---|---|"]
    lines += [f"| {r['threads']} | {r['precision']} | {r['calls']} | {r['seconds']:.2f} | {r['seconds'] / r['convolutions']:.2f} |" for r in results["own speed"]]
    return "\n".join([*lines, "", f"bfloat16 changes the KID of {args.samples} samples from the same noise by {half:+.4f} ± {half_error:.4f} (paired). "
                      f"Peak memory of a process that draws 64 sprites in 20 calls: {results['memory']:.0f} MiB."]) + "\n"


def plot(found):
    shown = ("DDPM", "DDIM", "DPM-Solver++(2M)", "DPM-Solver++(2M), eta 1", "extrapolated, gam 2")
    by_sampler = {name: [r["kid"] for r in found if r["sampler"] == name and r["calls"] in CALLS] for name in shown}
    return quality_curve(list(CALLS), {name: tuple(zip(*kids)) for name, kids in by_sampler.items()},
                         xlabel="network calls", ylabel="KID", xscale="log", yscale="log")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=500, help="samples judged in each row, for each of three seeds of the noise")
    parser.add_argument("--rounds", type=int, default=7, help="how often each speed is measured")
    parser.add_argument("--until", help="stop after this part")
    args = parser.parse_args()
    total = len(SEEDS) * args.samples
    (images, context), (more, _) = (Sprites.draw(total, seed=seed, split="heldout").batch(range(total)) for seed in (1, 2))
    real = features(images)
    parts = {"machine": machine, "memory": peak_memory, "sampler speed": lambda: sampler_speed(args.rounds), "own speed": lambda: own_speed(args.rounds),
             "floor": lambda: kid(features(more), real), "real spread": lambda: spread(images, context.argmax(1)),
             "half": lambda: half_the_bits(args.samples, real), "quality": lambda: quality(args.samples, real)}
    kept = BUILD / f"sampling-{args.samples}-{args.rounds}.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name, measure in parts.items():
        if name not in results:
            results[name] = measure()
            kept.write_text(json.dumps(results, indent=1))
            print(name, "done", flush=True)
        if name == args.until: return
    results["ours"], results["theirs"] = results.pop("quality")
    (RESULTS / "sampling.json").write_text(json.dumps(results, indent=1))
    text = report(results, args)
    (RESULTS / "sampling.md").write_text(text)
    plot(results["ours"]).savefig(RESULTS / "sampling.png", dpi=200, bbox_inches="tight")
    kept.unlink()
    print(text)


if __name__ == "__main__": main()
