"The command does what it says, says in one line what is wrong, and writes files whole or not at all."
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

from diffusion_course import cli
from diffusion_course.checkpoints import load_model, save_model
from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import ddim
from diffusion_course.plots import save_images
from diffusion_course.sampling import Schedule, clipped, predictor, sample
from diffusion_course.unet import ContextUnet

TRAIN = ["train", "--images", "64", "--batch-size", "8", "--n-feat", "8", "--device", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A model file that answers quickly."
    torch.manual_seed(0)
    net = ContextUnet(n_feat=8, predicts="v")
    for p in net.parameters(): torch.nn.init.normal_(p, std=0.1)
    return str(save_model(tmp_path_factory.mktemp("model") / "small.safetensors", net, schedule=Schedule.cosine(100), classes=["hero", "non-hero", "food", "spell", "side-facing"], size=16))

def run(*argv): # exit code, also where argparse ends the process
    try: return cli.main([str(a) for a in argv])
    except SystemExit as end: return end.code

def one_line(capsys):
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "Traceback" not in err, err
    return err


# --- sample ---

def test_sample_is_sample(here, small):
    assert run("sample", "food", "--n", 3, "--sampler", "ddim", "--steps", 4, "--seed", 5, "--model", small, "--out", "x.png") == 0
    net, about = load_model(small)
    x = sample(clipped(predictor(net, about["schedule"], one_hot("food")), about["schedule"]), about["schedule"], 3, sampler=ddim, steps=4, seed=5)
    assert Path("x.png").read_bytes() == save_images(here / "y.png", x, ncols=8).read_bytes()

@pytest.mark.parametrize("sampler", cli.SAMPLERS)
@pytest.mark.parametrize("context", ["none", "hero=1,food=0.6", "side-facing"])
def test_every_sampler_and_kind_of_context(here, small, sampler, context):
    assert run("sample", context, "--n", 2, "--sampler", sampler, "--steps", 3, "--guidance", 2, "--model", small, "--out", "made/x y ü.png") == 0
    assert Image.open("made/x y ü.png").format == "PNG"

def test_gif(here, small):
    assert run("sample", "hero", "--n", 2, "--steps", 6, "--model", small, "--out", "x.gif") == 0
    assert Image.open("x.gif").n_frames >= 6

@pytest.mark.parametrize("argv, words", [
    (["dragon"], "dragon"), (["hero=much"], "a class and a number"), (["hero", "--steps", 101], "1 to T=100"), (["hero", "--steps", 0], "1 to T=100"), (["hero", "--n", 0], "--n 0"), (["hero", "--seed", -1], "--seed -1"),
    (["hero", "--sampler", "euler"], "ddpm, ddim, heun"), (["hero", "--sampler", "ddim", "--eta", 2], "--eta 2"), (["hero", "--sampler", "heun", "--eta", 0.5], "ddim or dpmpp_2m"), (["hero", "--out", "x.jpg"], ".png or .gif"),
    (["hero", "--model", "gone.safetensors"], "gone.safetensors"), (["hero", "--model", "cats"], "cats"), (["hero", "--out", "folder.png"], "is a folder"), (["hero", "--out", "file/x.png"], "file"), (["hero", "--ncols", 0], "--ncols 0"),
], ids=str)
def test_mistakes_in_sample(here, small, capsys, argv, words):
    Path("folder.png").mkdir()
    Path("file").write_text("")
    before = sorted(here.rglob("*"))
    assert run("sample", *argv, *([] if "--model" in argv else ["--model", small])) == 2
    assert words in one_line(capsys) and sorted(here.rglob("*")) == before

@pytest.mark.parametrize("argv", [["sample"], ["sample", "hero", "--steps", "ten"], ["sample", "hero", "--nonsense"], ["paint"], []], ids=str)
def test_arguments_that_cannot_be_read(argv, capsys):
    assert run(*argv) == 2
    if argv: one_line(capsys)

@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_tells_every_parameter(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    import inspect
    for name in inspect.signature(cli.COMMANDS[command]).parameters: assert name in text or name.replace("_", "-") in text or name.replace("_", " ") in text

def test_help_imports_nothing_heavy():
    code = "import sys; from diffusion_course.cli import main\ntry: main(['sample', '--help'])\nexcept SystemExit: pass\nprint([m for m in ('torch', 'numpy', 'matplotlib', 'PIL', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip().endswith("[]")


# --- train ---

def weights(path): return load_model(path)[0].state_dict()

def test_train_on_a_folder_then_sample(here):
    for name, value in (("cats", 40), ("dogs", 220)):
        (here / "pets" / name).mkdir(parents=True)
        for i in range(6): Image.new("RGB", (16, 16), (value, 10 * i, 99)).save(here / "pets" / name / f"{i}.png")
    assert run("train", "--data", "pets", "--out", "pets.safetensors", "--steps", 3, "--batch-size", 4, "--n-feat", 8, "--size", 8, "--device", "cpu") == 0
    assert load_model("pets.safetensors")[1]["classes"] == ["cats", "dogs"] and not Path("pets.training").exists()
    assert run("sample", "dogs", "--n", 2, "--steps", 2, "--model", "pets.safetensors", "--out", "dog.png") == 0
    assert Image.open("dog.png").size == (8 * (2 * 8 + 3), 8 * (8 + 2))

def test_interrupted_and_resumed_is_uninterrupted(here, capsys):
    assert run(*TRAIN, "--steps", 12, "--out", "whole.safetensors") == 0
    command = [sys.executable, "-c", "import sys; from diffusion_course.cli import main; sys.exit(main())", *TRAIN, "--steps", "12", "--out", "parts.safetensors"]
    slow = [*command[:2], command[2].replace("import sys;", "import sys, time, diffusion_course.training as t; f = t.progress; t.progress = lambda loop, n: (time.sleep(0.3) or s for s in f(loop, n));"), *command[3:]]
    process = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True)
    heard = ""
    while not re.search(r"\b[1-9]\d*/12", heard): heard += (more := os.read(process.stdout.fileno(), 10_000).decode(errors="ignore")); assert more, process.communicate()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err and not Path("parts.safetensors").exists()
    assert run(*TRAIN, "--steps", 12, "--out", "parts.safetensors") == 2 and "--resume" in one_line(capsys)
    assert run(*TRAIN, "--steps", 12, "--out", "parts.safetensors", "--resume") == 0
    whole, parts = weights("whole.safetensors"), weights("parts.safetensors")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)

