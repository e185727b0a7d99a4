"Checkpoints must survive what happens to files: crashes, full disks, read-only folders, truncation, other people's files."
import ast
import errno
import json
import os
import pickle
import random
import signal
import subprocess
import time
import traceback
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diffusion_course import checkpoints, disk
from diffusion_course.checkpoints import (CheckpointError, latest_step, load_model, pretrained, resume_training, save_model,
                                          save_training)
from diffusion_course.sampling import Schedule
from diffusion_course.training import TrainingState
from diffusion_course.unet import ContextUnet

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")

def small_net(seed=0, **config):
    torch.manual_seed(seed)
    net = ContextUnet(**{"n_feat": 8, **config})
    with torch.no_grad():
        for p in net.parameters(): p.copy_(0.1 * torch.randn_like(p))   # no zeros: the order of the numbers must show
    return net

def state(step, n=1000):
    "Every number of the state is the step, so that a mixture of two saves would show."
    return TrainingState({"net.w": torch.full((n,), float(step)), "ema.w": torch.full((n,), float(step)), "n": torch.tensor(step)}, {"step": step})

def step_of(state):
    step = state.settings["step"]
    for name, x in state.tensors.items(): assert (x == step).all(), name
    return step

def names(folder): return sorted(p.name for p in Path(folder).iterdir())

def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        y = b[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.contiguous().flatten().view(torch.uint8).equal(y.contiguous().flatten().view(torch.uint8)), name    # NaN included

# ---------------------------------------------------------------------------------------------------------------- models

@pytest.mark.parametrize("config", [{}, dict(n_feat=16, n_context=0, predicts="v"), dict(in_channels=1, n_context=3, predicts="x0")])
def test_model_round_trip(tmp_path, config):
    net = small_net(**config)
    path = save_model(tmp_path / "m.safetensors", net, epochs=3, note="grün ✓", nested={"a": [1, 2.5, None, True]})
    again, metadata = load_model(str(path))
    assert metadata == dict(epochs=3, note="grün ✓", nested={"a": [1, 2.5, None, True]})
    assert again.config == net.config and again.predicts == net.predicts
    assert not again.training and all(p.requires_grad for p in again.parameters())
    assert_same(net.state_dict(), again.state_dict())
    x, t = torch.randn(2, net.config["in_channels"], 16, 16), torch.tensor([1, 400])
    torch.testing.assert_close(again(x, t), net.eval()(x, t), rtol=0, atol=0)

@pytest.mark.parametrize("schedule", [Schedule.linear(500), Schedule.cosine(37), Schedule.linear(500, 1e-4, 0.02)])
def test_schedule_is_stored_exactly(tmp_path, schedule):
    _, metadata = load_model(save_model(tmp_path / "m.safetensors", small_net(), schedule=schedule))
    assert isinstance(metadata["schedule"], Schedule) and metadata["schedule"].alpha_bar.dtype == torch.float64
    assert torch.equal(metadata["schedule"].alpha_bar, schedule.alpha_bar)

@pytest.mark.parametrize("dtype, digits", [(torch.float16, 11), (torch.bfloat16, 8)])
def test_halves_come_back_as_float32(tmp_path, dtype, digits):
    net = small_net()
    whole, half = save_model(tmp_path / "a.safetensors", net), save_model(tmp_path / "b.safetensors", net, dtype=dtype)
    again, _ = load_model(half)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for a, b in zip(net.parameters(), again.parameters()): torch.testing.assert_close(b, a, rtol=2.0**-digits, atol=1e-6)

def test_network_in_other_memory_orders(tmp_path):
    net = small_net()
    plain = save_model(tmp_path / "a.safetensors", net).read_bytes()
    assert save_model(tmp_path / "b.safetensors", net.to(memory_format=torch.channels_last)).read_bytes() == plain
    assert_same(load_model(tmp_path / "b.safetensors")[0].state_dict(), net.state_dict())

def test_same_content_same_bytes(tmp_path):
    blobs = {save_model(tmp_path / f"{i}.safetensors", small_net(), schedule=Schedule.cosine(9), b=1, a=2).read_bytes() for i in range(6)}
    assert len(blobs) == 1

def test_header_is_readable_by_anyone(tmp_path):
    path = save_model(tmp_path / "m.safetensors", small_net(predicts="v"), epochs=3)
    with safetensors.safe_open(path, "pt") as f: header = f.metadata()
    assert header["format"] == "diffusion_course model 2" and header["model"] == "ContextUnet" and header["predicts"] == "v"
    assert json.loads(header["config"])["n_feat"] == 8 and json.loads(header["metadata"]) == {"epochs": 3}

def test_loading_draws_no_random_numbers(tmp_path):
    path = save_model(tmp_path / "m.safetensors", small_net())
    before = torch.get_rng_state()
    load_model(path)
    assert torch.equal(torch.get_rng_state(), before)

@posix
def test_files_have_the_usual_rights(tmp_path):
    old = os.umask(0o022)
    try: assert save_model(tmp_path / "m.safetensors", small_net()).stat().st_mode & 0o777 == 0o644
    finally: os.umask(old)

@pytest.mark.parametrize("metadata, name", [(dict(loss=torch.tensor(1.0)), "loss"), (dict(a=1, f=len), "f"), (dict(x=float("nan")), "x"),
                                            (dict(t={1: "a"}), "t"), (dict(deep=[[{"a": {1, 2}}]]), "deep")])
def test_metadata_that_json_cannot_hold(tmp_path, metadata, name):
    with pytest.raises(TypeError, match=f"metadata '{name}'"): save_model(tmp_path / "m.safetensors", small_net(), **metadata)
    assert names(tmp_path) == []

def test_what_save_model_refuses(tmp_path):
    path, net = tmp_path / "m.safetensors", small_net()
    good = save_model(path, net).read_bytes()
    with pytest.raises(TypeError, match="AveragedModel.*module"): save_model(path, torch.optim.swa_utils.AveragedModel(net))
    with pytest.raises(TypeError, match="expected a Schedule"): save_model(path, net, schedule=[1.0, 0.5])
    with pytest.raises(ValueError, match="float16"): save_model(path, net, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"\.safetensors"): save_model(tmp_path / "m.pth", net)
    with pytest.raises(FileNotFoundError, match="folder exists"): save_model(tmp_path / "no" / "m.safetensors", net)
    with torch.no_grad(): net.stem.weight[0] = 1e6
    with pytest.raises(ValueError, match=r"stem\.weight.*float16"): save_model(path, net, dtype=torch.float16)
    with torch.no_grad(): net.stem.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"stem\.weight"): save_model(path, net)
    assert path.read_bytes() == good and names(tmp_path) == [path.name]

