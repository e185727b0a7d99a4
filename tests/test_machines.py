"Whatever machine: a second device without float64 (a stand-in on this CPU), both precisions, a PyTorch without oneDNN, little memory."
import ast
import json
import types
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT
from oracles import random_images, random_unet, seeded, smooth_predictor
from standin import NAME, OnDevice, StandIn
from torch.testing import assert_close

import diffusion_course.noise as noise_module
import diffusion_course.sampling as sampling
import diffusion_course.training as training
from diffusion_course.context import drop_context, guided, one_hot, with_dropped_context
from diffusion_course.fast_sampling import ddim, dpmpp_2m, heun
from diffusion_course.sampling import (Schedule, at, clipped, ddpm, ideal_predictor, initial_noise, per_sample_noise, posterior, predictor,
                                       sample, signal_and_noise)
from diffusion_course.sprites import Sprites
from diffusion_course.precision import PRECISIONS, best_device, fast, fast_dtype
from diffusion_course.training import add_noise, check_range, prediction_loss, train
from diffusion_course.unet import ContextUnet

S, CPU = Schedule.cosine(20), torch.device("cpu")
SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "ddim, eta 1": lambda *args, **kw: ddim(*args, eta=1.0, **kw), "heun": heun,
            "dpmpp_2m": dpmpp_2m, "dpmpp_2m, eta 1": lambda *args, **kw: dpmpp_2m(*args, eta=1.0, **kw)}

@pytest.fixture
def device():
    "The stand-in; networks can be moved to it."
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with StandIn() as there: yield there
    finally: torch.__future__.set_swap_module_params_on_conversion(False)

def traffic(device, run): # (what `run` returns, reads, tensors sent)
    device.reads = device.sent = 0
    return run(), device.reads, device.sent


# --- the stand-in is a device ----------------------------------------------------------------------------------------

def test_standin_is_another_device(device):
    x, here = torch.ones(2, 3).to(NAME), torch.ones(2, 3)
    assert x.device == NAME and isinstance(x, OnDevice) and (x * 2).device == NAME and torch.zeros(2, device=NAME).device == NAME
    for mix in (lambda: x + here, lambda: torch.cat([x, here]), lambda: here.add_(x), lambda: x @ here.T):
        with pytest.raises(RuntimeError, match="same device"): mix()
    assert_close((x * torch.tensor(2.0)).cpu(), here * 2)                   # single numbers may mix
    for make in (x.double, lambda: torch.zeros(2, dtype=torch.float64, device=NAME), lambda: x.to(torch.float64)):
        with pytest.raises(TypeError, match="float64"): make()

def test_standin_counts(device):
    x = torch.ones(2, 3).to(NAME)
    assert (device.reads, device.sent) == (0, 1)
    for read in (x.sum().item, lambda: bool((x > 0).all()), x.cpu, lambda: float(x[0, 0]), lambda: x.to("cpu"), x.nonzero):
        assert traffic(device, read)[1:] == (1, 0)
    assert traffic(device, lambda: torch.full((2,), 5, device=NAME))[1:] == (0, 0)
    assert traffic(device, lambda: x.copy_(torch.zeros(2, 3)))[1:] == (0, 1) and x.sum().item() == 0

def test_standin_learns(device):
    w = torch.nn.Parameter(torch.ones(3).to(NAME))
    (w * torch.arange(3.0).to(NAME)).sum().backward()
    assert w.grad.device == NAME and w.grad.cpu().tolist() == [0, 1, 2]


# --- everything runs there, and gives what the CPU gives -------------------------------------------------------------

def asked(net): # the longest chain that the course has: guided, clipped, the contexts left on the CPU
    return clipped(guided(predictor(net, S, torch.eye(5)[:3]), predictor(net, S), 2), S)

@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_samplers(device, name, kind):
    "`sample` finds the device of the network. In the walk nothing is read back; the contexts and blocks of noise are sent."
    def draw(net): return sample(asked(net), S, 3, sampler=SAMPLERS[name], steps=7, shape=(3, 8, 8))
    net = random_unet(predicts=kind)
    want = draw(net)
    got, reads, sent = traffic(device, lambda net=net.to(NAME): draw(net))
    assert got.device == NAME
    assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
    calls = 13 if name == "heun" else 7
    assert reads == 1 and sent <= calls + 4, "one read, at the end: are the samples finite? A context per call, the first noise, 3 blocks"

