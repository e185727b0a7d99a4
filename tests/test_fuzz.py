"""Hostile input: every case ends in the right result or in an exception that the docstring names. Never a crash, a hang, NaN or a silent broadcast.

The normal run is small and always the same; `make fuzz`, or FUZZ=50 in the environment, tries fifty times as many cases, new ones each time."""
import inspect
import io
import json
import math
import os
import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import random_unet
from PIL import Image

from diffusion_course import arguments, arrays as array_files, checkpoints, cli, context, disk, edit_command, editing, evaluate_command, fast_sampling, few_steps, flow_matching, folders, identity, judge, metrics, pictures, plots, sampling, sprites, stickers, train_command, training, unet
from diffusion_course.sampling import Schedule, initial_noise, predictor

FUZZ = int(os.environ.get("FUZZ", "1"))
S, NET = Schedule.cosine(50), random_unet(n_feat=8)


def fuzz(examples): # `examples` cases in the normal run
    return settings(max_examples=examples * FUZZ, deadline=None, derandomize=FUZZ == 1, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture])


def named(f):
    "The exceptions that the docstring of a function (or of its class) names."
    text = (inspect.getdoc(f) or "") + (inspect.getdoc(getattr(f, "__self__", None)) or "" if inspect.ismethod(f) else "")
    known = {"CheckpointError": checkpoints.CheckpointError, "TrainingDiverged": training.TrainingDiverged}
    found = [known.get(name) or getattr(__import__("builtins"), name) for name in re.findall(r"\b(\w+Error|TrainingDiverged)\b", text) if name in known or hasattr(__import__("builtins"), name)]
    if "`features`" in text and f is not metrics.features: found += named(metrics.features) # "Errors as for `features`"
    return tuple(found)


def attempt(f, *args, **kwargs):
    "The result, or None where f refused with an exception that its docstring names; anything else is a failure."
    try: return f(*args, **kwargs)
    except named(f) as refusal:
        assert str(refusal).strip(), "an exception without a message"
        return None


# --- strategies ---

numbers = st.one_of(st.integers(-5, 60), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
shapes = st.one_of(st.sampled_from([(2, 3, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8), (2, 8, 8, 3), (2, 1, 8, 8), (2, 3, 16, 16), (2, 3, 7, 8), (3, 8, 8), (2,), (), (0, 3, 8, 8)]), st.lists(st.integers(0, 5), max_size=5).map(tuple))
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
scales = st.sampled_from([1.0, 1.0, 255.0, 0.0, 1e20, math.nan, math.inf])

@st.composite
def images(draw):
    x = torch.rand(draw(shapes), generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))) * 2 - 1
    return (x * draw(scales)).nan_to_num(0, 0, 0).to(draw(dtypes)) if draw(st.booleans()) else x

@st.composite
def times(draw):
    return draw(st.one_of(numbers, st.lists(st.integers(-2, 60), max_size=4).map(torch.tensor), st.lists(st.floats(0, 50), min_size=1, max_size=3).map(torch.tensor), st.integers(1, 50).map(lambda t: torch.tensor([t, 1]))))

def contexts(): return st.one_of(st.none(), images(), st.tuples(st.integers(0, 4), st.integers(3, 6)).map(lambda s: torch.ones(s)))

def good_image(x): return isinstance(x, torch.Tensor) and x.is_floating_point()


# --- numbers ---

@fuzz(200)
@given(st.one_of(st.lists(st.floats(), max_size=6), st.lists(st.floats(0, 1), max_size=6).map(lambda x: [1.0, *sorted(x, reverse=True)])))
def test_schedules(values):
    schedule = attempt(Schedule, values)
    if schedule is not None: assert schedule.alpha_bar[0] == 1 and (schedule.alpha_bar.diff() < 0).all() and schedule.alpha_bar[-1] > 0

@fuzz(200)
@given(numbers, st.sampled_from(["trailing", "quadratic", "", None]))
def test_timesteps(n, spacing):
    ts = attempt(S.timesteps, n, spacing)
    if ts is not None: assert ts[0] == 50 and ts[-1] == 0 and len(ts) == n + 1 and all(a > b for a, b in zip(ts, ts[1:]))

