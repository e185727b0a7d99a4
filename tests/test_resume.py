"A training that is killed, interrupted or poisoned loses nothing: what was saved is readable, and the run goes on to the same bits."
import multiprocessing
import os
import random
import signal
import threading
import time
from functools import partial

import pytest
import torch
from test_checkpoints import in_child, outcome, posix

from diffusion_course.checkpoints import latest_step, resume_training, save_training
from diffusion_course.context import with_dropped_context
from diffusion_course.muon import muon
from diffusion_course.sampling import Schedule
from diffusion_course.training import TrainingDiverged, TrainingState, middle_times, prediction_loss, progress, shuffled_batches, train
from diffusion_course.unet import ContextUnet

STEPS, EVERY, S = 50, 2, Schedule.cosine(50)
FUZZ = int(os.environ.get("FUZZ", "1"))


class Data(torch.utils.data.Dataset):
    "Small random images; image `bad` is NaN, image `interrupting` is where somebody presses Ctrl-C."
    def __init__(self, n=50, bad=None, interrupting=None):
        self.images = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
        if bad is not None: self.images[bad] = float("nan")
        self.interrupting = interrupting
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        if i == self.interrupting: raise KeyboardInterrupt
        return self.images[i], torch.eye(5)[i % 5]


def run(data=None, **options):
    torch.manual_seed(0)
    return train(ContextUnet(n_feat=8), Data() if data is None else data, S, **{**dict(steps=STEPS, batch_size=8, device="cpu", autocast=False,
                 loss=with_dropped_context(prediction_loss)), **options})


def run_and_save(folder, told=lambda what: None, every=EVERY, **options):
    "Go on from the last checkpoint, if there is one, and save every few steps."
    for step in run(resume=resume_training(folder) if latest_step(folder) else None, **options):
        told(b".")
        if step.step % every == 0: save_training(folder, step.state(), keep=3); told(b"S")


def same_bits(a, b):
    assert a.settings == b.settings and a.tensors.keys() == b.tensors.keys()
    for name, value in a.tensors.items(): assert torch.equal(value, b.tensors[name]), name


def uninterrupted(**options):
    for step in run(**options): pass
    return step.state()


# --- killed ----------------------------------------------------------------------------------------------------------

def one_life(folder, patience, delay):
    "Train in a child and kill it, `delay` seconds after it has done `patience` steps. How it ended, what it told, seconds per step."
    ear, mouth = os.pipe()
    def work():
        torch.set_num_threads(1)
        run_and_save(folder, told=lambda what: os.write(mouth, what))
    child, began, heard = in_child(work), time.monotonic(), b""
    os.close(mouth)
    while heard.count(b".") < patience and (more := os.read(ear, 1)): heard += more
    seconds = (time.monotonic() - began) / max(heard.count(b"."), 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    ended = outcome(child)
    while more := os.read(ear, 1000): heard += more                 # what it said before it died
    os.close(ear)
    return ended, heard, seconds


@posix
def test_killed_at_random_moments(tmp_path):
    """Killed between any two instructions: after a random number of steps, so that a slow machine makes progress too, and a random part
    of a step later, so that every moment can be hit. Again and again, until all kills are done (`make fuzz`: fifty times as many, at other
    moments) and the last run has come to its end. `test_checkpoints` kills at each moment of a save."""
    rng, whole, kills, runs, seconds = random.Random(0 if FUZZ == 1 else None), uninterrupted(), 0, 0, 0.01
    folder, enough = tmp_path / "0", 20 * FUZZ
    while kills < enough or runs == 0 or latest_step(folder):
        folder.mkdir(exist_ok=True)
        before = latest_step(folder) or 0
        ended, heard, seconds = one_life(folder, rng.randint(1, 5) if kills < enough else 10**9, rng.uniform(0, 1.5) * min(seconds, 0.1))
        assert ended in (0, -signal.SIGKILL)
        kills += ended != 0
        told = before // EVERY + heard.count(b"S")                  # saves of which the child could tell
        assert told <= (latest_step(folder) or 0) // EVERY <= told + 1
        for path in folder.glob("step-*"): assert resume_training(path).settings["step"] % EVERY == 0
        if ended == 0:
            same_bits(resume_training(folder), whole)
            runs, folder = runs + 1, tmp_path / str(runs + 1)
    assert kills >= enough


# --- interrupted and poisoned ----------------------------------------------------------------------------------------

def test_ctrl_c_keeps_the_last_checkpoint(tmp_path):
    "Whether it comes while a batch is made or in the consumer; the run can go on and ends in the same bits."
    with pytest.raises(KeyboardInterrupt): run_and_save(tmp_path, data=Data(interrupting=17), steps=20)
    first = latest_step(tmp_path) or 0
    def press(what):
        if what == b".": raise KeyboardInterrupt
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt): run_and_save(tmp_path, told=press, steps=20)
        assert (latest_step(tmp_path) or 0) == first
    run_and_save(tmp_path, steps=20)
    same_bits(resume_training(tmp_path), uninterrupted(steps=20))


