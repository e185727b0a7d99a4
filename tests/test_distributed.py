"Several processes train one network: gradients and weights are those of one process with the whole batch, and only the first one is seen."
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import in_child, outcome
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from diffusion_course.checkpoints import latest_step, resume_training, save_training
from diffusion_course.context import with_dropped_context
from diffusion_course.crew import Crew
from diffusion_course.sampling import Schedule
from diffusion_course.training import TrainingDiverged, prediction_loss, train
from diffusion_course.unet import ContextUnet

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available(), reason="needs fork and torch.distributed")
S, STEPS, BATCH = Schedule.cosine(20), 6, 12


def tiny_data(bad=None):
    g = torch.Generator().manual_seed(0)
    images, contexts = torch.rand(30, 3, 4, 4, generator=g, dtype=torch.float64) * 2 - 1, torch.eye(5).repeat(6, 1)
    if bad is not None: images[bad] = float("nan")
    return TensorDataset(images, contexts)


def run(net, *, data=None, **options):
    "A short training in this process, in float64: in float32 Adam would make steps of full length out of rounding errors."
    return train(net.double(), data or tiny_data(), S, **{**dict(steps=STEPS, batch_size=BATCH, clip=1e9, device="cpu", autocast=False), **options})


def launch(size, work):
    "`work(rank)` in forked processes with the environment that torchrun would give them; their exit codes."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    def start(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank))
        torch.manual_seed(rank)                                     # the first weights differ, until the first process gives away its own
        try: work(rank)
        except SystemExit as end: assert not end.code and rank         # how a helper leaves
    return [outcome(pid) for pid in [in_child(lambda rank=rank: start(rank)) for rank in range(size)]]


def record(folder, rank=0, **options):
    "Train, and write down the loss, the gradient and the weights of every step, and the last weights of this process."
    net = ContextUnet(n_feat=8)
    try:
        for step in run(net, **options):
            gradients = {f"gradient.{name}": p.grad for name, p in net.named_parameters()}
            save_file({"loss": torch.tensor(step.loss), **gradients, **step.state().tensors}, folder / f"step{step.step}-by{rank}.safetensors")
    finally: save_file(net.state_dict(), folder / f"last-of-{rank}.safetensors")


def mixing_loss(net, x0, context, schedule, *, generator=None):
    "No mean over rows: the share of a row depends on all others."
    def whole_batch(xt, t, context): return net(xt, t, context) * net(xt, t, context).std()
    whole_batch.predicts = net.predicts
    return prediction_loss(whole_batch, x0, context, schedule, generator=generator).sqrt()

LOSSES = dict(plain=prediction_loss, dropped=with_dropped_context(prediction_loss, 0.5), mixing=mixing_loss)


def compare(a, b):
    "Two folders of `record` hold the same run, up to the order of sums."
    steps = sorted(a.glob("step*"))
    assert len(steps) == STEPS and sorted(p.name for p in b.glob("step*")) == [p.name for p in steps]
    for path in steps:
        one, other = load_file(path), load_file(b / path.name)
        assert one.keys() == other.keys()
        for name in sorted(one, key=lambda name: not name.startswith("gradient")): assert_close(other[name], one[name], rtol=1e-6, atol=1e-9, msg=lambda m: f"{path.name}, {name}: {m}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "Folder of `record`, for each loss, by one process."
    def by_one(name, loss):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        record(folder, loss=loss)
        return folder
    return {name: by_one(name, loss) for name, loss in LOSSES.items()}


@pytest.mark.parametrize("size, loss", [(2, "plain"), (2, "dropped"), (2, "mixing"), (3, "plain")])
def test_gradients_and_weights_are_those_of_one_process(tmp_path, alone, size, loss):
    assert launch(size, lambda rank: record(tmp_path, rank, loss=LOSSES[loss])) == [0] * size
    compare(alone[loss], tmp_path)                                  # and the files are those of number 0 alone
    first, *others = (load_file(tmp_path / f"last-of-{rank}.safetensors") for rank in range(size))
    for other in others:
        for name in first: assert torch.equal(first[name], other[name]), name


# --- wrong versions, which the comparison must catch -----------------------------------------------------------------

def same_rows(self, net):
    "Every process takes the first rows."
    def shared(*inputs): return torch.cat([net(*(x.tensor_split(self.size)[0] for x in inputs))] * self.size)
    return shared

def gradient_of_all(self, net):
    "Answers that keep their gradients nowhere but in a whole pass: every row counts once in every process."
    return net

def mean_of_gradients(self, net):
    "The mean where the sum is due: Adam forgives it, the gradients do not."
    for p in net.parameters(): torch.distributed.all_reduce(p.grad); p.grad /= self.size

def gradients_kept(self, net):
    "Nobody tells the others."

FAULTS = [("share", same_rows), ("share", gradient_of_all), ("sum_gradients", mean_of_gradients), ("sum_gradients", gradients_kept)]

@pytest.mark.parametrize("name, wrong", FAULTS, ids=[wrong.__name__ for _, wrong in FAULTS])
def test_wrong_versions_are_caught(tmp_path, alone, name, wrong):
    def work(rank):
        setattr(Crew, name, wrong)                                  # in the child only
        record(tmp_path, rank)
    assert launch(2, work) == [0, 0]
    with pytest.raises(AssertionError, match="gradient"): compare(alone["plain"], tmp_path)


# --- one consumer ----------------------------------------------------------------------------------------------------

def test_alone_it_does_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")                                 # left over from something else
    net = torch.nn.Linear(2, 2)
    crew = Crew(net, {})
    assert crew.share(net) is net and crew.rank == 0 and not torch.distributed.is_initialized()
    assert list(crew.report("step")) == ["step"]
    crew.sum_gradients(net), crew.leave()


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
    assert launch(2, two_steps) == [0, 0] and launch(3, two_steps) == [0, 0, 0]
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
        with pytest.raises(ValueError, match=f"process {rank} of 2 was not given the same settings"): next(run(ContextUnet(n_feat=8), lr=0.1 + rank))
    def bad_batch(rank):
        with pytest.raises(ValueError, match="batch_size=5: 2 processes"): next(run(ContextUnet(n_feat=8), batch_size=5))
    def poisoned(rank):                                             # one row of one process is enough
        with pytest.raises(TrainingDiverged, match="step [1-3]: the loss is nan"): list(run(ContextUnet(n_feat=8), data=tiny_data(bad=7)))
    def all_three(rank): bad_batch(rank), other_lr(rank), poisoned(rank)
    assert launch(2, all_three) == [0, 0]


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
