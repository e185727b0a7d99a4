"""How fast, and how good? Our samplers beside each other, and beside four other libraries.

    OMP_NUM_THREADS=1 python benchmarks/sampling.py          about an hour; writes results/sampling.md, .json and .png

Three tables. (1) Quality over network calls: the shipped model under each of our samplers, KID with its standard error and class accuracy. (2) The same
weights under other libraries' samplers, where their conventions can express our schedule. (3) Speed: 64 sprites in 20 network calls, each library's own
network of about our size under its own sampler, in the better of two memory layouts; all of them take turns, medians count.
The clock of (3) counts the processor time of this process, which on one thread is the time on an idle machine, whatever else runs beside it.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import peers
from machine import machine
from diffusion_course.checkpoints import pretrained
from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import ddim, dpmpp_2m, heun
from diffusion_course.metrics import class_accuracy, kid
from diffusion_course.plots import quality_curve
from diffusion_course.sampling import clipped, ddpm, initial_noise, predictor, sample
from diffusion_course.sprites import Sprites

RESULTS = Path(__file__).parent / "results"
SAMPLERS = {"DDPM": ddpm, "DDIM": ddim, "DDIM, eta 0.5": partial(ddim, eta=0.5), "DPM-Solver++(2M)": dpmpp_2m, "DPM-Solver++(2M), eta 1": partial(dpmpp_2m, eta=1.0)}
CALLS = (5, 10, 20, 50)
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


# --- quality ---

def in_parts(draw, n, part=100):
    "Images 0 … n-1 and their labels; draw(indices, labels) -> images."
    labels = torch.arange(n) % 5
    return torch.cat([draw(i.tolist(), labels[i]) for i in torch.arange(n).split(part)]), labels


def judged(draw, n, real):
    images, labels = in_parts(draw, n)
    mean, error = kid(images, real)
    return dict(kid=mean, kid_error=error, class_accuracy=class_accuracy(images, labels))


def predictors(net, schedule, labels): return clipped(predictor(net, schedule, one_hot(labels)), schedule)


def our_quality(n, real):
    net, schedule = pretrained("sprites")
    jobs = [(name, sampler, calls) for name, sampler in SAMPLERS.items() for calls in CALLS]
    # Heun's calls are 2 steps - 1
    jobs += [("Heun", heun, calls) for calls in CALLS] + [("DDPM", ddpm, schedule.T)]
    for name, sampler, calls in jobs:
        steps = (calls + 1) // 2 if sampler is heun else calls
        def draw(i, labels): return sample(predictors(net, schedule, labels), schedule, i, sampler=sampler, steps=steps, seed=1)
        row = dict(sampler=name, calls=2 * steps - 1 if sampler is heun else steps, **judged(draw, n, real))
        print(row, flush=True)
        yield row


def their_quality(n, real, calls=20):
    net, schedule = pretrained("sprites")
    for name, their_sampler in peers.QUALITY.items():
        torch.manual_seed(1) # some draw their noise from the global generator
        def draw(i, labels): return their_sampler(predictors(net, schedule, labels), schedule, initial_noise(i, seed=1), calls)
        with torch.no_grad(): row = dict(sampler=name, calls=calls, **judged(draw, n, real))
        print(row, flush=True)
        yield row


# --- speed ---

def our_speed():
    net, schedule = pretrained("sprites")
    net.eval()
    def draw(n, calls): return sample(predictors(net, schedule, torch.arange(n) % 5), schedule, n, sampler=dpmpp_2m, steps=calls)
    return net, draw


def speed(rounds, n=64, calls=20):
    "Seconds of each library in each memory layout, in turns."
    jobs = {}
    for name, make in {"ours, DPM-Solver++(2M)": our_speed, **peers.SPEED}.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            net, draw = make()
            jobs[name, layout] = net.to(memory_format=layout), draw
    seconds = {job: [] for job in jobs}
    for i in range(rounds + 1):
        for job, (net, draw) in jobs.items():
            start = time.process_time()
            with torch.no_grad(): draw(n, calls)
            if i: seconds[job].append(time.process_time() - start) # the first round warms up
    medians = {job: statistics.median(s) for job, s in seconds.items()}
    for name in dict.fromkeys(name for name, _ in jobs):
        plain, last = medians[name, torch.contiguous_format], medians[name, torch.channels_last]
        yield dict(library=name, parameters=sum(p.numel() for p in jobs[name, torch.channels_last][0].parameters()), contiguous=plain, channels_last=last, images_per_second=n / min(plain, last))


def peak_memory(): # MiB, of a process that does nothing else
    return float(subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout)


# --- report ---

def quality_table(rows):
    lines = ["| sampler | network calls | KID | class accuracy |", "|---|---|---|---|"]
    return lines + [f"| {r['sampler']} | {r['calls']} | {r['kid']:.3f} ± {r['kid_error']:.3f} | {r['class_accuracy']:.1%} |" for r in rows]


def report(results, args):
    best = max(r["images_per_second"] for r in results["speed"])
    floor, floor_error = results["floor"]
    lines = ["# Sampling: quality and speed", "",
             f"{results['machine']}; {torch.get_num_threads()} thread(s). "
             f"KID (lower is better) and class accuracy of {args.samples} samples of the shipped model, x0 clipped, against held-out sprites; real against real: {floor:.4f} ± {floor_error:.4f}. "
             + ", ".join(f"{name} {version}" for name, version in peers.VERSIONS.items()) + ". Repeat with:", "",
             f"    OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/sampling.py --samples {args.samples} --rounds {args.rounds}", "",
             "## Our samplers", "", *quality_table(results["ours"]), "",
             "## The same weights under other libraries' samplers", "", *quality_table(results["theirs"]), "",
             "## Speed: 64 sprites in 20 network calls", "",
             f"Each library's own network under its own sampler; processor seconds, median of {args.rounds} rounds in turns.", "",
             "| library and sampler | parameters | contiguous | channels_last | images per second | of the fastest |", "|---|---|---|---|---|---|"]
    for r in sorted(results["speed"], key=lambda r: -r["images_per_second"]):
        lines.append(f"| {r['library']} | {r['parameters']:,} | {r['contiguous']:.2f} s | {r['channels_last']:.2f} s | {r['images_per_second']:.1f} | {r['images_per_second'] / best:.2f} |")
    return "\n".join([*lines, "", f"Peak memory of a process that draws 64 sprites in 20 calls: {results['memory']:.0f} MiB."]) + "\n"


def plot(rows):
    by_sampler = {}
    for r in rows:
        if r["calls"] <= max(CALLS): by_sampler.setdefault(r["sampler"], []).append(r)
    fig = quality_curve(list(CALLS), {name: ([r["kid"] for r in own], [r["kid_error"] for r in own]) for name, own in by_sampler.items() if name != "DDIM, eta 0.5"},
                        xlabel="network calls", ylabel="KID", xscale="log", yscale="log")
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400, help="samples judged in each row")
    parser.add_argument("--rounds", type=int, default=5, help="how often each speed is measured")
    args = parser.parse_args()
    real, more = (Sprites.draw(args.samples, seed=seed, split="heldout").batch(range(args.samples))[0] for seed in (1, 2))
    parts = dict(machine=machine, floor=lambda: kid(more, real), memory=peak_memory, speed=lambda: list(speed(args.rounds)),
                 theirs=lambda: list(their_quality(args.samples, real)), ours=lambda: list(our_quality(args.samples, real)))
    RESULTS.mkdir(exist_ok=True)
    results = {}
    for name, measure in parts.items():
        results[name] = measure()
        (RESULTS / "sampling.json").write_text(json.dumps(results, indent=1)) # what is measured is kept, whatever happens to the rest
        print(name, "done", flush=True)
    text = report(results, args)
    (RESULTS / "sampling.md").write_text(text)
    plot(results["ours"]).savefig(RESULTS / "sampling.png", dpi=200, bbox_inches="tight")
    print(text)


if __name__ == "__main__": main()