@posix
def test_ctrl_c_in_a_running_command(tmp_path):
    "The signal itself, at a random moment: the process ends with a KeyboardInterrupt and no half-written file."
    ear, mouth = os.pipe()
    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt): run_and_save(tmp_path, told=lambda what: os.write(mouth, what), steps=10**6)
        os.write(mouth, b"interrupted")
    child = in_child(work)
    os.close(mouth)
    while (told := os.read(ear, 1)) != b"S": assert told, f"the child ended before it saved: {outcome(child)}"
    time.sleep(random.Random().uniform(0, 0.1))
    os.kill(child, signal.SIGINT)
    assert outcome(child) == 0 and b"interrupted" in os.read(ear, 10**6)
    assert not list(tmp_path.glob("*.tmp")) and resume_training(tmp_path).settings["step"] == latest_step(tmp_path)


def test_nan_keeps_the_last_good_checkpoint(tmp_path):
    "The error names the step and what to try; the weights, the checkpoint and a resumed run on clean data are good."
    net = ContextUnet(n_feat=8)
    with pytest.raises(TrainingDiverged, match=r"step (\d+): the loss is nan .* weights are those of step \d+; try a smaller lr") as error:
        for step in train(net, Data(bad=30), S, steps=20, batch_size=4, device="cpu", autocast=False): save_training(tmp_path, step.state())
    assert step.step == latest_step(tmp_path) > 0 and f"step {step.step + 1}:" in str(error.value)
    assert all(value.isfinite().all() for value in [*net.state_dict().values(), *step.ema.state_dict().values()])
    state = resume_training(tmp_path)
    assert all(value.isfinite().all() for value in state.tensors.values())
    for step in train(ContextUnet(n_feat=8), Data(), S, steps=20, batch_size=4, device="cpu", autocast=False, resume=state): pass
    assert step.step == 20


def test_infinite_gradient_stops_before_the_weights():
    "A finite loss with a gradient that is not: the square root at 0."
    def loss(net, x0, context, schedule, *, generator=None): return (net(x0, torch.ones(len(x0), dtype=torch.long), context) * 0).square().mean().sqrt()
    net = ContextUnet(n_feat=8)
    with pytest.raises(TrainingDiverged, match="step 1: the loss is 0 and the norm of its gradient nan"): next(train(net, Data(), S, steps=5, loss=loss, device="cpu"))
    assert all(p.isfinite().all() for p in net.parameters())


def test_every_epoch_sees_every_image_once():
    "In an order of its own, which depends on the seed."
    first, second = [sum(batches, []) for batches in (lambda b: (b[:4], b[4:]))(list(shuffled_batches(20, 5, 8)))]
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert list(shuffled_batches(20, 5, 8, start=5)) == list(shuffled_batches(20, 5, 8))[5:]
    assert list(shuffled_batches(20, 5, 8, seed=1)) != list(shuffled_batches(20, 5, 8))


# --- the edges -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch_size", [(1, 1), (1, 4), (3, 8), (8, 8), (9, 8), (16, 8), (5, 11)])
def test_batches_larger_and_smaller_than_the_data(tmp_path, n, batch_size):
    "Whole batches always; each image is seen as often as the others, up to once; resumed in the middle of an epoch, the same bits."
    batches = list(shuffled_batches(n, batch_size, 20))
    seen = sorted(sum(batches, []).count(i) for i in range(n))
    assert all(len(batch) == batch_size for batch in batches) and seen[-1] - seen[0] <= 1
    options = dict(data=Data(n), batch_size=batch_size, steps=5)
    for step in run(**options):
        if step.step == 3: save_training(tmp_path, step.state()); break
    run_and_save(tmp_path, every=5, **options)
    same_bits(resume_training(tmp_path), uninterrupted(**options))


