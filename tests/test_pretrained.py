"The shipped model is what its header says, and draws what it is asked for."
import hashlib

import torch

from conftest import ROOT
from diffusion_course.checkpoints import load_model, pretrained
from diffusion_course.context import one_hot
from diffusion_course.metrics import class_accuracy
from diffusion_course.sampling import clipped, ddpm, predictor, sample
from diffusion_course.sprites import CLASSES, Sprites

FILE = ROOT / "diffusion_course" / "pretrained" / "sprites.safetensors"


def test_header_tells_from_what_it_was_made():
    assert FILE.stat().st_size <= 4_000_000
    _, notes = load_model(FILE)
    assert tuple(notes["classes"]) == CLASSES and notes["quality"]["class_accuracy"] >= 0.95
    images = Sprites.draw(20_000, seed=notes["seed"]).images
    assert notes["data"] == f"Sprites.draw({len(images)}, seed={notes['seed']})"
    assert notes["data_sha256"] == hashlib.sha256(images.tobytes()).hexdigest(), "the sprites changed: `make pretrained`"


def test_64_sprites_by_ddpm_are_what_was_asked_for():
    net, schedule = pretrained("sprites")
    labels = torch.arange(64) % len(CLASSES)
    sprites = sample(clipped(predictor(net, schedule, one_hot(labels)), schedule), schedule, 64, sampler=ddpm, steps=100)
    assert class_accuracy(sprites, labels) >= 0.95
