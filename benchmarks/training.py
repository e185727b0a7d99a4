"""How good is a model after so many seconds of training? The labs' recipe beside ours: `benchmarks/speedrun.md` has the rules.

    OMP_NUM_THREADS=1 python benchmarks/training.py          writes results/training.md, .json and .png; three hours of one core

The clock: all recipes take turns, a few steps each, on an otherwise idle machine; a recipe's second is its median step. A budget in seconds is then a
number of steps, so it does not matter what else runs while the models are trained. Every recipe, budget and seed is a whole run of its own, because its
learning rate ends at zero. Models that are in build/training already are not trained again; the runs can be shared out among processes with
--recipe and --seeds, and a last call without them judges all. Then the folder becomes build/training.done, and the next race begins anew.

The judge: the same sampler in the same number of steps from the same noise for everybody, the same real sprites, the same frozen features.
"""
import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

import safetensors.torch
import torch

from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import dpmpp_2m
from diffusion_course.metrics import class_accuracy, features, kid
from diffusion_course.plots import PALETTE, Plot
from diffusion_course.sampling import clipped, ddpm, predictor, sample
from diffusion_course.sprites import Sprites
from machine import RESULTS, machine
from recipes import RECIPES

MODELS = Path(__file__).parents[1] / "build" / "training"
BUDGETS = {"labs": (1800,), "ours, noise": (60, 120), "ours, v": (60, 120)} # seconds
SEEDS = {name: range(3 if name == "labs" else 5) for name in BUDGETS}
JUDGES = {"DDPM, 50 steps": (ddpm, 50), "2M with fresh noise, 20 steps": (lambda *a, **k: dpmpp_2m(*a, **k, eta=1.0), 20)}


