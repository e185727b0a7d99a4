"""Judge the shipped model at full size and write benchmarks/results/pretrained.json, which lesson 3 prints: `python tools/measure_pretrained.py`.

Does it obey (class accuracy of 200 sprites per class), is it good (KID of 5,000 samples against 5,000 real sprites that it has never seen, beside
the same number for 5,000 other real ones), does it copy (distance to the nearest training sprite, beside that of unseen real ones)?"""
import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") # before torch is imported: waiting threads give their core to others

import torch
from tqdm import tqdm

from diffusion_course.checkpoints import pretrained
from diffusion_course.context import guided, one_hot
from diffusion_course.metrics import class_accuracy, coverage, features, kid, nearest
from diffusion_course.sampling import clipped, predictor, sample
from diffusion_course.sprites import CLASSES, Sprites

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from machine import machine  # noqa: E402


def draw(net, schedule, labels, *, scale, steps, seed, batch_size=100):
    "Guided samples of these classes, by DDPM: sample i is the same whatever the batch size."
    def part(i):
        predict = guided(predictor(net, schedule, one_hot(labels[i])), predictor(net, schedule), scale)
        return sample(clipped(predict, schedule), schedule, i.tolist(), steps=steps, seed=seed)
    parts = torch.arange(len(labels)).split(batch_size)
    return torch.cat([part(i) for i in tqdm(parts, file=sys.stdout)])


def real(n, seed, split):
    sprites = Sprites.draw(n, seed=seed, split=split)
    return sprites.batch(range(n))[0], torch.from_numpy(sprites.labels)


def distances(images, training, k=0.05):
    "How near the nearest training sprite is: median, the nearest twentieth, and the share of copies to the byte."
    bytes_ = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    distance = nearest(bytes_, training).distance
    return dict(median=distance.median().item(), nearest_5_percent=distance.quantile(k).item(), copies=(distance < 1e-3).float().mean().item())


def measure(net, schedule, n, scale, steps, seed):
    labels = torch.arange(n) % len(CLASSES)
    samples = draw(net, schedule, labels, scale=scale, steps=steps, seed=seed)
    (reference, _), (others, _) = real(n, 1, "heldout"), real(n, 2, "heldout")
    training, _ = real(20_000, 0, "train")
    f, f_reference, f_others = features(samples), features(reference), features(others)
    first = torch.cat([(labels == c).nonzero()[:200, 0] for c in range(len(CLASSES))])
    return dict(
        class_accuracy=class_accuracy(samples[first], labels[first]), class_accuracy_of=len(first),
        by_class={name: class_accuracy(samples[labels == c], labels[labels == c]) for c, name in enumerate(CLASSES)},
        kid=kid(f, f_reference), kid_floor=kid(f_others, f_reference),
        coverage=coverage(f, f_reference), coverage_floor=coverage(f_others, f_reference),
        nearest=distances(samples[:2000], training), nearest_unseen=distances(others[:2000], training))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=5_000, help="samples, and real sprites of each kind")
    parser.add_argument("--scale", type=float, default=2.0, help="guidance scale")
    parser.add_argument("--steps", type=int, default=50, help="steps of DDPM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "pretrained.json")
    args = parser.parse_args()
    net, schedule = pretrained("sprites")
    command = f"python tools/measure_pretrained.py --n {args.n} --scale {args.scale:g} --steps {args.steps} --seed {args.seed}"
    found = dict(command=command, machine=machine(), n=args.n, scale=args.scale, steps=args.steps,
                 **measure(net, schedule, args.n, args.scale, args.steps, args.seed))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__": main()