@pytest.mark.parametrize("name", SAMPLERS)
def test_ideal_predictor(device, name):
    data = random_images(16, (3, 8, 8))
    draw = lambda images, device: sample(ideal_predictor(images, S), S, 3, sampler=SAMPLERS[name], steps=7, shape=(3, 8, 8), device=device)
    for images in (data, data.to(NAME)):
        assert_close(draw(images, NAME).cpu(), draw(data, None), rtol=1e-4, atol=1e-4)

def test_noise_handed_to_a_sampler(device):
    "Noise on the CPU, a network elsewhere: the network is asked where it is, and the walk goes on where the noise is."
    net = random_unet()
    walk = lambda net, device: list(ddpm(asked(net), initial_noise(3, (3, 8, 8), device=device), S, S.timesteps(5), noise=per_sample_noise(0, 3)))[-1].xs
    want = walk(net, None)
    net.to(NAME)
    assert_close(walk(net, None), want, rtol=1e-4, atol=1e-4)
    assert walk(net, None).device == CPU and walk(net, NAME).device == NAME

def test_the_network_itself_moves_nothing(device):
    with pytest.raises(ValueError, match=f"x is on cpu, the network on {NAME}"): random_unet().to(NAME)(torch.zeros(1, 3, 8, 8), torch.tensor([3]))
    alone = random_unet().to(NAME)
    hidden = predictor(lambda x, t: alone(x, t), S)                         # no network in sight: the CPU, unless told
    with pytest.raises(ValueError, match="on cpu"): sample(hidden, S, 2, steps=2, shape=(3, 8, 8))
    assert sample(hidden, S, 2, steps=2, shape=(3, 8, 8), device=NAME).device == NAME

@pytest.mark.parametrize("t, reads, sent", [(3, 0, 0), (torch.tensor(3), 0, 0), (torch.tensor([1, 2, 3]), 0, 1), ("there", 1, 1)], ids=str)
def test_coefficients(device, t, reads, sent):
    "A time as a number costs nothing, times on the CPU one transfer; only times on the device must be read back."
    x, eps = torch.randn(2, 3, 3, 8, 8, generator=seeded())
    there = x.to(NAME), eps.to(NAME), torch.tensor([1, 2, 3]).to(NAME)
    on_cpu, t = (torch.tensor([1, 2, 3]), there[2]) if t == "there" else (t, t)
    got = traffic(device, lambda: add_noise(there[0], t, there[1], S))
    assert got[1:] == (reads, sent)
    assert torch.equal(got[0].cpu(), add_noise(x, on_cpu, eps, S))
    (mean, var), reads_2, sent_2 = traffic(device, lambda: posterior(there[0], there[1], t, 0, S))
    assert (reads_2, sent_2) == (reads, sent) and torch.equal(mean.cpu(), posterior(x, eps, on_cpu, 0, S)[0])

@pytest.mark.parametrize("t", [21, -1, torch.tensor([1, 2, 21]), torch.tensor([1, 2, -3])], ids=str)
def test_times_are_refused_there_too(device, t):
    x = torch.zeros(3, 3, 8, 8, device=NAME)
    for use in (lambda: at(S.alpha_bar, t, x), lambda: signal_and_noise(t, x, S), lambda: add_noise(x, t, x, S), lambda: predictor(random_unet().to(NAME), S)(x, t)):
        with pytest.raises(ValueError, match="outside"): use()

@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_a_training_step_reads_nothing(device, kind):
    "Times, noise and coefficients are sent (v needs them twice); nothing comes back."
    net, (x0, context) = random_unet(predicts=kind).requires_grad_(True), Sprites.draw(8).batch(range(8))
    loss = with_dropped_context(prediction_loss, 0.5)
    want = loss(net, x0, context, S, generator=seeded()).detach()
    net.to(NAME)
    x0, context = x0.to(NAME), context.to(NAME)
    value, reads, sent = traffic(device, lambda: loss(net, x0, context, S, generator=seeded()))
    assert reads == 0 and sent == 4 + (kind == "v")                         # the fourth: which contexts are dropped
    assert_close(value.detach().cpu(), want, rtol=1e-5, atol=1e-6)
    assert traffic(device, value.backward)[1:] == (0, 0)

def test_training(device):
    def losses(where):
        torch.manual_seed(0)
        return [step.loss for step in train(ContextUnet(n_feat=8, predicts="v"), Sprites.draw(16), S, steps=3, batch_size=4, device=where, autocast=False)]
    assert_close(losses(NAME), losses("cpu"), rtol=1e-4, atol=1e-5)