@pytest.mark.parametrize("argv, words", [
    (["--data", "nowhere"], "nowhere"), (["--data", "a.npy,b.npy"], "a.npy"), (["--steps", 0], "--steps 0"), (["--out", "x.pt"], ".safetensors"), (["--resume"], "no training to resume"), (["--n-feat", 7], "n_feat"),
    (["--predicts", "noise"], "predicts"), (["--drop", 2], "--drop 2"), (["--images", 0], "--images 0"),
], ids=str)
def test_mistakes_in_train(here, capsys, argv, words):
    assert run(*TRAIN, *argv) == 2 and words in one_line(capsys) and not list(here.iterdir())


# --- evaluate, lessons ---

def test_evaluate_prints_the_metrics(here, small, capsys):
    assert run("evaluate", "--model", small, "--n", 70, "--steps", 2) == 0
    text = capsys.readouterr().out
    for word in ("kid", "frechet", "coverage", "class_accuracy", "nearest", "samples", "real ones"): assert word in text

@pytest.mark.parametrize("argv, words", [(["--n", 10], "at least 65"), (["--model", "gone.safetensors"], "gone"), (["--sampler", "x"], "ddpm")], ids=str)
def test_mistakes_in_evaluate(here, capsys, argv, words): assert run("evaluate", *argv) == 2 and words in one_line(capsys)

def test_lessons_are_copied_and_nothing_is_overwritten(here, capsys):
    (here / "mine").mkdir()
    (here / "mine" / "L1_Sampling.ipynb").write_text("my answers")
    assert run("lessons", "--to", "mine", "--no-open") == 0 and "1 files were there already" in capsys.readouterr().out
    assert (here / "mine" / "L1_Sampling.ipynb").read_text() == "my answers"
    copied = {p.relative_to(here / "mine").as_posix() for p in (here / "mine").rglob("*.ipynb")}
    assert copied == {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert json.loads((here / "mine" / "L2_Training.ipynb").read_text())["cells"]

def test_without_jupyter(here, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("lessons") == 2 and "pip install" in one_line(capsys)