@pytest.mark.parametrize("options", [dict(autocast=torch.bfloat16), dict(ema=0.9, clip=0.1), dict(loss=prediction_loss), dict(optimizer=muon)], ids=["bfloat16", "other settings", "other loss", "two optimisers"])
def test_resumed_run_is_the_whole_run(tmp_path, options):
    options = dict(steps=6, **options)
    for step in run(**options):
        if step.step == 4: save_training(tmp_path, step.state()); break
    run_and_save(tmp_path, **options)
    whole = uninterrupted(**options)
    same_bits(resume_training(tmp_path), whole)
    assert all(value.dtype != torch.bfloat16 for value in whole.tensors.values())      # autocast computes in it, the weights stay


@pytest.mark.parametrize("part, options", [("net.", {}), ("ema.module.", {}), ("ema.n_averaged", {}), ("optimizer.0.exp_avg", {}), ("optimizer.0.step", {}),
                                           ("optimizer.0.momentum", dict(optimizer=muon)), ("optimizer.40.exp_avg", dict(optimizer=muon))])
def test_every_part_of_the_state_counts(part, options):
    "A resumed run that forgot one part would be noticed."
    tensors, settings = next(run(steps=3, **options)).state()
    assert any(name.startswith(part) for name in tensors)
    changed = {name: value + 1 if name.startswith(part) else value for name, value in tensors.items()}
    for step in run(steps=3, resume=TrainingState(changed, settings), **options): pass
    with pytest.raises(AssertionError): same_bits(step.state(), uninterrupted(steps=3, **options))


def test_autocast_is_used():
    "The losses differ by a little, from the second step on: the last layer starts at zero, in any precision."
    low, full = ([step.loss for step in run(steps=3, autocast=autocast)] for autocast in (torch.bfloat16, False))
    assert low != full and max(abs(a - b) for a, b in zip(low, full)) < 0.02


@pytest.mark.parametrize("change", [dict(lr=0.1), dict(batch_size=4), dict(seed=3), dict(steps=9), dict(data=Data(51)), dict(ema=0.5), dict(clip=2.0)], ids=lambda c: next(iter(c)))
def test_other_settings_are_refused(change):
    state = next(run()).state()
    name = {"data": "images"}.get(*change, *change)
    with pytest.raises(ValueError, match=f"cannot resume with other settings: {name} was .* and is now"): next(run(**change, resume=state))


class Shifted(Data):
    "As many images, of the same shape, with other pixels."
    def __init__(self): super().__init__(); self.images = self.images.flip(0)

class Grown(Data):
    "As many images, larger ones."
    def __getitem__(self, i): return self.images[i].repeat(1, 2, 2), torch.eye(5)[i % 5]

def other_net(**config):
    torch.manual_seed(0)
    return lambda state: next(train(ContextUnet(**{"n_feat": 8, **config}), Data(), S, steps=STEPS, batch_size=8, device="cpu", autocast=False,
                                    loss=with_dropped_context(prediction_loss), resume=state))

def other_schedule(schedule):
    torch.manual_seed(0)
    return lambda state: next(train(ContextUnet(n_feat=8), Data(), schedule, steps=STEPS, batch_size=8, device="cpu", autocast=False,
                                    loss=with_dropped_context(prediction_loss), resume=state))

BENT = S.alpha_bar.clone()
BENT[25] = (BENT[24] + BENT[25]) / 2

OTHER_RUNS = {
    "predicts": (other_net(predicts="v"), "network"), "n_feat": (other_net(n_feat=16), "network"), "n_context": (other_net(n_context=6), "network"),
    "depth": (other_net(depth=1), "network"), "schedule of the same length": (other_schedule(Schedule.linear(50)), "schedule"),
    "schedule that differs in the middle": (other_schedule(Schedule(BENT)), "schedule"),
    "share of dropped contexts": (lambda state: next(run(loss=with_dropped_context(prediction_loss, 0.3), resume=state)), "loss"),
    "other loss": (lambda state: next(run(loss=prediction_loss, resume=state)), "loss"),
    "other times": (lambda state: next(run(loss=with_dropped_context(partial(prediction_loss, times=middle_times)), resume=state)), "loss"),
    "other optimiser": (lambda state: next(run(optimizer=muon, resume=state)), "optimizer"),
    "other images, equally many": (lambda state: next(run(data=Shifted(), resume=state)), "data"),
    "larger images, equally many": (lambda state: next(run(data=Grown(), resume=state)), "image_shape"),
}