def test_context_is_dropped_there(device):
    kept = drop_context(torch.ones(50, 5), 0.5, seeded())
    assert torch.equal(drop_context(torch.ones(50, 5).to(NAME), 0.5, seeded()).cpu(), kept)

def functions_of(notebook, names, **found):
    "These functions of a lesson, out of its cells, in a namespace of these variables and the lesson's imports."
    found = {**vars(training), **found}
    cells = ["".join(c["source"]) for c in json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    for tree in (ast.parse("".join(line + "\n" for line in cell.splitlines() if not line.startswith("%"))) for cell in cells):
        wanted = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "name", None) in names]
        exec(compile(ast.Module(wanted, []), notebook, "exec"), found)
    return types.SimpleNamespace(**{name: found[name] for name in names})

def test_lesson_2_with_a_network_elsewhere(device):
    "`train` may have put the network on a GPU; what the lesson holds beside it is on the CPU, and so are its pictures."
    net = random_unet(predicts="v").to(NAME)
    held_out, context = Sprites.draw(200).batch(range(200))
    lesson = functions_of("L2_Training.ipynb", ["draw", "loss_per_level", "device_of", "loss_on_new", "noise_of", "guess", "depends_on_batch"],
                          schedule=S, rows=torch.eye(5), held_out=held_out, held_out_context=context, context=context[:64], t=10, xt=held_out[:8],
                          mates=held_out[100:156])
    times = [1, 10, 20]
    assert lesson.draw(net, steps=2).device == CPU and lesson.draw(net, steps=2).shape == (5, 3, 16, 16)
    assert len(lesson.loss_per_level(predictor(net, S, context[:8].repeat(2, 1)), held_out[:8], times, repeats=2)) == 3
    assert lesson.loss_on_new(net) > 0 and not lesson.depends_on_batch(net)
    assert lesson.guess(net, torch.full((56,), 10)).device == CPU

def test_wrong_versions_fail(device):
    "What the course did before: each of these fails, or stalls, on a device."
    x, net = torch.zeros(3, 3, 8, 8).to(NAME), random_unet().to(NAME)
    with pytest.raises(TypeError, match="float64"): x.flatten(1).double()                               # the old ideal predictor
    with pytest.raises(TypeError, match="float64"): S.alpha_bar[torch.tensor([1, 2, 3])].to(x.device)   # device first, dtype second
    with pytest.raises(RuntimeError, match="same device"): S.alpha_bar.float()[[1, 2, 3]].view(-1, 1, 1, 1) * x
    times = torch.tensor([1, 2, 3]).to(NAME)
    assert traffic(device, lambda: at(S.alpha_bar, times, x))[1] == 1                                   # the old prediction_loss: a stall each
    assert traffic(device, lambda: torch.tensor(7).to(x.device).expand(3))[2] == 1               # the old predictor: a transfer per step
    with pytest.raises(ValueError, match="on cpu"): net(torch.zeros(3, 3, 8, 8), times)                 # the old `sample`


# --- noise in blocks -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("limit", [1, 40, 2**22])
@pytest.mark.parametrize("shape", [(1,), (3,), (7,), (3, 5), (3, 16, 16)], ids=str)
def test_blocks_change_no_number(monkeypatch, limit, shape):
    monkeypatch.setattr(noise_module, "BLOCK", limit)
    noise, generators = per_sample_noise(5, [2, 9]), [np.random.default_rng([5, 1, i]) for i in (2, 9)]
    for _ in range(12):
        want = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
        assert torch.equal(noise(torch.empty(2, *shape)), torch.from_numpy(want))

def test_blocks_of_a_changing_shape():
    noise, generator = per_sample_noise(5, [2]), np.random.default_rng([5, 1, 2])
    for shape in [(4,), (4,), (3, 3), (2,), (50,), (1, 1), (4,), (4,)]:
        assert torch.equal(noise(torch.empty(1, *shape))[0], torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)))

def test_blocks_are_few_and_bounded(monkeypatch):
    drawn, normal = [], noise_module._normal
    monkeypatch.setattr(noise_module, "_normal", lambda generators, shape, device: drawn.append(len(generators) * shape[0]) or normal(generators, shape, device))
    noise, x = per_sample_noise(0, 100), torch.empty(100, 3, 16, 16)
    for _ in range(200): noise(x)
    assert max(drawn) <= noise_module.BLOCK == 2**22 and len(drawn) < 10        # 16 MB in float32
    drawn.clear()
    large = per_sample_noise(0, 2)
    for _ in range(3): large(torch.empty(2, 2**22))                          # a step that is larger than a block is drawn alone
    assert drawn == [2**23] * 3


