"The command does what it says, says in one line what is wrong, and writes files whole or not at all."
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forked import forked
from PIL import Image

from diffusion_course import cli
from diffusion_course.arguments import SAMPLERS
from diffusion_course.checkpoints import load_model, save_model
from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import ddim, dpmpp_2m
from diffusion_course.few_steps import jumps
from diffusion_course.plots import save_images
from diffusion_course.precision import fast
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
    x = sample(clipped(predictor(fast(net), about["schedule"], one_hot("food")), about["schedule"]), about["schedule"], 3, sampler=ddim, steps=4, seed=5)
    assert Path("x.png").read_bytes() == save_images(here / "y.png", x, ncols=8).read_bytes()

def test_the_default_is_what_drew_best(here, small):
    "DPM-Solver++(2M) with fresh noise in 20 calls, not the deterministic walk."
    assert run("sample", "food", "--n", 3, "--model", small, "--out", "x.png") == 0
    net, about = load_model(small)
    predict = clipped(predictor(fast(net), about["schedule"], one_hot("food")), about["schedule"])
    x = sample(predict, about["schedule"], 3, sampler=partial(dpmpp_2m, eta=1.0), steps=20)
    assert Path("x.png").read_bytes() == save_images(here / "y.png", x, ncols=8).read_bytes()

@pytest.fixture
def jumper(here, small):
    "The same network, in a file that says that it jumps."
    net, about = load_model(small)
    return save_model(here / "jumper.safetensors", net, sampler="jumps", calls=3, **about)

@pytest.mark.parametrize("given, sampler, steps", [([], jumps, 3), (["--steps", 2], jumps, 2), (["--sampler", "ddim"], ddim, 3), (["--sampler", "jumps", "--steps", 1], jumps, 1)], ids=["default", "two", "ddim", "one"])
def test_a_model_may_say_how_it_draws_best(here, jumper, given, sampler, steps, capsys):
    assert run("sample", "food", "--n", 3, *given, "--model", jumper, "--out", "x.png") == 0
    net, about = load_model(jumper)
    x = sample(clipped(predictor(fast(net), about["schedule"], one_hot("food")), about["schedule"]), about["schedule"], 3, sampler=sampler, steps=steps)
    assert Path("x.png").read_bytes() == save_images(here / "y.png", x, ncols=8).read_bytes()
    assert f"{sampler.__name__}, {steps} steps" in capsys.readouterr().out

def test_jumps_need_a_network_that_has_learned_them(here, small, capsys):
    assert run("sample", "food", "--sampler", "jumps", "--model", small) == 2
    assert "sprites-fast" in one_line(capsys) and not Path("sprites.png").exists()

def test_sprites_in_two_calls(here, capsys):
    assert run("sample", "hero", "--n", 2, "--model", "sprites-fast", "--steps", 2) == 0
    assert "jumps, 2 steps" in capsys.readouterr().out and Image.open("sprites.png").format == "PNG"
    assert run("evaluate", "--model", "sprites-fast", "--n", 65) == 0
    assert "jumps, 4 steps" in capsys.readouterr().out
    assert run("info", "sprites-fast") == 0
    assert "jumps" in capsys.readouterr().out

@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "jumps"])
@pytest.mark.parametrize("context", ["none", "hero=1,food=0.6", "side-facing"])
def test_every_sampler_and_kind_of_context(here, small, sampler, context):
    assert run("sample", context, "--n", 2, "--sampler", sampler, "--steps", 3, "--guidance", 2, "--model", small, "--out", "made/x y ü.png") == 0
    assert Image.open("made/x y ü.png").format == "PNG"

def test_gif(here, small):
    assert run("sample", "hero", "--n", 2, "--steps", 6, "--model", small, "--out", "x.gif") == 0
    assert Image.open("x.gif").n_frames >= 6

