"Several processes train one network: gradients, weights and losses are those of one process with the whole batch; only the first one is seen; a lost one is named."
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import in_child, outcome
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from diffusion_course.checkpoints import latest_step, resume_training, save_training
from diffusion_course.context import with_dropped_context
from diffusion_course.crew import Crew, _OwnRows
from diffusion_course.sampling import Schedule
from diffusion_course.training import TrainingDiverged, prediction_loss, train
from diffusion_course.unet import ContextUnet

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available(), reason="needs fork and torch.distributed")
S, STEPS, BATCH = Schedule.cosine(20), 6, 12


def tiny_data(bad=None, kind=TensorDataset):
    g = torch.Generator().manual_seed(0)
    images, contexts = torch.rand(30, 3, 4, 4, generator=g, dtype=torch.float64) * 2 - 1, torch.eye(5).repeat(6, 1)
    if bad is not None: images[bad] = float("nan")
    return kind(images, contexts)

def images_alone(): return TensorDataset(tiny_data().tensors[0])


def run(net, *, data=None, **options):
    "A short training in this process, in float64: in float32 Adam would make steps of full length out of rounding errors."
    return train(net.double(), data or tiny_data(), S, **{**dict(steps=STEPS, batch_size=BATCH, clip=1e9, device="cpu", autocast=False), **options})


def start(size, work):
    "`work(rank)` in forked processes with the environment that torchrun would give them; their process ids."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    def begin(rank):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(200)                                           # never outlive the test
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))
        torch.manual_seed(rank)                                     # the first weights differ, until the first process gives away its own
        try: work(rank)
        except SystemExit as end: assert not end.code and rank      # how a helper leaves
    return [in_child(lambda rank=rank: begin(rank)) for rank in range(size)]

def launch(size, work): return [outcome(pid) for pid in start(size, work)]