def pace(data, rounds=15, warm_up=3):
    "Median processor seconds of one step of each recipe, in turns."
    running = {name: recipe.train(data, 10_000, 0) for name, recipe in RECIPES.items()}
    seconds = {name: [] for name in running}
    for i in range(rounds + warm_up):
        for name, loop in running.items():
            start = time.process_time()
            next(loop)
            if i >= warm_up: seconds[name].append(time.process_time() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def model_file(name, budget, seed): return MODELS / f"{name.replace(', ', '-')}-{budget}-{seed}.safetensors"


def trained(name, budget, seed, steps, data):
    "Train and keep, or nothing where it is there already."
    path = model_file(name, budget, seed)
    if path.exists(): return
    for net in RECIPES[name].train(data(), steps, seed): pass
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {k: v.contiguous() for k, v in net.state_dict().items()}
    safetensors.torch.save_file(whole, path.with_suffix(".part"), metadata=dict(steps=str(steps)))
    path.with_suffix(".part").rename(path)
    print(path.name, "trained for", steps, "steps", flush=True)


def judged(name, budget, seed, real, n, part=100):
    "What is there to say about a model; kept beside it, and not measured again."
    recipe, path = RECIPES[name], model_file(name, budget, seed)
    kept = path.with_suffix(f".{n}.json")
    if kept.exists(): return json.loads(kept.read_text())
    net = recipe.network()
    net.load_state_dict(safetensors.torch.load_file(path))
    net.eval()
    labels = torch.arange(n) % 5
    quality = {}
    for judge, (sampler, steps) in JUDGES.items():
        def draw(i): return sample(clipped(predictor(net, recipe.schedule, one_hot(labels[i])), recipe.schedule), recipe.schedule, i.tolist(),
                                   sampler=sampler, steps=steps, seed=1)
        images = torch.cat([draw(i) for i in torch.arange(n).split(part)])
        quality[judge] = dict(kid=kid(features(images), real), class_accuracy=class_accuracy(images, labels))
    with safetensors.safe_open(path, "pt") as file: steps = int(file.metadata()["steps"])
    row = dict(recipe=name, budget=budget, seed=seed, steps=steps, images=steps * recipe.batch, quality=quality)
    kept.write_text(json.dumps(row))
    print(row, flush=True)
    return row


def middle_and_worst(rows, judge):
    "Median and worst of KID and class accuracy over the seeds."
    kids, right = ([r["quality"][judge][k] for r in rows] for k in ("kid", "class_accuracy"))
    kids = [k[0] for k in kids]
    return statistics.median(kids), max(kids), statistics.median(right), min(right)


def report(results, args):
    rows, seconds, (floor, error) = results["rows"], results["pace"], results["floor"]
    lines = ["# Training: quality over seconds", "",
             f"{results['machine']}; one thread. {args.images:,} drawn sprites. KID (lower is better) and class accuracy of {args.samples} samples, x0 clipped, from "
             f"the same noise, against {2 * args.samples} held-out sprites; real against real: {floor:.4f} ± {error:.4f}. Repeat with:", "",
             f"    OMP_NUM_THREADS=1 python benchmarks/training.py --images {args.images} --samples {args.samples}", "",
             "A step takes (median in turns): " + ", ".join(f"{name} {1000 * s:.0f} ms for {RECIPES[name].batch} images" for name, s in seconds.items()) + "."]
    groups = dict.fromkeys((r["recipe"], r["budget"]) for r in rows)
    for judge in JUDGES:
        lines += ["", f"## Sampled by {judge}", "", "| recipe | seconds | images trained | seeds | KID: median | worst | class accuracy: median | worst |",
                  "|---|---|---|---|---|---|---|---|"]
        for name, budget in groups:
            own = [r for r in rows if (r["recipe"], r["budget"]) == (name, budget)]
            k, worst_k, c, worst_c = middle_and_worst(own, judge)
            lines.append(f"| {name} | {own[0]['steps'] * seconds[name]:.0f} | {own[0]['images']:,} | {len(own)} | {k:.3f} | {worst_k:.3f} | {c:.1%} | {worst_c:.1%} |")
    lines += ["", "## Every run", "", "| recipe | seconds | seed | " + " | ".join(f"{judge}: KID | class accuracy" for judge in JUDGES) + " |", "|---|---|---|" + "---|---|" * len(JUDGES)]
    for r in rows:
        cells = " | ".join(f"{q['kid'][0]:.3f} ± {q['kid'][1]:.3f} | {q['class_accuracy']:.1%}" for q in r["quality"].values())
        lines.append(f"| {r['recipe']} | {r['steps'] * seconds[r['recipe']]:.0f} | {r['seed']} | {cells} |")
    return "\n".join(lines) + "\n"


def plot(results):
    "Every run as a point; KID by the second judge."
    fig = Plot(3.6, 2.4, layout="constrained")
    ax = fig.add_subplot(xlabel="processor seconds of training", ylabel="KID", xscale="log", yscale="log")
    for name, colour, marker in zip(RECIPES, PALETTE, "sox^"):
        own = [r for r in results["rows"] if r["recipe"] == name]
        if own: ax.plot([r["steps"] * results["pace"][name] for r in own], [list(r["quality"].values())[-1]["kid"][0] for r in own], marker,
                        color=colour, markersize=4, alpha=0.7, label=name)
    ax.legend(frameon=False)
    return fig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="sprites in the training set")
    parser.add_argument("--samples", type=int, default=1000, help="samples judged for each model")
    parser.add_argument("--recipe", choices=list(RECIPES), help="train this one only, and judge nothing")
    parser.add_argument("--seeds", type=int, nargs="+", help="train these only, and judge nothing")
    args = parser.parse_args()
    def data(): return Sprites.draw(args.images)
    clock = MODELS / "pace.json" # beside the models, because it decides their steps
    MODELS.mkdir(parents=True, exist_ok=True)
    if not clock.exists(): clock.write_text(json.dumps(dict(machine=machine(), pace=pace(data())), indent=1))
    seconds = json.loads(clock.read_text())["pace"]
    wanted = [(name, budget, seed) for name in BUDGETS for budget in BUDGETS[name] for seed in SEEDS[name]
              if (args.recipe or name) == name and seed in (args.seeds or SEEDS[name])]
    for name, budget, seed in wanted: trained(name, budget, seed, round(budget / seconds[name]), data)
    if args.recipe or args.seeds: return
    real, more = (features(Sprites.draw(2 * args.samples, seed=seed, split="heldout").batch(range(2 * args.samples))[0]) for seed in (1, 2))
    results = dict(machine=json.loads(clock.read_text())["machine"], pace=seconds, floor=kid(more, real), rows=[judged(*run, real, args.samples) for run in wanted])
    (RESULTS / "training.json").write_text(json.dumps(results, indent=1))
    text = report(results, args)
    (RESULTS / "training.md").write_text(text)
    plot(results).savefig(RESULTS / "training.png", dpi=200, bbox_inches="tight")
    done = MODELS.with_suffix(".done")
    shutil.rmtree(done, ignore_errors=True)
    MODELS.rename(done)
    print(text)


if __name__ == "__main__": main()