@pytest.mark.parametrize("argv, words", [
    (["dragon"], "dragon"), (["hero=much"], "expected a number behind the ="), (["hero", "--steps", 101], "1 to T=100"), (["hero", "--steps", 0], "1 to T=100"), (["hero", "--n", 0], "--n 0"), (["hero", "--seed", -1], "--seed -1"),
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

@pytest.mark.parametrize("schedule, predicts", [("flow", "u"), ("flow", "v"), ("linear", "eps")])
def test_a_model_of_another_schedule(here, capsys, schedule, predicts):
    assert run(*TRAIN, "--steps", 2, "--schedule", schedule, "--predicts", predicts, "--out", "m.safetensors") == 0
    net, header = load_model("m.safetensors")
    assert net.predicts == predicts and torch.equal(header["schedule"].alpha_bar, getattr(Schedule, schedule)().alpha_bar)
    assert run("sample", "hero", "--model", "m.safetensors", "--steps", 3, "--n", 2, "--out", "m.png") == 0 and Path("m.png").exists()
    capsys.readouterr()

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
    (["--data", "nowhere"], "nowhere"), (["--data", "a.npy,b.npy"], "a.npy"), (["--steps", -1], "--steps -1"), (["--out", "x.pt"], ".safetensors"), (["--resume"], "no training to resume"), (["--n-feat", 7], "n_feat"),
    (["--predicts", "noise"], "predicts"), (["--schedule", "bent"], "--schedule bent"), (["--schedule", "flow", "--predicts", "eps"], "holds no picture"), (["--drop", 2], "--drop 2"), (["--images", 0], "--images 0"),
], ids=str)
def test_mistakes_in_train(here, capsys, argv, words):
    assert run(*TRAIN, *argv) == 2 and words in one_line(capsys) and not list(here.iterdir())