@pytest.mark.parametrize("go_on, name", OTHER_RUNS.values(), ids=OTHER_RUNS.keys())
def test_another_run_is_refused_by_name(tmp_path, go_on, name):
    "Numbers that are equal are not enough: network, schedule, loss and data decide a run too. The state on disk is left alone."
    path = save_training(tmp_path, next(run()).state())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"cannot resume with other settings: .*{name} was .* and is now .*begin a new training") as e: go_on(resume_training(tmp_path))
    assert "\n" not in str(e.value) and path.read_bytes() == before
    next(run(resume=resume_training(tmp_path)))                     # the advice: resume with those of before

def test_states_of_version_1_are_read_and_go_on(tmp_path, monkeypatch):
    "They hold less, so less can be compared; the run ends in the same bits."
    tensors, settings = next(run(steps=3)).state()
    old = {k: v for k, v in settings.items() if k in ("step", "steps", "batch_size", "lr", "ema", "clip", "seed", "T", "images")}
    monkeypatch.setattr("diffusion_course.checkpoints.VERSION", 1)
    path = save_training(tmp_path, TrainingState(tensors, old))
    monkeypatch.undo()
    assert b"training 1" in path.read_bytes()
    for step in run(steps=3, resume=resume_training(tmp_path)): pass
    whole = uninterrupted(steps=3)
    assert all(torch.equal(value, whole.tensors[name]) for name, value in step.state().tensors.items())
    with pytest.raises(ValueError, match="lr was"): next(run(steps=3, lr=0.1, resume=resume_training(tmp_path)))

def test_a_data_set_whose_items_change_can_be_resumed():
    "Random crops, say: their pixels cannot identify the set."
    generator = torch.Generator().manual_seed(5) # never the same numbers twice: the global state begins anew with each run
    class Jittered(Data):
        def __getitem__(self, i): return self.images[i] + 0.01 * torch.randn(3, 4, 4, generator=generator), torch.eye(5)[i % 5]
    state = next(run(data=Jittered())).state()
    next(run(data=Jittered(), resume=state))


# --- data of other kinds ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["bare tensors", "tuples of one"])
def test_images_without_labels_can_be_trained_on(kind):
    images = Data().images
    data = torch.utils.data.TensorDataset(images) if kind == "tuples of one" else [x for x in images]
    torch.manual_seed(0)
    net = ContextUnet(n_feat=8, n_context=0)
    losses = [step.loss for step in train(net, data, S, steps=3, batch_size=8, device="cpu", loss=with_dropped_context(prediction_loss))]
    assert len(losses) == 3

@pytest.mark.parametrize("item", [{"image": torch.zeros(3, 4, 4)}, (torch.zeros(3, 4, 4), torch.zeros(5), torch.zeros(1))], ids=["dict", "three"])
def test_items_that_are_no_images_are_named(item):
    with pytest.raises((ValueError, TypeError), match=r"\(image, context\)"): next(run(data=[item] * 8))

def test_images_in_bytes_are_refused_and_images_from_0_to_1_are_told():
    images = (Data().images + 1) / 2
    def start(x): return next(train(ContextUnet(n_feat=8, n_context=0), [*x], S, steps=3, batch_size=8, device="cpu"))
    with pytest.raises(ValueError, match="127.5"): start(images * 255)
    with pytest.warns(UserWarning, match=r"\* 2 - 1"): start(images)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(images * 255 / 127.5 - 1); start(images * 2 - 1)      # what the messages advise


def test_a_finished_run_has_nothing_to_do():
    state = uninterrupted(steps=3)
    assert list(run(steps=3, resume=state)) == []
    assert list(progress(run(steps=3, resume=state), 3)) == []


@pytest.mark.parametrize("change", [dict(steps=0), dict(batch_size=0), dict(steps=-1)], ids=str)
def test_settings_that_make_no_sense(change):
    with pytest.raises(ValueError, match="expected at least 1"): next(run(**change))
    with pytest.raises(ValueError, match="images=0"): next(run(data=torch.utils.data.TensorDataset(torch.zeros(0, 3, 4, 4))))


def test_nothing_is_left_behind():
    "No worker processes and no threads, when a run ends and when its consumer leaves."
    threads = threading.active_count()
    uninterrupted(steps=2)
    for step in run(): break
    assert not multiprocessing.active_children() and threading.active_count() == threads


def test_a_state_is_a_copy():
    "Later steps do not reach a state that was taken, and it does not depend on when it is taken within the step."
    states = [(step.state(), step.state()) for step in run(steps=3)]
    same_bits(*states[0])
    assert [state.settings["step"] for state, _ in states] == [1, 2, 3]
    assert any(not torch.equal(states[0][0].tensors[name], states[2][0].tensors[name]) for name in states[0][0].tensors)