@fuzz(100)
@given(numbers, numbers, numbers)
def test_schedules_from_numbers(T, low, high):
    if isinstance(T, int) and not isinstance(T, bool) and T > 2000: T = 2000 # a long table is no mistake
    attempt(Schedule.cosine, T)
    if all(isinstance(x, float) for x in (low, high)): attempt(Schedule.linear, T, low, high)

@fuzz(300)
@given(images(), times(), images())
def test_add_noise(x0, t, eps):
    xt = attempt(training.add_noise, x0, t, eps, S)
    if xt is not None: assert xt.shape == x0.shape == eps.shape and xt.dtype == x0.dtype == eps.dtype

@fuzz(300)
@given(images(), images(), times(), times())
def test_posterior(x0, xt, t, s):
    result = attempt(sampling.posterior, x0, xt, t, s, S)
    if result is not None: assert result[0].shape == xt.shape and (result[1] >= 0).all()

@fuzz(300)
@given(images(), times(), contexts())
def test_networks(x, t, c):
    y = None
    try: y = NET(x, t, c)
    except (ValueError, TypeError) as refusal: assert str(refusal)
    if y is not None: assert y.shape == x.shape and (y.isfinite().all() or not x.abs().max() < 100)

@fuzz(200)
@given(images(), times(), contexts())
def test_predictions(x, t, c):
    predict = predictor(NET, S, c)
    try: pred = predict(x, t)
    except (ValueError, TypeError) as refusal:
        assert str(refusal)
        return
    assert pred.x0.shape == pred.eps.shape == x.shape

@fuzz(200)
@given(st.lists(st.integers(-3, 60), max_size=5), st.sampled_from([sampling.ddpm, fast_sampling.ddim, fast_sampling.heun, fast_sampling.dpmpp_2m]), numbers)
def test_walks(ts, sampler, eta):
    options = dict(eta=eta) if sampler is fast_sampling.ddim and isinstance(eta, float) else {}
    def predict(xt, t): return sampling.prediction_from_x0(torch.tanh(xt), xt, t, S)
    def walk(): return list(sampler(predict, initial_noise(2, (2,)), S, ts, **options))
    walk.__doc__ = sampler.__doc__
    steps = attempt(walk)
    if steps is not None: assert steps[-1].s == 0 and steps[-1].xs.isfinite().all()

@fuzz(200)
@given(numbers, st.one_of(numbers, st.lists(st.integers(-2, 9), max_size=3)), numbers)
def test_samples(n, indices, seed):
    if isinstance(n, int) and n > 20: n = 20
    for wanted in (n, indices):
        if isinstance(wanted, int) and wanted > 20: continue # a large batch is no mistake
        def draw(): return sampling.sample(lambda xt, t: sampling.prediction_from_x0(torch.tanh(xt), xt, t, S), S, wanted, steps=3, shape=(2,), seed=seed)
        draw.__doc__ = sampling.sample.__doc__
        x = attempt(draw)
        if x is not None: assert x.isfinite().all()


# --- contexts ---

names = st.one_of(st.sampled_from([*sprites.CLASSES, "dragon", ""]), numbers)

@fuzz(200)
@given(st.one_of(names, st.lists(names, max_size=4)))
def test_one_hot(wanted):
    c = attempt(context.one_hot, wanted)
    if c is not None: assert c.shape[1] == 5 and (c.sum(1) == 1).all() and c.dtype == torch.float32

@fuzz(200)
@given(st.dictionaries(st.sampled_from([*sprites.CLASSES, "dragon", 3, 7]), numbers, max_size=4))
def test_mix(weights):
    c = attempt(context.mix, weights)
    if c is not None: assert c.shape == (1, 5) and c.isfinite().all()

@fuzz(100)
@given(contexts().filter(lambda c: c is not None), numbers)
def test_drop_context(c, p):
    dropped = attempt(context.drop_context, c, p)
    if dropped is not None: assert dropped.shape == c.shape