# --- batches of bounded memory ---------------------------------------------------------------------------------------

def largest(net): # notes how many samples the network sees together
    seen = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen

@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 500])
@pytest.mark.parametrize("name", ["no context", "one row", "a row each", "guided", "indices"])
def test_the_same_images_in_any_batches(name, size):
    net = random_unet()
    seen, rows = largest(net), one_hot(torch.arange(7) % 5)
    predict = {"no context": predictor(net, S), "one row": predictor(net, S, rows[:1]), "a row each": predictor(net, S, rows),
               "guided": guided(predictor(net, S, rows), predictor(net, S), 2), "indices": predictor(net, S, rows)}[name]
    n = [5, 3, 11, 2, 2, 90, 0] if name == "indices" else 7
    def draw(size): return sample(clipped(predict, S), S, n, steps=4, shape=(3, 8, 8), batch_size=size)
    want = draw(7)
    seen.clear()
    assert_close(draw(size), want, rtol=1e-4, atol=1e-4)
    assert max(seen) == min(size, 7)

def test_the_default_bounds_the_batch():
    net = random_unet()
    seen = largest(net)
    assert sample(predictor(net, S, torch.zeros(1100, 5)), S, 1100, steps=1, shape=(3, 4, 4)).shape == (1100, 3, 4, 4)
    assert seen == [500, 500, 100]

