"The command `edit`: what is black in the mask stays to the last bit, what is wrong is said in one line, and nothing of the user's is touched."
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import here, one_line, run, small  # noqa: F401 (fixtures)

from diffusion_course.arguments import context_named, model_named, prediction
from diffusion_course.checkpoints import save_model
from diffusion_course.editing import from_sketch, inpaint
from diffusion_course.fast_sampling import dpmpp_2m
from diffusion_course.plots import to_uint8
from diffusion_course.sampling import Schedule, sample
from diffusion_course.unet import ContextUnet


def picture(name="p.png", w=16, h=16, scale=1, mode="RGB", seed=0):
    "Random blocks, so that a change anywhere is seen."
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8).repeat(scale, 0).repeat(scale, 1)
    Image.fromarray(pixels).convert(mode).save(name)
    return np.asarray(Image.open(name))

def mask(name="m.png", w=16, h=16, white=lambda rows, columns: columns >= 8):
    rows, columns = np.indices((h, w))
    Image.fromarray(np.where(white(rows, columns), 255, 0).astype(np.uint8)).save(name)
    return name


def test_fill_is_inpaint(here, small):
    given = picture()
    assert run("edit", "p.png", "--mask", mask(), "--as", "food", "--n", 1, "--steps", 4, "--resample", 2, "--seed", 3, "--model", small, "--out", "new.png") == 0
    chosen = model_named(small)
    known = torch.from_numpy(given.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    keep = torch.arange(16).expand(16, 16) < 8
    x = sample(prediction(chosen, context_named("food", chosen.classes), 2.0), chosen.schedule, 1, steps=4, seed=3, sampler=partial(inpaint, known=known, mask=keep, resample=2))
    new = np.asarray(Image.open("new.png"))
    assert (new == to_uint8(x)[0]).all() and (new[:, :8] == given[:, :8]).all() and (new[:, 8:] != given[:, 8:]).any()

def test_without_a_mask_it_is_a_sketch(here, small):
    given = picture()
    assert run("edit", "p.png", "--as", "hero", "--start", 0.3, "--steps", 4, "--seed", 2, "--guidance", 1, "--model", small, "--out", "new.png") == 0
    chosen = model_named(small)
    known = torch.from_numpy(given.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    x = from_sketch(prediction(chosen, context_named("hero", chosen.classes), 1.0), known, chosen.schedule, 30, sampler=partial(dpmpp_2m, eta=1.0), steps=4, seed=2)
    assert (np.asarray(Image.open("new.png")) == to_uint8(x)[0]).all()

@pytest.mark.parametrize("w, h, scale", [(16, 16, 4), (16, 8, 4), (8, 16, 1), (16, 16, 1)])
def test_what_is_black_stays_in_any_size(here, small, w, h, scale):
    given = picture(w=w, h=h, scale=scale)
    mask(w=w * scale, h=h * scale, white=lambda rows, columns: rows < h * scale // 2)
    assert run("edit", "p.png", "--mask", "m.png", "--steps", 3, "--model", small, "--out", "new.png") == 0
    new = np.asarray(Image.open("new.png"))
    assert new.shape == given.shape and (new[h * scale // 2:] == given[h * scale // 2:]).all() and (new[:h * scale // 2] != given[:h * scale // 2]).any()

@pytest.mark.parametrize("size", [(100, 60), (7, 5), (333, 500), (1, 1)])
def test_any_picture_can_be_edited(here, small, capsys, size):
    picture(w=size[0], h=size[1])
    assert run("edit", "p.png", "--steps", 2, "--model", small) == 0
    w, h = Image.open("edited.png").size
    assert max(w, h) % 16 == 0 and abs(w * size[1] - h * size[0]) <= max(size) * max(w, h) / 16
    assert f"it was brought to that size, and the result is {w} x {h}" in capsys.readouterr().out

def test_it_says_what_was_done(here, small, capsys):
    picture(w=16, h=8)
    assert run("edit", "p.png", "--mask", mask(w=16, h=8), "--steps", 3, "--model", small) == 0
    assert "64 of 128 pixels drawn anew" in capsys.readouterr().out
    assert run("edit", "p.png", "--start", 0.1, "--steps", 40, "--model", small) == 0 # T is 100: ten are left
    assert ", 10 steps," in capsys.readouterr().out

@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
def test_any_mode(here, small, mode):
    picture(mode=mode)
    Image.open(mask()).convert(mode).save("m.png")
    assert run("edit", "p.png", "--mask", "m.png", "--steps", 2, "--model", small) == 0 and Image.open("edited.png").mode == "RGB"

def test_a_model_of_another_size_and_kind(here):
    torch.manual_seed(0)
    save_model("own.safetensors", ContextUnet(n_feat=8, in_channels=1, n_context=0, predicts="u"), schedule=Schedule.flow(50), classes=[], size=24)
    picture(w=24, h=24)
    assert run("edit", "p.png", "--mask", mask(w=24, h=24), "--steps", 3, "--model", "own.safetensors", "--n", 3, "--ncols", 2) == 0
    assert Image.open("edited.png").size == (24 * 2 + 3, 24 * 2 + 3)

def test_the_same_seed_the_same_result(here, small):
    picture()
    for out, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)): assert run("edit", "p.png", "--steps", 3, "--seed", seed, "--model", small, "--out", out) == 0
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c

@pytest.mark.parametrize("argv, words", [
    (["gone.png"], "there is no such picture"), (["folder.png"], "there is no such picture"), (["broken.png"], "cannot be edited"), (["empty.png"], "empty file"), (["p.png", "--mask", "gone.png"], "there is no such picture"),
    (["p.png", "--mask", "small.png"], "expected a mask of the same size"), (["p.png", "--mask", "black.png"], "black all over"), (["p.png", "--mask", "white.png"], "white all over"), (["p.png", "--as", "dragon"], "dragon"),
    (["p.png", "--start", 0], "--start 0"), (["p.png", "--start", 1.5], "--start 1.5"), (["p.png", "--steps", 0], "T=100"), (["p.png", "--steps", 101], "T=100"), (["p.png", "--n", 0], "--n 0"), (["p.png", "--resample", 0], "--resample 0"),
    (["p.png", "--seed", -1], "--seed -1"), (["p.png", "--out", "x.jpg"], ".png"), (["p.png", "--out", "p.png"], "is what is edited"), (["p.png", "--mask", "m.png", "--out", "m.png"], "is what is edited"), (["p.png", "--out", "mine.png"], "not a file of this package"),
    (["p.png", "--model", "gone.safetensors"], "gone.safetensors"), (["p.png", "--as", "food", "--guidance", "nan"], "scale"),
], ids=str)
def test_mistakes(here, small, capsys, argv, words):
    picture()
    mask()
    picture("mine.png", seed=1)
    Path("folder.png").mkdir()
    Path("broken.png").write_bytes(Path("p.png").read_bytes()[:40])
    Path("empty.png").touch()
    mask("small.png", w=8)
    mask("black.png", white=lambda r, c: r < 0)
    mask("white.png", white=lambda r, c: r >= 0)
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert run("edit", *argv, *([] if "--model" in argv else ["--model", small])) == 2
    assert words in one_line(capsys)
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before

def test_a_result_of_ours_may_be_edited_and_replaced_but_not_by_itself(here, small, capsys):
    picture()
    for _ in range(2): assert run("edit", "p.png", "--steps", 2, "--model", small) == 0 # the second replaces the first
    assert run("edit", "edited.png", "--steps", 2, "--model", small, "--out", "again.png") == 0
    capsys.readouterr()
    assert run("edit", "edited.png", "--steps", 2, "--model", small) == 2 and "is what is edited" in one_line(capsys)
    os.symlink("edited.png", "link.png")
    assert run("edit", "edited.png", "--steps", 2, "--model", small, "--out", "link.png") == 2

def test_nothing_is_half_written(here, small, capsys, monkeypatch):
    picture()
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert run("edit", "p.png", "--steps", 2, "--model", small) == 2
    assert "No space left" in one_line(capsys) and sorted(p.name for p in here.iterdir()) == ["p.png"]
