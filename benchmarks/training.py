"""How good is a model after so many seconds of training? The labs' recipe beside ours, one after the other on the same threads.

    OMP_NUM_THREADS=1 python benchmarks/training.py          about an hour; writes results/training.md and results/training.png

(a) The labs' network and settings (float32, Adam 1e-3 with linear decay, batch 100, noise prediction, linear betas up to 0.02 at T = 500),
    repaired only where they are wrong: the square root in the noise, and a shortcut that is trained.
(b) Ours: ContextUnet, v-prediction, cosine schedule, AdamW 3e-3 with warm-up and decay, gradient clipping, averaged weights, batch 64, bfloat16
    where the hardware has it.
Both see the same sprites and drop the context of one in ten. Each budget of (b) is a run of its own, because its learning rate ends at zero; (a) is one
long run, decayed over its whole budget, so its last point is the one to compare with. Samples are drawn outside the clock, by the same sampler in
the same number of steps, and judged by the same frozen features. The clock counts the processor time of this process, which on one thread is the
time on an idle machine, whatever else runs beside it.
"""
import argparse
import json
import resource
import time
from pathlib import Path

import torch

from diffusion_course.context import drop_context, one_hot, with_dropped_context
from diffusion_course.metrics import class_accuracy, kid
from diffusion_course.plots import PALETTE, Plot
from diffusion_course.sampling import Schedule, clipped, predictor, sample
from diffusion_course.sprites import Sprites
from diffusion_course.training import noise_prediction_loss, prediction_loss, shuffled_batches, train
from diffusion_course.unet import ContextUnet
from labs_unet import LabsUnet
from machine import machine

RESULTS = Path(__file__).parent / "results"
DROPPED = 0.1


def judge(net, schedule, n, steps=50, part=100):
    "KID (with its standard error) and class accuracy of n samples."
    net.eval()
    labels = torch.arange(n) % 5
    def draw(i): return sample(clipped(predictor(net, schedule, one_hot(labels[i])), schedule), schedule, i.tolist(), steps=steps, seed=1)
    images = torch.cat([draw(i) for i in torch.arange(n).split(part)])
    real, _ = Sprites.draw(n, seed=1, split="heldout").batch(range(n))
    mean, error = kid(images, real)
    return dict(kid=mean, kid_error=error, class_accuracy=class_accuracy(images, labels))


def floor(n):
    one, two = (Sprites.draw(n, seed=seed, split="heldout").batch(range(n))[0] for seed in (1, 2))
    return kid(one, two)


def labs(data, budgets, n):
    "Rows of (seconds, images trained, quality), one for each budget, from one run over the longest."
    torch.manual_seed(0)
    net, schedule = LabsUnet(shortcut="learned"), Schedule.linear(500, 1e-4, 0.02)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    rows, spent, waiting = [], 0.0, sorted(budgets)
    for step, batch in enumerate(shuffled_batches(len(data), 100, 10**9), 1):
        start = time.process_time()
        net.train()
        x0, context = data.batch(batch)
        for group in optimizer.param_groups: group["lr"] = 1e-3 * max(1 - spent / max(budgets), 0)
        optimizer.zero_grad()
        noise_prediction_loss(net, x0, drop_context(context, DROPPED), schedule).backward()
        optimizer.step()
        spent += time.process_time() - start
        if spent >= waiting[0]:
            rows.append(dict(recipe="labs, repaired", seconds=round(spent), images=step * 100, **judge(net, schedule, n)))
            print(rows[-1], flush=True)
            waiting.pop(0)
            if not waiting: return rows


def ours(data, budgets, n):
    "The same for our recipe, one whole run for each budget."
    schedule, loss = Schedule.cosine(), with_dropped_context(prediction_loss, DROPPED)
    def run(steps):
        torch.manual_seed(0)
        start = time.process_time()
        for step in train(ContextUnet(predicts="v"), data, schedule, steps=steps, ema=0.99, loss=loss, device="cpu"): pass
        return step._replace(seconds=time.process_time() - start)
    pace = run(30)
    rows = []
    for budget in sorted(budgets):
        step = run(int(budget / pace.seconds * pace.step))
        rows.append(dict(recipe="ours", seconds=round(step.seconds), images=step.step * 64, **judge(step.ema, schedule, n)))
        print(rows[-1], flush=True)
    return rows


def report(rows, base, args):
    lines = ["# Training: quality over seconds", "",
             f"{machine()}; {torch.get_num_threads()} thread(s). {args.images:,} drawn sprites. "
             f"KID (lower is better) and class accuracy of {args.samples} samples (DDPM, 50 steps, x0 clipped) against held-out sprites; "
             f"real against real: {base[0]:.4f} ± {base[1]:.4f}. Repeat with:", "",
             f"    OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/training.py --images {args.images} --samples {args.samples} "
             f"--labs {' '.join(map(str, args.labs))} --ours {' '.join(map(str, args.ours))}", "",
             "| recipe | processor seconds | images trained | images per second | KID | class accuracy |", "|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['recipe']} | {r['seconds']} | {r['images']:,} | {r['images'] / r['seconds']:.0f} | {r['kid']:.3f} ± {r['kid_error']:.3f} | {r['class_accuracy']:.1%} |")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return "\n".join([*lines, "", f"Peak memory of the whole benchmark, sampling included: {memory:.2f} GiB."]) + "\n"


def plot(rows, base):
    fig = Plot(3.6, 2.4, layout="constrained")
    ax = fig.add_subplot(xlabel="processor seconds of training", ylabel="KID", xscale="log", yscale="log")
    for recipe, colour, marker in (("labs, repaired", PALETTE[1], "s"), ("ours", PALETTE[0], "o")):
        own = [r for r in rows if r["recipe"] == recipe]
        ax.errorbar([r["seconds"] for r in own], [r["kid"] for r in own], [r["kid_error"] for r in own], color=colour, marker=marker, capsize=2, label=recipe)
    if base[0] > 0: ax.axhline(base[0], color="black", linestyle="--", linewidth=1, label="real against real")
    ax.legend()
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="sprites in the training set")
    parser.add_argument("--samples", type=int, default=1000, help="samples judged at each point")
    parser.add_argument("--labs", type=int, nargs="+", default=[120, 480, 1800], help="seconds at which (a) is judged")
    parser.add_argument("--ours", type=int, nargs="+", default=[30, 60, 120, 240], help="budgets of (b), in seconds")
    args = parser.parse_args()
    data, base = Sprites.draw(args.images), floor(args.samples)
    rows = ours(data, args.ours, args.samples) + labs(data, args.labs, args.samples)
    RESULTS.mkdir(exist_ok=True)
    text = report(rows, base, args)
    (RESULTS / "training.md").write_text(text)
    (RESULTS / "training.json").write_text(json.dumps(dict(rows=rows, floor=base), indent=1))
    plot(rows, base).savefig(RESULTS / "training.png", dpi=200, bbox_inches="tight")
    print(text)


if __name__ == "__main__": main()
