"""Train the models that the package ships, with the package's own loop: `make pretrained`.

Writes diffusion_course/pretrained/features.safetensors (the judge of toolkit/metrics) and sprites.safetensors (the diffusion model)."""
import argparse
import hashlib
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") # before torch is imported: waiting threads give their core to others

import torch

from diffusion_course.checkpoints import latest_step, resume_training, save_model, save_training
from diffusion_course.context import one_hot, with_dropped_context
from diffusion_course.sampling import Schedule, clipped, predictor, sample
from diffusion_course.sprites import CLASSES, Sprites
from diffusion_course.training import prediction_loss, progress, train
from diffusion_course.unet import ContextUnet

SHIPPED = Path(__file__).parents[1] / "diffusion_course" / "pretrained"


def sha256(images): return hashlib.sha256(images.tobytes()).hexdigest()


def train_sprites(steps, n_images, seed, folder):
    "The average of the weights after the last step. An interrupted training goes on from its last checkpoint in `folder`; under `torchrun` several processes share it."
    torch.manual_seed(seed)
    net, schedule, data = ContextUnet(predicts="v"), Schedule.cosine(), Sprites.draw(n_images, seed=seed)
    loop = train(net, data, schedule, steps=steps, batch_size=64, lr=3e-3, ema=0.999, seed=seed, loss=with_dropped_context(prediction_loss, 0.1),
                 resume=resume_training(folder) if latest_step(folder) else None)
    for step in progress(loop, steps):
        if step.step % 1000 == 0 and step.step < steps: save_training(folder, step.state(), keep=1)
    shutil.rmtree(folder, ignore_errors=True)
    return step.ema, schedule, data


def draw_samples(net, schedule, n_per_class, steps, seed=0, batch_size=250):
    "Samples of every class with their labels, by DDPM."
    labels = torch.arange(len(CLASSES)).repeat_interleave(n_per_class)
    def draw(indices): return sample(clipped(predictor(net, schedule, one_hot(labels[indices])), schedule), schedule, indices.tolist(), steps=steps, seed=seed)
    return torch.cat([draw(i) for i in torch.arange(len(labels)).split(batch_size)]), labels


def quality(net, schedule, n_per_class=200, steps=50):
    "What the header says about the model: class accuracy and KID of DDPM samples, beside the floor of real sprites."
    from diffusion_course.metrics import class_accuracy, kid
    samples, labels = draw_samples(net, schedule, n_per_class, steps)
    real, more = (Sprites.draw(n_per_class * len(CLASSES), seed=seed, split="heldout").batch(range(n_per_class * len(CLASSES)))[0] for seed in (1, 2))
    return dict(samples=len(samples), ddpm_steps=steps, class_accuracy=class_accuracy(samples, labels), kid=kid(samples, real), kid_floor=kid(more, real))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16_000, help="optimiser steps")
    parser.add_argument("--images", type=int, default=20_000, help="sprites in the training set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=SHIPPED / "sprites.safetensors")
    parser.add_argument("--checkpoints", type=Path, default=Path("out/pretrain"), help="where an interrupted training is kept")
    args = parser.parse_args()
    net, schedule, data = train_sprites(args.steps, args.images, args.seed, args.checkpoints)
    measured = quality(net, schedule)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_model(args.out, net, dtype=torch.float16, schedule=schedule, classes=list(CLASSES), seed=args.seed, steps=args.steps,
               data=f"Sprites.draw({args.images}, seed={args.seed})", data_sha256=sha256(data.images),
               command=f"python tools/pretrain.py --steps {args.steps} --images {args.images} --seed {args.seed}", quality=measured)
    print(f"wrote {args.out.name} ({args.out.stat().st_size / 1e6:.2f} MB): {measured}")


if __name__ == "__main__": main()
