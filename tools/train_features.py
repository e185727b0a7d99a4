"""Train the feature network of toolkit/metrics, the judge of all samples: `python tools/train_features.py`.

Writes diffusion_course/pretrained/features.safetensors. About a minute on one core; on one machine and with the same
number of threads, the same seed gives the same bytes."""
import argparse
import hashlib
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") # before torch is imported: waiting threads give their core to others

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from diffusion_course.judge import N_FLAWS, spoilt
from diffusion_course.metrics import FeatureNet
from diffusion_course.sprites import Sprites

OUT = Path(__file__).parents[1] / "diffusion_course" / "pretrained" / "features.safetensors"


def tensors(sprites):
    "All images, float32 (n, 3, 16, 16) in [-1, 1], and all labels, int64 (n,)."
    return sprites.batch(range(len(sprites)))[0], torch.from_numpy(sprites.labels)


# --- training ---

def train(images, labels, epochs, seed, batch_size=128, lr=4e-3):
    "A FeatureNet that names the class of spoilt sprites, and whose features also tell how they were spoilt."
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = FeatureNet()
    flaws = nn.Linear(net.head.in_features, N_FLAWS + 3)    # only for the training
    parameters = [*net.parameters(), *flaws.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * (len(images) // batch_size))
    for epoch in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            if len(batch) < batch_size: continue
            x, strengths = spoilt(images[batch], generator, frame=1.)    # white comes in
            seen = net.body(x)
            loss = F.cross_entropy(net.head(seen), labels[batch], label_smoothing=0.05) + F.mse_loss(flaws(seen), strengths)
            optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    return net.eval()


@torch.no_grad()
def standardise(net, images):
    "Set mean and deviation of the features over real sprites."
    seen = torch.cat([net.body(x) for x in images.split(1000)])
    net.mean.copy_(seen.mean(0)); net.std.copy_(seen.std(0))
    if net.std.min() < 1e-3: raise RuntimeError(f"deviation {net.std.min():.1e}: a feature hardly varies; use another seed")
    return net


@torch.no_grad()
def accuracy(net, images, labels):
    "Share of images whose most likely class is their own."
    return (torch.cat([net(x) for x in images.split(1000)]).argmax(1) == labels).double().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="sprites in the training set")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    start = time.perf_counter()
    sprites = Sprites.draw(args.images, seed=args.seed, split="train")
    images, labels = tensors(sprites)
    net = standardise(train(images, labels, args.epochs, args.seed), images)
    heldout = accuracy(net, *tensors(Sprites.draw(5_000, seed=args.seed + 1, split="heldout")))
    about = dict(images=f"draw_sprites({args.images}, seed={args.seed}, split='train')",
                 images_sha256=hashlib.sha256(sprites.images.tobytes()).hexdigest(), seed=args.seed, epochs=args.epochs,
                 command=f"python tools/train_features.py --images {args.images} --epochs {args.epochs} --seed {args.seed}",
                 heldout_images=f"draw_sprites(5000, seed={args.seed + 1}, split='heldout')", heldout_accuracy=heldout,
                 torch=torch.__version__)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # one text in the header, so that the same weights always give the same bytes
    args.out.write_bytes(safetensors.torch.save(net.state_dict(), {"about": json.dumps(about)}))
    size, seconds = args.out.stat().st_size / 1000, time.perf_counter() - start
    print(f"wrote {args.out.name}: {size:.0f} kB, held-out accuracy {heldout:.4f}, {seconds:.0f} s")


if __name__ == "__main__": main()