def record(folder, rank=0, net=None, **options):
    "Train, and write down the loss, the gradient and the weights of every step, and the last weights of this process."
    net = net or ContextUnet(n_feat=8)
    try:
        for step in run(net, **options):
            gradients = {f"gradient.{name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
            save_file({"loss": torch.tensor(step.loss), **gradients, **step.state().tensors}, folder / f"step{step.step}-by{rank}.safetensors")
    finally: save_file(net.state_dict(), folder / f"last-of-{rank}.safetensors")


def two_answers_loss(net, x0, context, schedule, *, generator=None):
    "The network is called twice, once without the context, and the loss draws by other calls than ours."
    t = torch.randint(high=schedule.T, size=[len(x0)], generator=generator) + 1
    noise, shared = torch.randn(*x0.shape, generator=generator, dtype=x0.dtype), torch.rand(x0.shape[0], 1, 1, 1, generator=generator)
    return (net(x0 + shared * noise, t, context) + 0.3 * net(noise, t) - noise).square().mean()

CASES = dict(plain={}, dropped=dict(loss=with_dropped_context(prediction_loss, 0.5)), twice=dict(loss=two_answers_loss), images=dict(data=images_alone()))


def compare(a, b):
    "Two folders of `record` hold the same run, up to the order of sums."
    steps = sorted(a.glob("step*"))
    assert len(steps) == STEPS and sorted(p.name for p in b.glob("step*")) == [p.name for p in steps], "files of the steps"
    for path in steps:
        one, other = load_file(path), load_file(b / path.name)
        assert one.keys() == other.keys()
        for name in sorted(one, key=lambda name: not name.startswith("gradient")): assert_close(other[name], one[name], rtol=1e-6, atol=1e-9, msg=lambda m: f"{path.name}, {name}: {m}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "Folder of `record`, for each case, by one process."
    def by_one(name):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        record(folder, **CASES[name])
        return folder
    return {name: by_one(name) for name in CASES}


@pytest.mark.parametrize("size, case", [(2, "plain"), (2, "dropped"), (2, "twice"), (2, "images"), (3, "plain"), (4, "dropped")])
def test_gradients_and_weights_are_those_of_one_process(tmp_path, alone, size, case):
    assert launch(size, lambda rank: record(tmp_path, rank, **CASES[case])) == [0] * size
    compare(alone[case], tmp_path)                                  # and the files are those of number 0 alone
    first, *others = (load_file(tmp_path / f"last-of-{rank}.safetensors") for rank in range(size))
    for other in others:
        for name in first: assert torch.equal(first[name], other[name]), name

def test_in_float32_within_a_hundredth(tmp_path):
    "What a user sees: the usual settings, 15 steps. Adam makes whole steps out of gradients that are nearly zero."
    def fifteen(rank=0):
        torch.manual_seed(0)
        for step in train(ContextUnet(n_feat=8), [(x.float(), c) for x, c in tiny_data()], S, steps=15, batch_size=BATCH, device="cpu", autocast=False): pass
        save_file({"loss": torch.tensor(step.loss), **step.ema.state_dict()}, tmp_path / f"of{size}.safetensors")
    size = 1; fifteen()
    size = 2; assert launch(2, fifteen) == [0, 0]
    one, two = (load_file(tmp_path / f"of{size}.safetensors") for size in (1, 2))
    for name in one: assert_close(two[name], one[name], rtol=0, atol=1e-3 if name == "loss" else 1e-2, msg=lambda m: f"{name}: {m}")


# --- what is drawn ---------------------------------------------------------------------------------------------------

def drawn(draw, rank, size=2, rows=3):
    "What process `rank` gets from draw(rows, generator), and the number that the generator gives next."
    crew = SimpleNamespace(rank=rank, size=size, rows=rows, own=slice(rank * rows, (rank + 1) * rows))
    g = torch.Generator().manual_seed(0)
    return _OwnRows(None, lambda net: draw(rows, g), crew)(), torch.rand(1, generator=g)

DRAWS = {
    "randn of a shape": lambda n, g: torch.randn((n, 5, 7), generator=g), "randn of numbers": lambda n, g: torch.randn(n, 5, generator=g),
    "randn of a size": lambda n, g: torch.randn(size=(n, 5), generator=g), "rand, float64": lambda n, g: torch.rand(n, generator=g, dtype=torch.float64),
    "randint up to": lambda n, g: torch.randint(9, (n,), generator=g), "randint between": lambda n, g: torch.randint(1, 9, torch.Size([n]), generator=g),
    "randint by name": lambda n, g: torch.randint(low=1, high=9, size=(n, 2), generator=g),
    "several": lambda n, g: torch.cat([torch.rand(n, 1, generator=g), torch.randn((n, 4), generator=g)], 1),
}

@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_rows_are_drawn_for_the_whole_batch(draw):
    g = torch.Generator().manual_seed(0)
    whole, following = draw(6, g), torch.rand(1, generator=g)
    parts = [drawn(draw, rank) for rank in (0, 1)]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    assert all(torch.equal(after, following) for _, after in parts)

OTHER_DRAWS = {
    "in place": lambda n, g: torch.empty(n, 4).normal_(generator=g), "bernoulli": lambda n, g: torch.bernoulli(torch.full((n, 50), 0.5), generator=g),
    "normal": lambda n, g: torch.normal(torch.zeros(n, 4), 1.0, generator=g), "not a row for an image": lambda n, g: torch.randn(2 * n, 4, generator=g),
}

@pytest.mark.parametrize("draw", OTHER_DRAWS.values(), ids=OTHER_DRAWS.keys())
def test_other_draws_differ_between_processes(draw):
    "No function of the row, but never the same noise twice; and the first process draws as if it was alone."
    first, second, third = (drawn(draw, rank, size=3)[0] for rank in range(3))
    assert torch.equal(first, draw(3, torch.Generator().manual_seed(0)))
    assert not any(torch.equal(a, b) for a, b in [(first, second), (second, third), (first, third)])

def test_draws_without_a_generator_differ_between_processes(tmp_path):
    def noisy(net, x0, context, schedule, *, generator=None):
        torch.save(noise := torch.randn_like(x0), tmp_path / os.environ["RANK"])
        return (net(noise, torch.ones(len(x0), dtype=torch.long), context) - x0).square().mean()
    def work(rank):
        torch.manual_seed(0)                                        # as scripts do, in every process
        for step in run(ContextUnet(n_feat=8), steps=1, loss=noisy): pass
    assert launch(2, work) == [0, 0]
    assert not torch.equal(torch.load(tmp_path / "0"), torch.load(tmp_path / "1"))

class Noted(TensorDataset):
    "Notes which items are read."
    def __getitem__(self, i): self.read = [*getattr(self, "read", []), i]; return super().__getitem__(i)

def test_each_process_reads_its_own_rows(tmp_path):
    def work(rank=0):
        data = tiny_data(kind=Noted)
        try:
            for step in run(ContextUnet(n_feat=8), data=data): pass
        finally: (tmp_path / f"{rank}").write_text(repr(data.read[-STEPS * BATCH // int(os.environ.get("WORLD_SIZE", 1)):] if rank else data.read))
    work()
    whole = eval((tmp_path / "0").read_text())[-STEPS * BATCH:]
    assert launch(2, work) == [0, 0]
    first, second = (eval((tmp_path / name).read_text())[-STEPS * BATCH // 2:] for name in "01")
    assert sorted(first + second) == sorted(whole) and first[:6] + second[:6] == whole[:12]


# --- wrong versions, which the comparison must catch -----------------------------------------------------------------

def same_noise(crew):
    "Every process draws with the same seed for its own rows."
    crew.setattr(_OwnRows, "__torch_function__", lambda self, draw, types, args=(), kwargs=None: draw(*args, **kwargs or {}))

def same_rows(crew):
    "Every process takes the first rows."
    def first_rows(self, *args): init(self, *args); self.own = slice(0, self.rows)
    init = Crew.__init__
    crew.setattr(Crew, "__init__", first_rows)

def gradients_kept(crew):
    "Nobody tells the others."
    crew.setattr("diffusion_course.crew.DDP", lambda module, **options: module)

def sum_of_gradients(crew):
    "The sum where the mean is due: Adam forgives it, the gradients do not."
    right = _OwnRows.forward
    crew.setattr(_OwnRows, "forward", lambda self, *a, **k: self.crew.size * right(self, *a, **k))

def own_loss_told(crew):
    "The loss of the own rows is taken for that of the batch."
    crew.setattr(Crew, "mean", lambda self, values: values)

def everybody_writes(crew):
    "The loop's body runs in all processes."
    class First(int):
        def __eq__(self, other): return True
        __hash__ = int.__hash__
    def all_first(self, *args): init(self, *args); self.rank = First(self.rank)
    init = Crew.__init__
    crew.setattr(Crew, "__init__", all_first)

def other_first_weights(crew):
    "The processes keep the weights with which they began."
    right = torch.nn.parallel.DistributedDataParallel
    crew.setattr("diffusion_course.crew.DDP", lambda module, **options: right(module, init_sync=False, **options))

FAULTS = [(same_noise, "gradient"), (same_rows, "gradient"), (gradients_kept, "gradient"), (sum_of_gradients, "gradient|loss"), (own_loss_told, "loss"),
          (everybody_writes, "files of the steps"), (other_first_weights, "gradient")]

@pytest.mark.parametrize("wrong, words", FAULTS, ids=[wrong.__name__ for wrong, _ in FAULTS])
def test_wrong_versions_are_caught(tmp_path, alone, wrong, words):
    def work(rank):
        wrong(pytest.MonkeyPatch())                                 # in the child only
        record(tmp_path, rank)
    launch(2, work)
    with pytest.raises(AssertionError, match=words): compare(alone["plain"], tmp_path)


# --- one consumer ----------------------------------------------------------------------------------------------------

def test_alone_it_does_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")                                 # left over from something else
    net, values = torch.nn.Linear(2, 2), torch.ones(2)
    with Crew(net, lambda *args, **options: (args, options), dict(batch_size=5)) as crew:
        assert crew.rank == 0 and [1, 2, 3][crew.own] == [1, 2, 3] and not torch.distributed.is_initialized()
        assert crew.loss(1, b=2) == ((net, 1), dict(b=2))
        assert crew.mean(values) is values and values.tolist() == [1, 1]
        crew.go_on(), crew.go_on(False)


def test_resume_across_numbers_of_processes(tmp_path, alone):
    "Interrupted after every second step and resumed by another number of processes; each checkpoint is written once."
    saves = tmp_path / "saves.txt"
    def two_steps(rank=0):
        done = latest_step(tmp_path) or 0
        torch.manual_seed(0)
        for step in run(ContextUnet(n_feat=8), resume=resume_training(tmp_path) if done else None):
            save_training(tmp_path, step.state())
            with open(saves, "a") as f: f.write(f"{step.step} by {rank}\n")
            if step.step == done + 2: break                         # the consumer leaves, so all leave
        assert rank == 0 and step.step == done + 2
    two_steps()
    assert launch(2, two_steps) == [0, 0] and launch(4, two_steps) == [0, 0, 0, 0]
    assert saves.read_text().splitlines() == [f"{step} by 0" for step in range(1, STEPS + 1)]
    wanted = load_file(alone["plain"] / f"step{STEPS}-by0.safetensors")
    for name, value in resume_training(tmp_path).tensors.items(): assert_close(value, wanted[name], rtol=1e-6, atol=1e-9, msg=lambda m: f"{name}: {m}")


def test_afterwards_the_first_goes_on_alone(tmp_path):
    def work(rank):
        net = ContextUnet(n_feat=8)
        for step in run(net): break
        assert rank == 0, "a helper does not come back"
        for step in run(net, batch_size=5, steps=2): pass           # 5 rows for one process
        (tmp_path / "done").touch()
    assert launch(2, work) == [0, 0] and (tmp_path / "done").exists()


def test_disagreements_and_bad_batches_are_errors():
    "All processes say so, none waits for the others."
    def other_lr(rank):
        with pytest.raises(ValueError, match="the processes differ in lr$"): next(run(ContextUnet(n_feat=8), lr=0.1 + rank))
    def bad_batch(rank):
        with pytest.raises(ValueError, match="batch_size=5: 2 processes cannot share it"): next(run(ContextUnet(n_feat=8), batch_size=5))
    def both(rank): bad_batch(rank), other_lr(rank)
    assert launch(2, both) == [0, 0]


@pytest.mark.parametrize("size", [2, 4])
def test_a_nan_ends_all_and_the_first_tells(size, capfd):
    "One bad row of one process is enough."
    def poisoned(rank):
        try: list(run(ContextUnet(n_feat=8), data=tiny_data(bad=7)))
        except TrainingDiverged as e: assert rank == 0 and re.match("step [1-3]: the loss is nan", str(e)); return
        assert False, "not noticed"
    assert launch(size, poisoned) == [0] * size
    assert "Traceback" not in capfd.readouterr().err


# --- a process is lost -----------------------------------------------------------------------------------------------

class DeadlyLoss:
    "The loss, but process `victim` ends in its third step: by a signal, or by an error of its own."
    def __init__(self, victim=None, how="killed"): self.victim, self.how, self.calls = victim, how, 0
    def __call__(self, *args, **options):
        self.calls += 1
        if self.calls == 3 and os.environ.get("RANK") == str(self.victim) and int(os.environ["WORLD_SIZE"]) > 1:
            if self.how == "killed": os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("cannot read item 7")
        return prediction_loss(*args, **options)


def saved_run(folder, rank=0, until=STEPS, loss=None):
    "Go on from the last checkpoint and save after each step."
    torch.manual_seed(0)
    done = latest_step(folder)
    for step in run(ContextUnet(n_feat=8), loss=loss or DeadlyLoss(), resume=resume_training(folder) if done else None):
        save_training(folder, step.state())
        if step.step == until: break


@pytest.mark.parametrize("size, victim, how", [(2, 1, "killed"), (4, 2, "killed"), (2, 0, "killed"), (2, 1, "an error")])
def test_a_lost_process_is_named_and_nothing_else_is_lost(tmp_path, alone, capfd, size, victim, how):
    "All others end within a minute with an error that names it; one process goes on from the checkpoint, then four, to the same result."
    pids = start(size, lambda rank: saved_run(tmp_path, rank, loss=DeadlyLoss(victim, how)))
    codes = {victim: outcome(pids[victim])}
    lost = time.monotonic()
    codes |= {rank: outcome(pid) for rank, pid in enumerate(pids) if rank != victim}
    told = capfd.readouterr().err
    assert time.monotonic() - lost < 60
    assert codes == {rank: -signal.SIGKILL if rank == victim and how == "killed" else 1 for rank in range(size)}
    assert told.count(f"ConnectionError: process {victim} of {size} is lost") == size - 1
    assert ("OSError: cannot read item 7" in told) == (how != "killed")
    assert latest_step(tmp_path) == 2 and not list(tmp_path.glob("*.tmp"))
    saved_run(tmp_path, until=4)
    assert launch(4, lambda rank: saved_run(tmp_path, rank)) == [0] * 4
    wanted = load_file(alone["plain"] / f"step{STEPS}-by0.safetensors")
    for name, value in resume_training(tmp_path).tensors.items(): assert_close(value, wanted[name], rtol=1e-6, atol=1e-9, msg=lambda m: f"{name}: {m}")


SCRIPT = """
import sys, torch
from test_distributed import S, tiny_data
from diffusion_course.checkpoints import save_model
from diffusion_course.training import progress, train
from diffusion_course.unet import ContextUnet

torch.manual_seed(0)
for step in progress(train(ContextUnet(n_feat=8).double(), tiny_data(), S, steps=3, batch_size=12, device="cpu", autocast=False), 3): pass
save_model(sys.argv[1], step.ema.float())
print("saved once")
"""

def test_torchrun_names_a_killed_process(tmp_path, monkeypatch):
    "It ends the others itself; the last checkpoint is whole."
    script = tmp_path / "script.py"
    script.write_text("import sys, pathlib, test_distributed as t; t.saved_run(pathlib.Path(sys.argv[1]), loss=t.DeadlyLoss(1))")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.run([*launcher, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert two.returncode and re.search(r"rank +: 1 .*\n.*exitcode +: -9", two.stderr), two.stderr
    assert resume_training(tmp_path).settings["step"] == 2


def test_the_same_script_by_accelerate_launch(tmp_path, monkeypatch, capfd):
    "Nothing in the script knows of processes; started with two, it prints and saves what it does with one."
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one.safetensors")])
    runpy.run_path(str(script))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytest.importorskip("accelerate")                               # its launcher starts torchrun, on CPUs too
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *"--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()]
    two = subprocess.run([*launcher, script, tmp_path / "two.safetensors"], capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("saved once") == 1 and two.stdout.count("3/3") == capfd.readouterr().out.count("3/3")
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    for name in one: assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)
