"""Train the models that the package ships, with the package's own loops: `make pretrained`.

Writes sprites.safetensors (the diffusion model) and sprites-fast.safetensors (the same network, taught to jump: lesson 6) into
diffusion_course/pretrained. The judge beside them comes from tools/train_features.py."""
import argparse
import copy
import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") # before torch is imported: waiting threads give their core to others

import torch

from diffusion_course.checkpoints import latest_step, load_model, resume_training, save_model, save_training
from diffusion_course.context import drop_context, guided, one_hot, with_dropped_context
from diffusion_course.few_steps import jumps, match, store_walks, walk_loss
from diffusion_course.precision import fast
from diffusion_course.sampling import Schedule, clipped, ddpm, predictor, sample
from diffusion_course.sprites import CLASSES, Sprites
from diffusion_course.training import prediction_loss, progress, train
from diffusion_course.unet import ContextUnet

SHIPPED = Path(__file__).parents[1] / "diffusion_course" / "pretrained"


def sha256(images): return hashlib.sha256(images.tobytes()).hexdigest()


def resumable(loop, steps, folder):
    "The last step of a training that leaves a checkpoint every 1,000 steps; the folder is removed when it is done."
    for step in progress(loop, steps):
        if step.step % 1000 == 0 and step.step < steps: save_training(folder, step.state(), keep=1)
    shutil.rmtree(folder, ignore_errors=True)
    return step


def state_in(folder): return resume_training(folder) if latest_step(folder) else None


def train_sprites(steps, n_images, seed, folder):
    "The average of the weights after the last step. An interrupted training goes on from its last checkpoint in `folder`; under `torchrun` several processes share it."
    torch.manual_seed(seed)
    net, schedule, data = ContextUnet(predicts="v"), Schedule.cosine(), Sprites.draw(n_images, seed=seed)
    loop = train(net, data, schedule, steps=steps, batch_size=64, lr=3e-3, ema=0.999, seed=seed, loss=with_dropped_context(prediction_loss, 0.1),
                 resume=state_in(folder))
    return resumable(loop, steps, folder).ema, schedule, data


def guided_by(net, schedule, scale):
    "teacher(context) -> predict: the network guided by itself without context. Of several, it costs two calls for one."
    net = fast(net)
    return lambda context: clipped(guided(predictor(net, schedule, context), predictor(net, schedule), scale), schedule)


def train_fast(teacher_net, schedule, seed, folder, *, n_walks, walk_steps, match_steps, guidance=1.5, match_guidance=1.5):
    "Lesson 6: the ends of guided walks first, then the teacher's crowd. The average of the weights."
    labels = torch.arange(n_walks) % len(CLASSES)
    context = drop_context(one_hot(labels), 0.1, torch.Generator().manual_seed(seed))
    walks = store_walks(guided_by(teacher_net, schedule, guidance), context, schedule, seed=77 + seed)
    net = copy.deepcopy(teacher_net).requires_grad_(True)
    loop = train(net, walks, schedule, steps=walk_steps, batch_size=64, lr=1.2e-3, ema=0.998, seed=seed, loss=partial(walk_loss, ts=walks.ts),
                 resume=state_in(folder))
    net = copy.deepcopy(resumable(loop, walk_steps, folder).ema).requires_grad_(True)
    loop = match(net, guided_by(teacher_net, schedule, match_guidance), walks, schedule, fake=copy.deepcopy(teacher_net).requires_grad_(True),
                 steps=match_steps, seed=seed)
    for step in progress(loop, match_steps): pass
    return step.ema


def draw_samples(net, schedule, n_per_class, steps, sampler=ddpm, seed=0, batch_size=250):
    "Samples of every class with their labels."
    labels = torch.arange(len(CLASSES)).repeat_interleave(n_per_class)
    def draw(indices):
        predict = clipped(predictor(net, schedule, one_hot(labels[indices])), schedule)
        return sample(predict, schedule, indices.tolist(), sampler=sampler, steps=steps, seed=seed)
    return torch.cat([draw(i) for i in torch.arange(len(labels)).split(batch_size)]), labels


def quality(net, schedule, steps, sampler=ddpm, n_per_class=200):
    "What the header says about the model: class accuracy and KID of samples, beside the floor of real sprites."
    from diffusion_course.metrics import class_accuracy, kid
    samples, labels = draw_samples(net, schedule, n_per_class, steps, sampler)
    real, more = (Sprites.draw(n_per_class * len(CLASSES), seed=seed, split="heldout").batch(range(n_per_class * len(CLASSES)))[0] for seed in (1, 2))
    return {"samples": len(samples), f"{sampler.__name__}_steps": steps, "class_accuracy": class_accuracy(samples, labels),
            "kid": kid(samples, real), "kid_floor": kid(more, real)}


def save(path, net, schedule, measured, **about):
    save_model(path, net, dtype=torch.float16, schedule=schedule, classes=list(CLASSES), quality=measured, **about)
    print(f"wrote {path.name} ({path.stat().st_size / 1e6:.2f} MB): {measured}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("sprites", "sprites-fast"), help="train this one alone; sprites-fast starts from the sprites in --out")
    parser.add_argument("--steps", type=int, default=16_000, help="optimiser steps of sprites")
    parser.add_argument("--images", type=int, default=20_000, help="sprites in the training set")
    parser.add_argument("--walks", type=int, default=12_000, help="stored walks for sprites-fast")
    parser.add_argument("--walk-steps", type=int, default=4_800, help="optimiser steps on their ends")
    parser.add_argument("--match-steps", type=int, default=300, help="steps of matching after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the models")
    parser.add_argument("--checkpoints", type=Path, default=Path("out/pretrain"), help="where an interrupted training is kept")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sprites = args.out / "sprites.safetensors"
    if args.only != "sprites-fast":
        net, schedule, data = train_sprites(args.steps, args.images, args.seed, args.checkpoints / "sprites")
        save(sprites, net, schedule, quality(net, schedule, 50), seed=args.seed, steps=args.steps, data=f"Sprites.draw({args.images}, seed={args.seed})",
             data_sha256=sha256(data.images), command=f"python tools/pretrain.py --only sprites --steps {args.steps} --images {args.images} --seed {args.seed}")
    if args.only != "sprites":
        teacher, about = load_model(sprites) # as it is shipped, in float16
        student = train_fast(teacher, about["schedule"], args.seed, args.checkpoints / "fast", n_walks=args.walks, walk_steps=args.walk_steps,
                             match_steps=args.match_steps)
        save(args.out / "sprites-fast.safetensors", student, about["schedule"], quality(student, about["schedule"], 4, jumps), seed=args.seed,
             sampler="jumps", calls=4, data=f"{args.walks} walks of sprites", teacher_sha256=hashlib.sha256(sprites.read_bytes()).hexdigest(),
             command=f"python tools/pretrain.py --only sprites-fast --walks {args.walks} --walk-steps {args.walk_steps} --match-steps {args.match_steps} --seed {args.seed}")


if __name__ == "__main__": main()