@fuzz(300)
@given(st.text(max_size=20).map(lambda text: text.replace("\x00", "")), st.booleans())
def test_context_of_the_command(text, valid):
    try: c = arguments.context_named("hero=1,food=" + text if valid else text, sprites.CLASSES)
    except ValueError as refusal: assert str(refusal)
    else: assert c is None or (c.shape == (1, 5) and c.isfinite().all())

names = st.lists(st.one_of(st.text(min_size=1, max_size=6), st.sampled_from(["none", "a", "a=b", "a,b", "1", "0=1", "hero", " x", "=", ","])), min_size=1, max_size=6)

@fuzz(300)
@given(names, st.data())
def test_any_class_can_be_asked_for(found, data):
    "As a name of a folder is kept: whatever the names are, each alone and any two with weights reach their classes."
    classes = list(dict.fromkeys(name for text in found if (name := folders._shown(text).strip())))
    if not classes: return
    for i, name in enumerate(classes): assert arguments.weights_named(name, classes) == {i: 1.0}
    i, j = (data.draw(st.integers(0, len(classes) - 1)) for _ in range(2))
    try: both = arguments.weights_named(f"{classes[i]}=0.5,{classes[j]}=0.25", classes)
    except ValueError as refusal: assert str(refusal)
    else: assert abs(sum(both.values()) - 0.75) < 1e-9 or any("=" in c or "," in c for c in classes)

@fuzz(60)
@given(st.lists(st.sampled_from(["sample", "train", "evaluate", "lessons", "--n", "-1", "0", "hero", "dragon", "--steps", "--out", "x.jpg", "--seed", "--eta", "nan", "--", "=", "--resume", "--help", "", "é ü"]), max_size=5).filter(
    lambda argv: not (argv[:1] == ["lessons"]) and not (argv[:1] in (["sample"], ["train"], ["evaluate"]) and not {"-1", "x.jpg", "dragon", "--help", "nan", "--resume", "=", "--"} & set(argv))))
def test_arguments_of_the_command(argv):
    stop = {"sample": ["--n", "-1"], "train": ["--steps", "-1"], "evaluate": ["--n", "-1"]}.get(argv[0] if argv else "", []) # so that nothing long begins
    try: code = cli.main([*argv, *stop])
    except SystemExit as end: code = end.code
    assert code in (0, 2)


# --- metrics and pictures ---

@fuzz(100)
@given(images(), images(), st.sampled_from([metrics.features, metrics.class_probabilities]))
def test_features(a, b, f):
    x = attempt(f, a)
    if x is not None: assert x.isfinite().all() and len(x) == len(a)
    for pair in (metrics.kid, metrics.frechet_distance, metrics.coverage, metrics.nearest):
        value = attempt(pair, a, b)
        if value is not None: assert value is not None

@fuzz(100)
@given(images(), st.one_of(st.lists(st.integers(-2, 7), max_size=3).map(torch.tensor), numbers))
def test_class_accuracy(x, labels):
    value = attempt(metrics.class_accuracy, x, labels)
    if value is not None: assert 0 <= value <= 1


# --- files ---

def mutated(blob, draw):
    "The bytes, damaged: changed, cut, grown, or with a part repeated."
    blob = bytearray(blob)
    for _ in range(draw(st.integers(1, 4))):
        if not blob: break
        i = draw(st.integers(0, min(len(blob), 400) - 1) if draw(st.booleans()) else st.integers(0, len(blob) - 1)) # often in the header
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "repeat", "zero"]))
        if kind == "flip": blob[i] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set": blob[i] = draw(st.integers(0, 255))
        elif kind == "cut": del blob[i:i + draw(st.integers(1, len(blob)))]
        elif kind == "insert": blob[i:i] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "repeat": blob[i:i] = blob[i:i + 50]
        else: blob[i:i + 8] = bytes(min(8, len(blob) - i))
    return bytes(blob)

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "größe 1.safetensors" # spaces and other letters in the name
    return checkpoints.save_model(path, random_unet(n_feat=8), schedule=S, note="ü")