# ------------------------------------------------------------------------------------------------- damaged and foreign files

def pack(tensors=None, **header):
    header = {"model": "ContextUnet", "config": json.dumps(small_net().config), "metadata": "{}", "predicts": "eps", **header}
    return checkpoints._pack("model", small_net().state_dict() if tensors is None else tensors, **{k: v for k, v in header.items() if v is not None})

def with_format(text, blob):
    "The same tensors under another format line."
    head, data = checkpoints._split(blob)
    return safetensors.torch.save(safetensors.torch.load(blob), {**head["__metadata__"], "format": text})

def changed(**tensors):
    old = small_net().state_dict()
    return {k: v for k, v in {**old, **tensors}.items() if v is not None}

def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data

BROKEN = {
    "empty": (b"", "is empty"),
    "torch.save": (b"PK\x03\x04" + b"\0" * 100, "pickles are never loaded"),
    "old torch.save": (pickle.dumps({"w": [1.0] * 50}, protocol=2), "pickles are never loaded"),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
    "text": (b"hello, I am not a checkpoint at all", "not a safetensors file"),
    "huge header": ((2**63 - 1).to_bytes(8, "little") + b"{}", "cut short or damaged"),
    "all ones": (b"\xff" * 64, "not a safetensors file"),
    "deep header": (raw(b'{"a":' * 100_000), "cut short or damaged"),
    "huge tensor": (raw({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"\0" * 4), "cut short or damaged"),
    "wrong offsets": (raw({"w": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, b"\0" * 8), "cut short or damaged"),
    "no metadata": (raw({}), "of another program"),
    "null metadata": (raw({"__metadata__": None}), "of another program"),
    "other program": (safetensors.torch.save({"w": torch.ones(2)}, {"format": "pt"}), "of another program"),
    "newer": (with_format("diffusion_course model 3", pack()), "newer.*upgrade"),
    "training state": (checkpoints._pack("training", {}, settings="{}", channels_last="[]"), "use resume_training"),
    "no checksum": (safetensors.torch.save({}, {"format": "diffusion_course model 1"}), "checksum"),
    "other numbers": (with_format("diffusion_course model 1", pack()).replace(small_net().stem.bias.detach().numpy().tobytes(), b"\0" * 32), "checksum"),
    "other network": (pack(model="UNet2D"), "knows ContextUnet, not UNet2D"),
    "unknown argument": (pack(config='{"width": 3}'), "TypeError.*width"),
    "bad argument": (pack(config='{"n_feat": -1}'), "n_feat"),
    "config no dict": (pack(config="[1, 2]"), "^The header of"),
    "config no JSON": (pack(config="{"), "^The header of"),
    "config too deep": (pack(config="[" * 100_000), "^The header of"),
    "no config": (pack(config=None), "config"),
    "bad schedule": (pack(schedule="[1.0, 2.0]"), "alpha_bar"),
    "other size": (pack(config='{"n_feat": 16}'), r"shape: .*is \[.*\], not \["),
    "other width": (pack(config='{"n_feat": 8, "n_context": 4}'), r"shape: context_embedding\.weight is \[32, 5\], not \[32, 4\]"),
    "missing tensor": (pack(changed(**{"stem.bias": None})), r"missing: stem\.bias\."),
    "one tensor more": (pack(changed(extra=torch.ones(1))), r"unexpected: extra\."),
    "NaN": (pack(changed(**{"stem.bias": torch.full((8,), float("nan"))})), r"stem\.bias NaN or infinite"),
    "infinite": (pack(changed(**{"stem.bias": torch.full((8,), float("inf"))})), r"stem\.bias NaN or infinite"),
}

@pytest.mark.parametrize("blob, message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_explained(tmp_path, blob, message):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(blob)
    with pytest.raises(CheckpointError, match=message) as e: load_model(path)
    assert str(path) in str(e.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no file .*broken"): load_model(path)

@pytest.mark.parametrize("header", [dict(settings="{}"), dict(channels_last="[]"), dict(settings="{", channels_last="[]"),
                                    dict(settings="{}", channels_last='["w"]')])
def test_training_header_that_fits_nothing(tmp_path, header):
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(checkpoints._pack("training", {}, **header))
    with pytest.raises(CheckpointError, match="The header of"): resume_training(path)

def test_model_is_no_training_state(tmp_path):
    with pytest.raises(CheckpointError, match="use load_model"): resume_training(save_model(tmp_path / "m.safetensors", small_net()))

@pytest.mark.parametrize("load, make", [(load_model, lambda p: save_model(p / "m.safetensors", small_net(), schedule=Schedule.cosine(20))),
                                        (resume_training, lambda p: save_training(p, state(3)))])
def test_truncated_or_flipped_is_always_a_checkpoint_error(tmp_path, load, make):
    path, rng = make(tmp_path), random.Random(0)
    blob = path.read_bytes()
    for length in [*range(20), *(rng.randrange(len(blob)) for _ in range(60)), len(blob) - 1]:
        path.write_bytes(blob[:length])
        with pytest.raises(CheckpointError): load(path)
    header = 8 + int.from_bytes(blob[:8], "little")
    for i in [*range(8), *(rng.randrange(header) for _ in range(80)), *(rng.randrange(header, len(blob)) for _ in range(40))]:
        path.write_bytes(blob[:i] + bytes([blob[i] ^ (1 << rng.randrange(8))]) + blob[i + 1:])
        with pytest.raises(CheckpointError): load(path)
    path.write_bytes(blob[:-4096] + b"\0" * 4096)           # a hole, as interrupted downloads leave it
    with pytest.raises(CheckpointError, match="checksum"): load(path)

def test_nothing_is_unpickled():
    banned = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for file in sorted(Path(checkpoints.__file__).parent.glob("**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file.name}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Import): assert not banned & {a.name.split(".")[0] for a in node.names}, where
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] not in banned, where
                assert not (node.module == "torch" and {"load", "save"} & {a.name for a in node.names}), where
            if isinstance(node, ast.Attribute): assert ast.unparse(node) not in ("torch.load", "torch.save", "torch.jit.load"), where
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle": assert ast.unparse(node.value) == "False", where

# --------------------------------------------------------------------------------------------------------- training states

def test_every_kind_of_tensor_survives_bit_by_bit(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3, 3)
    tensors = {"f32": x, "f64": x.double(), "bf16": x.bfloat16(), "f16": x.half(), "i64": torch.tensor([2**62 + 1, -1]), "u8": torch.get_rng_state(),
               "bool": torch.tensor([True, False]), "zero-dim": torch.tensor(1e-45), "zero-dim int": torch.tensor(2**53 + 1), "none": torch.zeros(0, 3),
               "odd floats": torch.tensor([float("nan"), float("inf"), -0.0]), "channels_last": x.to(memory_format=torch.channels_last),
               "transposed": x.transpose(0, 1), "expanded": x[:1].expand(4, 6, 3, 3), "shared": x, "slice": x[1:3], "leaf": torch.nn.Parameter(x)}
    settings = {"step": 5, "lr": 0.1 + 0.2, "name": "x", "nested": {"a": [1, None, False]}, "seed": 2**80}
    got = resume_training(save_training(tmp_path, TrainingState(tensors, settings)).parent)
    assert isinstance(got, TrainingState) and got.settings == settings
    assert_same(got.tensors, tensors)
    assert not any(t.requires_grad for t in got.tensors.values())
    assert len({t.data_ptr() for t in got.tensors.values() if t.numel()}) == len(tensors) - 1    # nobody shares memory
    assert got.tensors["channels_last"].stride() == tensors["channels_last"].stride()

@pytest.mark.parametrize("fused", [False, True])
def test_optimiser_goes_on_exactly(tmp_path, fused):
    "A fused optimiser walks through memory: moments in another order than the weights would be mixed up silently."
    def run(steps, resume=None):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
        grads = [torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last) for _ in range(8)]
        optimiser, first = torch.optim.AdamW([p], lr=0.1, fused=fused), 0
        if resume:
            first = resume.settings["step"]
            with torch.no_grad(): p.copy_(resume.tensors["p"])
            moments = {k.removeprefix("o."): v for k, v in resume.tensors.items() if k.startswith("o.")}
            optimiser.load_state_dict({"state": {0: moments}, "param_groups": optimiser.state_dict()["param_groups"]})
        for p.grad in grads[first:steps]: optimiser.step()
        return TrainingState({"p": p, **{f"o.{k}": v for k, v in optimiser.state_dict()["state"][0].items()}}, {"step": steps})
    save_training(tmp_path, run(4))
    assert_same(run(8, resume_training(tmp_path)).tensors, run(8).tensors)

def test_the_newest_are_kept_and_later_steps_never_lost(tmp_path):
    run = tmp_path / "deep" / "run"
    assert latest_step(run) is None
    for step in [1, 2, 30, 400]: path = save_training(run, state(step), keep=2)
    (run / "notes.txt").write_text("mine"); (run / "step-best.safetensors").write_text("mine too")
    assert path.name == "step-00000400.safetensors" and latest_step(run) == 400
    assert names(run) == ["notes.txt", "step-00000030.safetensors", path.name, "step-best.safetensors"]
    save_training(run, TrainingState({"n": torch.tensor(-1)}, {"step": 400}))       # the same step again: replaced
    assert resume_training(run).tensors["n"] == -1
    with pytest.warns(UserWarning, match="later step, 400"): save_training(run, state(31), keep=1)
    assert step_of(resume_training(run / "step-00000031.safetensors")) == 31       # what was just saved always stays
    assert "step-00000400.safetensors" in names(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_training(run, state(99_999_999))
        assert save_training(run, state(10**9)).name == "step-1000000000.safetensors"   # by number, not by name
        assert step_of(resume_training(run)) == 10**9
        save_training(run, state(10**9), keep=1)
    assert names(run) == ["notes.txt", "step-1000000000.safetensors", "step-best.safetensors"] and step_of(resume_training(run)) == 10**9

def test_what_save_training_refuses(tmp_path):
    save_training(tmp_path, state(1))
    for bad in [None, "3", -1, True, 1.0]:
        with pytest.raises(ValueError, match="step"): save_training(tmp_path, TrainingState({}, {"step": bad}))
    for keep in [0, -1, 1.5, True, None]:
        with pytest.raises(ValueError, match="keep"): save_training(tmp_path, state(2), keep=keep)
    with pytest.raises(TypeError, match="expected a TrainingState"): save_training(tmp_path, lambda: state(2))
    with pytest.raises(TypeError, match="setting 'best'"): save_training(tmp_path, TrainingState({}, {"step": 2, "best": float("inf")}))
    for bad in [1.0, torch.ones(3).to_sparse(), torch.ones(3, device="meta"), torch.ones(3, dtype=torch.complex64)]:
        with pytest.raises(TypeError, match="w is "): save_training(tmp_path, TrainingState({"w": bad}, {"step": 2}))
    assert names(tmp_path) == ["step-00000001.safetensors"] and step_of(resume_training(tmp_path)) == 1

def test_nothing_to_resume(tmp_path):
    for path in [tmp_path, tmp_path / "missing"]:
        with pytest.raises(FileNotFoundError, match=f"{path.name} is missing or has no training state"): resume_training(path)
    with pytest.raises(FileNotFoundError, match="no file"): resume_training(tmp_path / "step-00000001.safetensors")

def test_damaged_newest_names_the_good_one(tmp_path):
    files = [save_training(tmp_path, state(step)) for step in (1, 2, 3)]
    for damaged, good in [(files[2], "step-00000002"), (files[1], "step-00000001"), (files[0], None)]:
        damaged.write_bytes(damaged.read_bytes()[:-1])
        with pytest.raises(CheckpointError) as e: resume_training(tmp_path)
        assert files[2].name in str(e.value) and (f"{good}.safetensors')" in str(e.value) if good else "start anew" in str(e.value))
        if good: assert step_of(resume_training(tmp_path / f"{good}.safetensors")) == int(good[-1])
    save_training(tmp_path, state(3))                       # saved again, it is replaced
    assert step_of(resume_training(tmp_path)) == 3

def test_leftovers_of_a_killed_save_are_ignored_then_cleared(tmp_path):
    save_training(tmp_path, state(1))
    for name in [".diffusion_course-0badcafe.tmp", ".diffusion_course-12345678.tmp"]: (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".other.tmp").write_text("not ours")
    assert step_of(resume_training(tmp_path)) == 1 and latest_step(tmp_path) == 1
    save_training(tmp_path, state(2))
    assert names(tmp_path) == [".other.tmp", "step-00000001.safetensors", "step-00000002.safetensors"]

# ------------------------------------------------------------------------------------------------------- crashes and full disks

def in_child(work):
    "Run `work` in a forked process; its process id."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)         # Python warns of fork beside threads; the child uses none
        pid = os.fork()
    if pid: return pid
    code = 1
    try:
        signal.alarm(60)                                            # never outlive the test
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)

def outcome(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@posix
def test_killed_at_random_moments(tmp_path):
    rng, leftovers, last = random.Random(0), 0, 0
    save_training(tmp_path, state(0, 200_000))
    def save_for_ever():
        step = latest_step(tmp_path)
        while True: step += 1; save_training(tmp_path, state(step, 200_000), keep=2)
    for life in range(300):                                        # 30 on an idle machine; more where the child hardly gets to run
        if life >= 30 and last > 10 and leftovers: break
        pid = in_child(save_for_ever)
        time.sleep(rng.uniform(0.001, 0.12))
        os.kill(pid, signal.SIGKILL)
        assert outcome(pid) == -signal.SIGKILL
        leftovers += sum(name.endswith(".tmp") for name in names(tmp_path))
        step = step_of(resume_training(tmp_path))                  # readable, and all of one step
        assert step >= last
        last = step
        for path in tmp_path.glob("step-*"): step_of(resume_training(path))
    assert last > 10 and leftovers > 0, "the kills missed the writing: change the delays"

def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)

class HalfWritten:
    "A file that stops the process when half of the bytes are written."
    def __init__(self, *args): self.file = open(*args)
    def __enter__(self): return self
    def __exit__(self, *args): self.file.close()
    def write(self, blob): self.file.write(blob[:len(blob) // 2]); self.file.flush(); die()

MOMENTS = {"before writing": ("open", die), "half written": ("open", HalfWritten), "before fsync": ("os.fsync", die),
           "before renaming": ("os.replace", die), "after renaming": ("_sync_folder", die), "while pruning": ("_states", die)}

@posix
@pytest.mark.parametrize("place, crash", MOMENTS.values(), ids=MOMENTS.keys())
def test_killed_at_each_moment(tmp_path, place, crash):
    save_training(tmp_path, state(1))
    old = save_model(tmp_path / "m.safetensors", small_net(1)).read_bytes()
    owner = {"os.": os, "_st": checkpoints}.get(place[:3], disk)
    target, name = owner, place.removeprefix("os.")
    def work(save):
        setattr(target, name, crash)                               # in the child only
        save()
    assert outcome(in_child(lambda: work(lambda: save_training(tmp_path, state(2), keep=1)))) == -signal.SIGKILL
    assert step_of(resume_training(tmp_path)) == (2 if place in ("_sync_folder", "_states") else 1)
    if place != "_states":
        assert outcome(in_child(lambda: work(lambda: save_model(tmp_path / "m.safetensors", small_net(2))))) == -signal.SIGKILL
        assert ((tmp_path / "m.safetensors").read_bytes() == old) == (place != "_sync_folder")
        load_model(tmp_path / "m.safetensors")

def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    def note_fsync(fd): calls.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"); fsync(fd)
    def note_replace(a, b):
        assert Path(a).parent == Path(b).parent and Path(a).stat().st_size > 1000      # complete before it gets its name
        calls.append("rename"); replace(a, b)
    monkeypatch.setattr(os, "fsync", note_fsync); monkeypatch.setattr(os, "replace", note_replace)
    save_training(tmp_path, state(1))
    if not Path("/proc/self/fd").is_dir(): calls = [c for c in calls if c == "rename"] and ["file", "rename", "folder"]
    assert calls == ["file", "rename", "folder"]

@posix
def test_a_reader_never_sees_half_a_file(tmp_path):
    path = save_model(tmp_path / "m.safetensors", small_net(0), seed=0)
    want = {seed: small_net(seed).stem.weight for seed in range(3)}
    def save_for_ever():
        nets = [small_net(seed) for seed in range(3)]
        while True:
            for seed, net in enumerate(nets): save_model(path, net, seed=seed)
    writers = [in_child(save_for_ever) for _ in range(2)]           # two writers do not hurt each other
    try:
        seen = set()
        for _ in range(60):
            net, metadata = load_model(path)
            assert torch.equal(net.stem.weight, want[metadata["seed"]])
            seen.add(metadata["seed"])
    finally:
        for pid in writers: os.kill(pid, signal.SIGKILL); outcome(pid)
    assert len(seen) > 1

def check_refused(folder, number, words="intact", save_again=True):
    "Both ways of saving fail with the system's error number and leave the folder as it was."
    before = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    for save in [lambda: save_training(folder, state(2, 300_000), keep=1), lambda: save_model(Path(folder) / "m.safetensors", small_net(1, n_feat=32))]:
        with pytest.raises(OSError, match=f"Could not write .*{words}") as e: save()
        assert e.value.errno == number
        assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == before
    assert step_of(resume_training(folder)) == 1
    load_model(Path(folder) / "m.safetensors")

@pytest.fixture
def saved(tmp_path):
    save_training(tmp_path, state(1)); save_model(tmp_path / "m.safetensors", small_net())
    return tmp_path

@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_disk_full_simulated(saved, monkeypatch, number, place):
    def fail(*args): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, place, fail)
    check_refused(saved, number)

def test_disk_full_while_writing(saved, monkeypatch):
    class Full(HalfWritten):
        def write(self, blob): self.file.write(blob[:100]); raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(disk, "open", Full, raising=False)
    check_refused(saved, errno.ENOSPC)

@posix
def test_file_size_limit(saved):
    import resource
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        check_refused(saved, errno.EFBIG)
    assert outcome(in_child(work)) == 0

@posix
def test_disk_full_on_a_real_small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True) if hasattr(os, "geteuid") and os.geteuid() == 0 else None
    if mounted is None or mounted.returncode: pytest.skip("mounting is not allowed here")
    try:
        save_training(disk, state(1)); save_model(disk / "m.safetensors", small_net())
        check_refused(disk, errno.ENOSPC)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True, capture_output=True)
        check_refused(disk, errno.EROFS)
    finally: subprocess.run(["umount", disk], check=True)

@posix
def test_read_only_folder(saved):
    if os.geteuid() == 0: pytest.skip("root may write anywhere")
    saved.chmod(0o555)
    try: check_refused(saved, errno.EACCES)
    finally: saved.chmod(0o755)

def test_read_only_folder_simulated(saved, monkeypatch):
    def refuse(*args): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(disk, "open", refuse, raising=False)
    check_refused(saved, errno.EACCES)
    with pytest.raises(PermissionError): save_training(saved, state(2))        # still the kind of error that it was

def test_interrupt_removes_the_temporary_file(saved, monkeypatch):
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", interrupt)
    before = names(saved)
    with pytest.raises(KeyboardInterrupt): save_training(saved, state(2))
    assert names(saved) == before

def test_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    opened = os.open
    def refuse(path, *args, **kwargs):
        if Path(path) == tmp_path: raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, *args, **kwargs)
    monkeypatch.setattr(os, "open", refuse)
    assert step_of(resume_training(save_training(tmp_path, state(1)))) == 1

# ----------------------------------------------------------------------------------------------------------------- pretrained

def test_pretrained(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path)
    with pytest.raises(ValueError, match="sprites.*none"): pretrained()
    save_model(tmp_path / "sprites.safetensors", small_net(), dtype=torch.float16, schedule=Schedule.cosine(20))
    save_model(tmp_path / "bare.safetensors", small_net()); (tmp_path / "README.md").write_text("about")
    net, schedule = pretrained()
    assert isinstance(net, ContextUnet) and not net.training and torch.equal(schedule.alpha_bar, Schedule.cosine(20).alpha_bar)
    for name in ["dragons", "../sprites", "sprites.safetensors", ""]:
        with pytest.raises(ValueError, match="we have: bare, sprites$"): pretrained(name)
    with pytest.raises(CheckpointError, match="without a schedule"): pretrained("bare")
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path / "missing")
    with pytest.raises(ValueError, match="none"): pretrained()

def test_shipped_model_fits_its_limit():
    shipped = Path(checkpoints.__file__).parent / "pretrained"
    for path in shipped.glob("*.safetensors"): assert path.stat().st_size <= 4 * 10**6, path.name
    for name in ("sprites", "sprites-fast"): # features.safetensors is the judge of the metrics, not a diffusion model
        net, schedule = pretrained(name)
        assert net.predicts in ("eps", "x0", "v", "u") and isinstance(schedule, Schedule)


def test_foreign_files_with_the_names_of_states_stay(tmp_path):
    "Weights of another program, called as ours are: saving refuses to overwrite them and does not prune them."
    foreign = {tmp_path / f"step-{k:08d}.safetensors": safetensors.torch.save({"w": torch.ones(k)}) for k in (1, 2, 4)}
    for path, blob in foreign.items(): path.write_bytes(blob)
    with pytest.raises(FileExistsError, match="step-00000004.*another folder"): save_training(tmp_path, state(4), keep=1)
    save_training(tmp_path, state(5), keep=1); save_training(tmp_path, state(6), keep=1)
    assert {p: p.read_bytes() for p in foreign} == foreign and len(names(tmp_path)) == 4