def test_ideal_predictor_in_batches():
    predict = ideal_predictor(random_images(16, (3, 8, 8)), S)
    assert_close(sample(predict, S, 5, steps=4, shape=(3, 8, 8), batch_size=2), sample(predict, S, 5, steps=4, shape=(3, 8, 8)), rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("rows", [2, 500, 600, 1100])
def test_contexts_that_do_not_fit_are_refused_before_any_work(rows):
    "1100 rows for 1000 samples would fill every batch, and 500 the first one."
    net = random_unet()
    seen, predict = largest(net), predictor(net, S, torch.zeros(rows, 5))
    for ask in (predict, clipped(predict, S), guided(predict, predictor(net, S), 2)):
        with pytest.raises(ValueError, match=r"expected \(1000, n_context\)"): sample(ask, S, 1000, steps=1, shape=(3, 4, 4))
    assert not seen

def test_a_prediction_of_your_own_sees_all_samples():
    sizes, inner = [], smooth_predictor(S, 12)
    def predict(xt, t): sizes.append(len(xt)); return inner(xt, t)
    sample(predict, S, 5, steps=2, shape=(3, 2, 2), batch_size=2)
    assert sizes == [5, 5]
    mixed = clipped(predict, S)
    assert not hasattr(mixed, "part") and sample(mixed, S, 5, steps=2, shape=(3, 2, 2), batch_size=2).shape == (5, 3, 2, 2)

def test_one_bar_over_all_batches(capsys):
    sample(predictor(random_unet(), S), S, 5, steps=3, shape=(3, 4, 4), batch_size=2, progress=True)
    out = capsys.readouterr().out
    assert "9/9" in out and "3/3" not in out

@pytest.mark.parametrize("size", [0, -1, 2.0, True, None, "8"])
def test_bad_batch_sizes(size):
    with pytest.raises(ValueError, match="batch_size"): sample(predictor(random_unet(), S), S, 2, steps=1, shape=(3, 4, 4), batch_size=size)


# --- schedules -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", [Schedule.linear(500), Schedule.cosine(37), Schedule([1, 0.5, 0.25])], ids=str)
@pytest.mark.parametrize("factor", [0.25, 1, 2, 64 / 16])
def test_shifted(schedule, factor):
    shifted = schedule.shifted(factor)
    assert shifted.T == schedule.T and shifted.alpha_bar[0] == 1
    assert_close(shifted.sigma, factor * schedule.sigma, rtol=1e-9, atol=0)
    assert_close(shifted.shifted(1 / factor).alpha_bar, schedule.alpha_bar, rtol=1e-9, atol=0)

@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf"), "2", None, torch.ones(2)], ids=str)
def test_bad_shifts(factor):
    with pytest.raises(ValueError, match="factor"): S.shifted(factor)

def test_betas_that_leave_the_signal():
    with pytest.warns(UserWarning, match=r"linear\(50, 0.0001, 0.02\) leaves 0.78 of the signal") as told: Schedule.linear(50, 1e-4, 0.02)
    assert told[0].filename == __file__                                     # it points at the line that asked
    assert "Schedule.linear(50)" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule.linear(50)                                                 # the advice
        Schedule.linear(500, 1e-4, 0.02), Schedule.linear(1), Schedule.linear(2), Schedule([1, 0.5, 0.25])


# --- the range of images ---------------------------------------------------------------------------------------------

def test_check_range():
    images = Sprites.draw(8).batch(range(8))[0]
    pixels = (images + 1) * 127.5
    with pytest.raises(ValueError, match=r"0 … 255 write x0 / 127.5 - 1"): check_range(pixels)
    with pytest.raises(ValueError, match="to 255: expected"): check_range(pixels.round().to(torch.uint8))
    with pytest.warns(UserWarning, match=r"0 … 1 write x0 \* 2 - 1"): check_range(pixels / 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for right in (images, pixels / 127.5 - 1, (pixels / 255) * 2 - 1, torch.randn(64, 2), torch.zeros(4, 3, 8, 8)): check_range(right)

def test_check_range_reads_once(device):
    x = torch.rand(2, 3, 8, 8).sub(0.5).to(NAME)
    assert traffic(device, lambda: check_range(x))[1] == 1


# --- precision -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("where", ["cpu", "mps", "cuda"])
def test_precision_can_be_set(monkeypatch, name, where):
    monkeypatch.setenv("DIFFUSION_COURSE_PRECISION", name)
    assert fast_dtype(torch.device(where)) == PRECISIONS[name]

@pytest.mark.parametrize("name", ["", "float16", "bf16", "FLOAT32", "64"])
def test_other_precisions_are_refused(monkeypatch, name):
    monkeypatch.setenv("DIFFUSION_COURSE_PRECISION", name)
    with pytest.raises(ValueError, match="expected float32 or bfloat16"): fast_dtype(CPU)

def loss_after(autocast=None):
    torch.manual_seed(0)
    return [step.loss for step in train(ContextUnet(n_feat=8), Sprites.draw(16), S, steps=3, batch_size=8, device="cpu", autocast=autocast)]

def test_the_setting_reaches_the_training(monkeypatch):
    exact = loss_after(autocast=False)
    monkeypatch.setenv("DIFFUSION_COURSE_PRECISION", "float32")
    assert loss_after() == loss_after(True) == exact
    monkeypatch.setenv("DIFFUSION_COURSE_PRECISION", "bfloat16")
    assert loss_after() == loss_after(torch.bfloat16) != exact
    assert loss_after(autocast=False) == exact                              # who asks for float32 gets it

@pytest.mark.parametrize("operators", [types.SimpleNamespace(), types.SimpleNamespace(_is_mkldnn_bf16_supported=lambda: (_ for _ in ()).throw(RuntimeError("no oneDNN")))], ids=["missing", "fails"])
def test_without_onednn(monkeypatch, operators):
    monkeypatch.delenv("DIFFUSION_COURSE_PRECISION", raising=False)
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    assert fast_dtype(CPU) is None
    assert loss_after() == loss_after(autocast=False)

@pytest.mark.parametrize("name", PRECISIONS)
def test_a_fast_network_answers_in_the_dtype_of_the_images(monkeypatch, name):
    monkeypatch.setenv("DIFFUSION_COURSE_PRECISION", name)
    torch.manual_seed(0)
    net, seen = ContextUnet(n_feat=8, predicts="v"), []
    net.middle1.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    x, t, context = torch.randn(2, 3, 16, 16), torch.tensor([3, 400]), torch.eye(5)[:2]
    for p in net.out.parameters(): torch.nn.init.normal_(p, std=0.1) # they start at zero, and zero has no digits
    with torch.no_grad(): quick, exact = fast(net)(x, t, context), net(x, t, context)
    assert quick.dtype == torch.float32 and seen == [PRECISIONS[name] or torch.float32, torch.float32]
    assert torch.equal(quick, exact) == (name == "float32")
    torch.testing.assert_close(quick, exact, atol=0.05, rtol=0.05)
    assert fast(net).predicts == "v" and fast(torch.nn.Identity()).predicts == "eps"
    assert not fast(net).eval().net.training and list(fast(net).parameters())[0] is net.time_embedding[0].weight

def test_processes_do_not_share_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert best_device() == torch.device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert best_device() == CPU