@fuzz(300)
@given(st.data())
def test_damaged_models(model, data):
    blob = model.read_bytes()
    bad = model.with_name("bad.safetensors")
    bad.write_bytes(mutated(blob, data.draw))
    net = attempt(checkpoints.load_model, bad)
    if net is not None: assert bad.read_bytes() == blob, "a damaged file was taken for a good one"

json_values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)), lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.text(max_size=5), x, max_size=3)), max_leaves=5)

@fuzz(100)
@given(st.dictionaries(st.sampled_from(["in_channels", "n_feat", "n_context", "predicts", "evil"]), st.one_of(st.integers(-9, 99), json_values), max_size=5), json_values)
def test_hostile_headers_with_a_right_checksum(model, config, schedule):
    tensors, header = checkpoints._unpack(model.read_bytes(), "model")
    about = {key: header[key] for key in ("model", "metadata")} | dict(config=json.dumps(config), schedule=json.dumps(schedule))
    bad = model.with_name("hostile.safetensors")
    bad.write_bytes(checkpoints._pack("model", tensors, **about))
    result = attempt(checkpoints.load_model, bad)
    if result is not None: assert result[0].config["n_feat"] == 8

def test_a_pickle_is_never_loaded(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "owned"),)
    torch.save(Evil(), tmp_path / "evil.safetensors")
    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(checkpoints.CheckpointError): checkpoints.load_model(tmp_path / "evil.safetensors")
    with pytest.raises(checkpoints.CheckpointError): checkpoints.resume_training(tmp_path / "evil.safetensors")
    with pytest.raises(TypeError): pictures.Sprites.from_npy(tmp_path / "evil.npy", tmp_path / "evil.npy")
    assert not (tmp_path / "owned").exists()

@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays é ü")
    drawn, labels = sprites.draw_sprites(20, seed=0)
    np.save(folder / "images.npy", drawn)
    np.save(folder / "labels.npy", np.eye(5)[labels])
    return folder

@fuzz(300)
@given(st.data(), st.sampled_from(["images.npy", "labels.npy"]))
def test_damaged_arrays(arrays, data, which):
    paths = {name: arrays / name for name in ("images.npy", "labels.npy")}
    bad = arrays / "bad.npy"
    bad.write_bytes(mutated(paths[which].read_bytes(), data.draw))
    paths[which] = bad
    found = attempt(pictures.Sprites.from_npy, *paths.values(), split="all")
    if found is not None:
        x, c = found.batch(range(len(found)))
        assert x.shape == (20, 3, 16, 16) and x.abs().max() <= 1 and (c.sum(1) == 1).all()

@fuzz(150)
@given(st.data())
def test_damaged_pictures(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("pictures") / "a class"
    folder.mkdir()
    png = io.BytesIO()
    Image.fromarray(sprites.draw_sprites(1, seed=0)[0][0]).save(png, "PNG")
    (folder / "ü.png").write_bytes(mutated(png.getvalue(), data.draw))
    found = attempt(pictures.Sprites.from_folder, folder.parent)
    if found is not None: assert found.batch([0])[0].shape == (1, 3, 16, 16)

def test_a_picture_that_claims_to_be_huge(tmp_path):
    "A file of a few bytes that asks for gigabytes is refused, not obeyed."
    import zlib
    def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    with pytest.raises((OSError, ValueError)): pictures.Sprites.from_folder(tmp_path)


# --- docstrings ---

MODULES = (sampling, training, context, fast_sampling, few_steps, editing, flow_matching, unet, checkpoints, sprites, folders, array_files, pictures, metrics, plots, arguments, cli, disk, evaluate_command, identity, judge, stickers, train_command)

@pytest.mark.parametrize("f", [getattr(m, name) for m in MODULES for name in m.__all__ if inspect.isfunction(getattr(m, name))], ids=lambda f: f"{f.__module__.split('.')[1]}.{f.__name__}")
def test_public_functions_are_documented(f): assert len((inspect.getdoc(f) or "")) > 10