def pictures(folder, names, n=6, size=16):
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(n): Image.new("RGB", (size, size), (40 * k % 256, 5 * i % 256, 99 + i // 50)).save(folder / name / f"{i}.png")

QUICK = ["--steps", 2, "--batch-size", 4, "--n-feat", 8, "--size", 8, "--device", "cpu"]

def test_a_foreign_working_folder_is_refused_and_nothing_is_lost(here, capsys):
    "The folder of the data would be the folder of the training, which is removed at the end."
    pictures(here / "pets.training", ["cats"])
    before = {p: p.read_bytes() for p in here.rglob("*.png")}
    assert run("train", "--data", "pets.training", "--out", "pets.safetensors", *QUICK) == 2 and "pets.training" in one_line(capsys)
    assert {p: p.read_bytes() for p in here.rglob("*.png")} == before and not Path("pets.safetensors").exists()
    assert run("train", "--data", "pets.training", "--out", "other.safetensors", *QUICK) == 0, "the advice: another name"

def test_notes_in_the_working_folder_stay(here, capsys):
    assert run(*TRAIN, "--steps", 2) == 0 and not Path("model.training").exists()
    Path("model.training").mkdir()
    Path("model.training/notes.txt").write_text("mine")
    assert run(*TRAIN, "--steps", 2) == 2 and "notes.txt" in one_line(capsys)
    assert Path("model.training/notes.txt").read_text() == "mine"

def test_notes_that_come_later_stay_too(here, capsys, monkeypatch):
    from diffusion_course import checkpoints
    save = checkpoints.save_training
    def save_and_note(folder, *args, **kwargs):
        (Path(folder) / "notes.txt").write_text("mine")
        return save(folder, *args, **kwargs)
    monkeypatch.setattr(checkpoints, "save_training", save_and_note)
    assert run(*TRAIN, "--steps", 2) == 0
    assert [p.name for p in Path("model.training").iterdir()] == ["notes.txt"] and "notes.txt" in capsys.readouterr().out

@pytest.mark.parametrize("out, argv", [("x.png", ["sample", "hero"]), ("x.gif", ["sample", "hero"]), ("x.safetensors", [*TRAIN, "--steps", 2]),
                                       ("x.samples.png", [*TRAIN, "--steps", 2])], ids=str)
def test_a_file_of_somebody_else_is_not_overwritten(here, small, capsys, out, argv):
    Path(out).write_bytes(b"a photo of mine")
    target = out.replace(".samples.png", ".safetensors")
    assert run(*argv, "--out", target, *(["--model", small] if argv[0] == "sample" else [])) == 2
    said = one_line(capsys)
    assert out in said and Path(out).read_bytes() == b"a photo of mine" and not Path("x.training").exists()

def test_our_own_files_may_be_written_again(here, small):
    for _ in range(2):
        assert run("sample", "hero", "--n", 1, "--steps", 2, "--model", small) == 0
        assert run("sample", "hero", "--n", 1, "--steps", 2, "--model", small, "--out", "x.gif") == 0
        assert run(*TRAIN, "--steps", 2) == 0

def test_data_in_the_folder_where_the_model_goes(here):
    "The working folder is no class, also after a crash; nor are the sheet of samples and the model pictures of the set."
    pictures(here, ["cats", "dogs"])
    argv = ["train", "--data", ".", "--out", "mine.safetensors", *QUICK]
    stopping = "import sys, os; import diffusion_course.train_command as t; f = t._run\ndef die(bar, sampler, folder, *rest):\n    for step in bar: rest[-1](folder, step.state()); os._exit(9)\nt._run = die\nfrom diffusion_course.cli import main; main()"
    assert forked(stopping, *argv).returncode == 9
    assert list(Path("mine.training").glob("step-*"))
    assert run(*argv, "--resume") == 0
    assert load_model("mine.safetensors")[1]["classes"] == ["cats", "dogs"] and Path("mine.samples.png").exists()
    assert run(*argv[:3], "--out", "again.safetensors", *QUICK) == 0
    assert load_model("again.safetensors")[1]["classes"] == ["cats", "dogs"]

@pytest.mark.parametrize("change, word", [(["--predicts", "eps"], "network"), (["--schedule", "flow"], "schedule"), (["--n-feat", 16], "network"), (["--channels", 1], "image_shape|network"),
                                          (["--size", 16], "network|image_shape"), (["--drop", 0.3], "loss"), (["--lr", 0.1], "lr"), (["--seed", 4], "seed"),
                                          (["--data", "same-count"], "data"), (["--data", "other-names"], "classes"), (["--mirror"], "images"), (["--batch-size", 3], "batch_size")], ids=str)
def test_a_resumed_run_names_what_differs(here, capsys, change, word):
    pictures(here / "pets", ["cats", "dogs"]); pictures(here / "other-names", ["cats", "wolves"])
    pictures(here / "same-count", ["cats", "dogs"])
    Image.new("RGB", (16, 16), "lime").save(here / "same-count" / "dogs" / "3.png")
    stop = "import sys; import diffusion_course.train_command as t; f = t._Interrupted.__bool__; t._Interrupted.__bool__ = lambda s: True\nfrom diffusion_course.cli import main; sys.exit(main())"
    argv = ["train", "--data", "pets", "--steps", "6", *map(str, QUICK[2:])]
    assert forked(stop, *argv).returncode == 130
    kept = {p: p.read_bytes() for p in Path("model.training").iterdir()}
    assert run(*argv, "--resume", *change) == 2
    said = one_line(capsys)
    assert re.search(rf"cannot resume with other settings: .*({word}) was", said), said
    assert {p: p.read_bytes() for p in Path("model.training").iterdir()} == kept
    assert run(*argv, "--resume") == 0

@pytest.mark.parametrize("device", ["cuda", "mps", "gpu", "cuda:7", "meta"])
def test_a_device_that_is_not_there_is_one_line_before_the_work(here, capsys, device):
    if device == "cuda" and torch.cuda.is_available() or device == "mps" and torch.backends.mps.is_available(): pytest.skip("it is there")
    assert run("train", "--data", "nowhere", "--device", device) == 2
    said = one_line(capsys)
    assert f"--device {device}" in said and "cpu" in said and not list(here.iterdir())

def test_existing_folders_win_over_keywords_and_commas(here):
    for name in ("sprites", "cats, dogs"):
        pictures(here / name, ["wolf"])
        assert run("train", "--data", name, *QUICK) == 0
        assert load_model("model.safetensors")[1]["classes"] == ["wolf"], name

@pytest.mark.parametrize("name", ["none", "salt,pepper", "a=b", "10", "-x", "--model", "two words", "it's", "Käse", "猫", "$HOME", "a;b"])
def test_every_class_can_be_asked_for_and_the_suggestion_works(here, capsys, name):
    pictures(here / "set", ["zebra", name]) if name > "zebra" else pictures(here / "set", [name, "zebra"])
    assert run("train", "--data", "set", *QUICK) == 0
    offered = capsys.readouterr().out.split("try  ")[1].strip()
    words = shlex.split(offered)
    first = load_model("model.safetensors")[1]["classes"][0]
    assert words[:2] == ["diffusion-course", "sample"] and words[-1] == first
    assert run(*words[1:]) == 0
    asked = Path("sprites.png").read_bytes()
    position = load_model("model.safetensors")[1]["classes"].index(name if name != "Käse" else "K\u00e4se")
    assert run("sample", "--model", "model.safetensors", "--out", "a.png", "--", name) == 0
    net, about = load_model("model.safetensors")
    x = sample(clipped(predictor(fast(net), about["schedule"], torch.eye(2)[[position]]), about["schedule"]), about["schedule"], 16, sampler=partial(dpmpp_2m, eta=1.0), steps=20, shape=(3, 8, 8))
    assert Path("a.png").read_bytes() == save_images(here / "b.png", x, ncols=8).read_bytes()

def test_a_model_without_labels_refuses_a_class(here, capsys):
    pictures(here / "set", ["."] if False else ["only"])
    assert run("train", "--data", "set/only", *QUICK) == 0
    assert capsys.readouterr().out.strip().endswith("none")
    assert run("sample", "dragon", "--model", "model.safetensors") == 2
    assert "none" in one_line(capsys) and not Path("sprites.png").exists()
    assert run("sample", "none", "--model", "model.safetensors") == 0
    assert run("info", "model.safetensors") == 0 and "without classes" in capsys.readouterr().out

def test_numbers_are_classes_too(here, small):
    assert run("sample", 0, "--n", 2, "--steps", 2, "--model", small, "--out", "number.png") == 0
    assert run("sample", "hero", "--n", 2, "--steps", 2, "--model", small, "--out", "name.png") == 0
    assert Path("number.png").read_bytes() == Path("name.png").read_bytes()

def test_a_model_without_class_names_offers_numbers(here, capsys):
    save_model("old.safetensors", ContextUnet(n_feat=8, n_context=3), schedule=Schedule.cosine(50))
    assert run("sample", 5, "--model", "old.safetensors") == 2 and "0, 1, 2" in one_line(capsys)
    assert run("sample", 2, "--n", 1, "--steps", 2, "--model", "old.safetensors") == 0

@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_print_a_name_is_no_error(here, encoding):
    pictures(here / "set", ["猫", "собака"])
    code = "import sys; from diffusion_course.cli import main; sys.exit(main())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    def start(*argv): # one of them as a program of its own, in which also file names and arguments are ASCII
        if encoding != "ascii": return forked(code, *argv, encoding=encoding)
        return subprocess.run([sys.executable, "-c", code, *map(str, argv)], env=env, capture_output=True)
    done = start("train", "--data", "set", *QUICK)
    assert done.returncode == 0 and Path("model.safetensors").exists(), done.stderr
    done = start("sample", "猫", "--n", 1, "--steps", 2, "--model", "model.safetensors")
    assert done.returncode == 0 and Path("sprites.png").exists() and (b"\\u" in done.stdout or encoding == "utf-8"), done.stderr
    done = start("sample", "狗", "--model", "model.safetensors")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1

def test_a_reader_who_goes_away_is_no_error(here, small):
    code = "import sys; from diffusion_course.cli import main; sys.exit(main())"
    p = subprocess.run(f"{sys.executable} -c {shlex.quote(code)} info {small} | true; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash",
                       env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "Traceback" not in p.stderr and p.returncode == 0

@pytest.mark.parametrize("name, words", [("weights.pth", "pickle"), ("features", "sprites"), ("gone.pt", "gone.pt"), ("text.safetensors", "not a safetensors|is a|damaged|cut short")])
def test_what_is_no_model_is_named(here, capsys, name, words):
    if name == "weights.pth": torch.save({"w": torch.ones(3)}, name)
    if name == "text.safetensors": Path(name).write_text("hello")
    assert run("sample", "hero", "--model", name) == 2
    said = one_line(capsys)
    assert re.search(words, said) and "features" not in said.replace("'features'", ""), said

def test_samples_are_shown_on_the_way(here, capsys):
    pictures(here / "pets", ["cats", "dogs"])
    seen = {}
    from diffusion_course import checkpoints
    remove = checkpoints.remove_training
    def look(folder): seen.update({p.name: Image.open(p).size for p in Path(folder).glob("samples-*.png")}); return remove(folder)
    checkpoints.remove_training = look
    try: assert run("train", "--data", "pets", *QUICK[2:], "--steps", 5, "--every", 2) == 0
    finally: checkpoints.remove_training = remove
    assert sorted(seen) == [f"samples-{i:08d}.png" for i in (2, 4, 5)]
    width, height = seen["samples-00000002.png"]
    assert Image.open("model.samples.png").size == (width, 3 * height)
    said = capsys.readouterr().out
    assert "12 images in 2 classes" in said and "about" in said and "model.samples.png" in said

def test_a_run_that_ended_before_its_model_was_written_can_be_resumed(here):
    "The last checkpoint was saved, the model was not: the disk was full, say."
    argv = [*TRAIN, "--steps", "4", "--every", "2", "--out", "m.safetensors"]
    stop = "import sys, os; import diffusion_course.checkpoints as c; c.save_model = lambda *a, **k: os._exit(9)\nfrom diffusion_course.cli import main; main()"
    assert forked(stop, *argv).returncode == 9
    assert run(*argv, "--resume") == 0
    assert run(*argv[:-1], "whole.safetensors") == 0
    assert all(torch.equal(a, b) for a, b in zip(weights("m.safetensors").values(), weights("whole.safetensors").values()))

@pytest.mark.parametrize("argv", [["--size", 18], ["--size", 4], ["--size", 1024], ["--every", 0], ["--seed", -1], ["--steps", -3]], ids=str)
def test_more_mistakes_in_train(here, capsys, argv):
    assert run(*TRAIN, *argv) == 2 and argv[0] in one_line(capsys) and not list(here.iterdir())


# --- info, evaluate, lessons ---

def test_info_says_what_a_model_draws(here, capsys):
    pictures(here / "pets", ["cats", "dogs"])
    assert run("train", "--data", "pets", *QUICK) == 0 and capsys.readouterr()
    assert run("info", "model.safetensors") == 0
    said = capsys.readouterr().out
    for word in ("cats, dogs", "8 x 8", "colour", "pets", "predicts v", "T = 500", "12 images in 2 classes", "diffusion-course sample"): assert word in said, word
    assert run("info", "sprites") == 0
    said = capsys.readouterr().out
    for word in ("hero, non-hero", "16 x 16", "kid"): assert word in said, word

@pytest.fixture(scope="module")
def stickers(tmp_path_factory):
    "A folder of 1,300 pictures and a model of them, hardly trained."
    from diffusion_course.stickers import draw_stickers
    folder = tmp_path_factory.mktemp("own")
    draw_stickers(folder / "set", 1300, size=16)
    assert run("train", "--data", folder / "set", "--out", folder / "mine.safetensors", "--steps", 3, "--n-feat", 8, "--device", "cpu", "--mirror") == 0
    return folder

def quick_judge(monkeypatch, steps=40):
    from diffusion_course import judge
    fitted, fit = [], judge.fit_judge
    monkeypatch.setattr(judge, "fit_judge", lambda data: fitted.append(len(data)) or fit(data, steps=steps))
    return fitted

def test_evaluate_judges_a_model_of_own_pictures(stickers, capsys, monkeypatch):
    "By a judge of held-out pictures that is fitted once, kept beside the model and fitted anew for other pictures."
    fitted, argv = quick_judge(monkeypatch), ["evaluate", "--model", stickers / "mine.safetensors", "--data", stickers / "set", "--n", 70, "--steps", 2]
    (stickers / "mine.judge.safetensors").unlink(missing_ok=True)
    assert run(*argv) == 0
    first = capsys.readouterr().out
    for word in ("1,300 images in 5 classes", "kid", "kid_se", "coverage", "class_accuracy", "nearest", "copies", "samples", "real ones", "mine.judge.safetensors"): assert word in first, word
    assert "note" not in first and len(fitted) == 1 and 100 <= fitted[0] <= 200
    assert run(*argv) == 0 and len(fitted) == 1
    assert first[first.index("samples"):] == (second := capsys.readouterr().out)[second.index("samples"):]
    rows = {line.split()[0]: line.split()[-2:] for line in first.splitlines()[-8:]}
    assert float(rows["kid"][0]) > 2 * abs(float(rows["kid"][1])), "a model that is hardly trained is far from real pictures"

def test_evaluate_says_when_the_pictures_are_others(stickers, here, capsys, monkeypatch):
    from diffusion_course.stickers import draw_stickers
    fitted, argv = quick_judge(monkeypatch), ["evaluate", "--model", stickers / "mine.safetensors", "--n", 70, "--steps", 1]
    draw_stickers(here / "more", 1300, size=16, seed=5)
    assert run(*argv, "--data", stickers / "set") == 0 and "not the very pictures" not in capsys.readouterr().out
    known = len(fitted)
    assert run(*argv, "--data", here / "more") == 0 and "not the very pictures" in capsys.readouterr().out
    assert len(fitted) == known + 1, "the judge of other pictures does not know these"
    pictures(here / "pets", ["cats", "dogs"])
    assert run("evaluate", "--model", stickers / "mine.safetensors", "--data", here / "pets") == 2 and "expected the pictures that it learnt from" in one_line(capsys)
    assert run("evaluate", "--data", here / "pets") == 2 and "model file of yours" in one_line(capsys)
    assert run("evaluate", "--model", stickers / "mine.safetensors") == 2
    assert "--data" in one_line(capsys), "without --data it says what is missing"

def test_evaluate_with_few_pictures(here, capsys, monkeypatch):
    "Fewer than a judge needs: the training pictures are judged too, and a line says what that means; too few are refused."
    from diffusion_course.stickers import draw_stickers
    quick_judge(monkeypatch)
    draw_stickers(here / "some", 150, size=16); draw_stickers(here / "few", 60, size=16)
    for name in ("some", "few"): assert run("train", "--data", name, "--out", f"{name}.safetensors", "--steps", 2, "--n-feat", 8, "--batch-size", 8, "--device", "cpu") == 0
    capsys.readouterr()
    assert run("evaluate", "--model", "some.safetensors", "--data", "some", "--n", 70, "--steps", 1) == 0 and "would look good" in capsys.readouterr().out
    assert run("evaluate", "--model", "few.safetensors", "--data", "few", "--n", 70, "--steps", 1) == 2 and "100 or more" in capsys.readouterr().err

def test_a_foreign_file_in_the_place_of_the_judge_stays(stickers, here, capsys, monkeypatch):
    quick_judge(monkeypatch)
    Path("own.safetensors").write_bytes((stickers / "mine.safetensors").read_bytes())
    Path("own.judge.safetensors").write_bytes(b"mine")
    assert run("evaluate", "--model", "own.safetensors", "--data", stickers / "set", "--n", 70, "--steps", 1) == 2
    assert "own.judge.safetensors" in one_line(capsys) and Path("own.judge.safetensors").read_bytes() == b"mine"

def test_strips_are_cut_as_advised(here, capsys):
    pictures(here / "set", ["walk"])
    for i in range(3): Image.effect_noise((64, 16), 90).save(here / "set" / "walk" / f"strip{i}.png")
    assert run("train", "--data", "set", *QUICK) == 0
    advice = re.search(r"--strips cut", capsys.readouterr().out)
    assert advice and run("train", "--data", "set", *QUICK, *advice[0].split()) == 0
    assert "12 frames" in (said := capsys.readouterr().out) and "--strips" not in said
    assert run("train", "--data", "set", *QUICK, "--strips", "shred") == 2 and "keep or cut" in one_line(capsys)

def test_splits_as_advised(here, capsys):
    pictures(here / "set" / "train", ["cat"]); pictures(here / "set" / "val", ["cat"])
    assert run("train", "--data", "set", *QUICK) == 2
    folder = re.search(r"pass (\S+)", one_line(capsys))[1]
    assert run("train", "--data", folder, *QUICK) == 0 and load_model("model.safetensors")[1]["classes"] == ["cat"]
    assert not Path("model.training").exists()

def test_the_name_of_the_course_somewhere_is_no_mark(here, small, capsys):
    "A path in the metadata of somebody else's file, say."
    from PIL.PngImagePlugin import PngInfo
    from safetensors.torch import save_file
    text = PngInfo(); text.add_text("Source", "/home/me/diffusion_course/notes")
    Image.new("RGB", (8, 8)).save("shot.png", pnginfo=text)
    save_file({"w": torch.ones(2)}, "lora.safetensors", {"trained_on": "/home/me/diffusion_course/pets"})
    for name, argv in (("shot.png", ["sample", "hero", "--model", small]), ("lora.safetensors", [*TRAIN, "--steps", 2])):
        before = Path(name).read_bytes()
        assert run(*argv, "--out", name) == 2 and name in one_line(capsys) and Path(name).read_bytes() == before

def test_foreign_files_with_names_like_ours_stay(here, capsys):
    "In the working folder of a training: neither overwritten, nor pruned, nor removed at the end."
    stop = "import sys; import diffusion_course.train_command as t; t._Interrupted.__bool__ = lambda s: True\nfrom diffusion_course.cli import main; sys.exit(main())"
    argv = [*TRAIN, "--steps", "6", "--every", "2"]
    assert forked(stop, *argv).returncode == 130
    mine = {Path("model.training") / name: b"mine" for name in ("step-00000000.safetensors", "samples-00000004.png", "samples-best.png", "samples-zzz.png")}
    for path, blob in mine.items(): path.write_bytes(blob)
    assert run(*argv, "--resume") == 0 and Path("model.safetensors").exists()
    assert {p: p.read_bytes() for p in Path("model.training").iterdir()} == mine and "stays" in capsys.readouterr().out

def test_a_folder_with_a_foreign_state_is_no_training(here, capsys):
    Path("model.training").mkdir()
    Path("model.training/step-00000100.safetensors").write_bytes(b"mine")
    for more in ([], ["--resume"]):
        assert run(*TRAIN, "--steps", 2, *more) == 2
        said = one_line(capsys)
        assert "stays as it is" in said and "delete" not in said.lower()
    assert [p.name for p in Path("model.training").iterdir()] == ["step-00000100.safetensors"]

def test_names_with_blanks_are_classes_of_their_own(here, capsys):
    from diffusion_course.arguments import context_named
    assert context_named("cat", ("cat", "cat ")).tolist() == [[1, 0]] and context_named("cat ", ("cat", "cat ")).tolist() == [[0, 1]]
    assert context_named(" none", (" none", "x")).tolist() == [[1, 0]] and context_named("none", (" none", "x")) is None
    assert context_named("  ", ("  ", "x")).tolist() == [[1, 0]]

def test_a_suggestion_for_a_model_that_begins_with_a_dash(here, capsys):
    assert run(*TRAIN, "--steps", 2, "--out", "./-m.safetensors") == 0
    assert run(*shlex.split(capsys.readouterr().out.split("try  ")[1])[1:]) == 0

def test_arrays_of_any_number_of_classes(here, capsys):
    import numpy as np
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)); np.save("y.npy", np.arange(40) % 7)
    assert run("train", "--data", "x.npy,y.npy", *QUICK) == 0 and load_model("model.safetensors")[1]["classes"] == [str(k) for k in range(7)]
    assert run(*shlex.split(capsys.readouterr().out.split("try  ")[1])[1:]) == 0

def test_sheets_of_samples_beside_the_classes_are_no_pictures(here, capsys):
    pictures(here, ["cats", "dogs"])
    assert run("train", "--data", ".", *QUICK) == 0 and run("sample", "cats", "--model", "model.safetensors") == 0
    assert Path("sprites.png").exists() and run("train", "--data", ".", "--out", "again.safetensors", *QUICK) == 0
    assert "sheets of samples" in capsys.readouterr().out and load_model("again.safetensors")[1]["classes"] == ["cats", "dogs"]

@pytest.mark.parametrize("argv", [["--out", "M.SAFETENSORS"], ["--lr", "inf"], ["--lr", "nan"], ["--lr", 0], ["--n-feat", 7], ["--predicts", "q"], ["--seed", 10**20], ["--batch-size", 10**6]], ids=str)
def test_what_cannot_be_trained_is_refused_before_anything_is_read(here, capsys, argv):
    assert run("train", "--data", "nowhere", *argv) == 2
    assert "nowhere" not in one_line(capsys) and not list(here.iterdir())

def test_a_long_film_is_refused_before_the_work(here, small, capsys):
    assert run("sample", "hero", "--n", 300, "--model", small, "--out", "x.gif") == 2 and "--n 300: expected 1 to 256" in one_line(capsys)
    assert not list(here.iterdir())

def test_a_full_disk_is_one_line_and_the_checkpoint_stays(here, capsys, monkeypatch):
    from diffusion_course import checkpoints
    def full(*args, **kwargs): raise OSError(28, "No space left on device", "model.safetensors")
    with monkeypatch.context() as m:
        m.setattr(checkpoints, "save_model", full)
        assert run(*TRAIN, "--steps", 2) == 2 and "No space left" in one_line(capsys)
    assert list(Path("model.training").glob("step-*")) and run(*TRAIN, "--steps", 2, "--resume") == 0

def test_memory_does_not_grow_with_the_number_of_sprites(here, small):
    "Drawn in batches: 3,000 take hardly more than 500, which are one batch; all at once they would take 270 MB more."
    # the high-water mark of this program alone; ru_maxrss would begin at the peak of the process that started it
    if not Path("/proc/self/status").exists(): pytest.skip("only Linux tells the peak of one process")
    code = "import sys, re; from diffusion_course.cli import main; print(main()); print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    def peak(n): # in MB
        done = subprocess.run([sys.executable, "-c", code, "sample", "hero", "--n", str(n), "--steps", "1", "--model", small, "--out", "many.png", "--ncols", "100"],
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.stdout.split()[-2] == "0", done.stderr
        return int(done.stdout.split()[-1]) / 1024
    few, many = peak(500), peak(3000)
    assert many < few + 120, f"{few:.0f} MB and {many:.0f} MB"


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
