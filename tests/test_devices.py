"CUDA and MPS, where they exist: the same samples as on the CPU, autocast, torch.compile. Elsewhere these tests skip, and say so."
import copy

import pytest
import torch
from torch.testing import assert_close

from diffusion_course.checkpoints import pretrained, resume_training, save_training
from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import ddim, dpmpp_2m
from diffusion_course.sampling import Schedule, clipped, ddpm, initial_noise, per_sample_noise, predictor, sample
from diffusion_course.sprites import Sprites
from diffusion_course.precision import best_device, fast_dtype
from diffusion_course.training import prediction_loss, train
from diffusion_course.unet import ContextUnet

DEVICES = [name for name, there in {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.items() if there]
device = pytest.mark.parametrize("device", DEVICES or [pytest.param("cuda", marks=pytest.mark.skip(reason="this machine has neither CUDA nor MPS"))])


@pytest.fixture(autouse=True)
def full_float32():
    "Convolutions on recent GPUs round their inputs to 10 binary digits (TF32) unless told otherwise, which a comparison with the CPU would see."
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def draw(net, schedule, device, sampler): return sample(clipped(predictor(net.to(device), schedule, one_hot(torch.arange(6) % 5).to(device)), schedule), schedule, 6, sampler=sampler, steps=8, device=device).cpu()

@device
@pytest.mark.parametrize("sampler", [ddpm, ddim, dpmpp_2m])
def test_samples_are_those_of_the_cpu(device, sampler):
    net, schedule = pretrained("sprites")
    on_cpu = draw(copy.deepcopy(net), schedule, "cpu", sampler)
    assert_close(draw(net, schedule, device, sampler), on_cpu, rtol=0, atol=0.02) # a GPU adds up in another order

@device
def test_sampling_follows_the_network(device):
    net, schedule = pretrained("sprites")
    predict = clipped(predictor(net.to(device), schedule, one_hot("food")), schedule)          # the context is on the CPU
    there = sample(predict, schedule, 5, sampler=ddim, steps=4, batch_size=2)                   # no device is named
    assert there.device.type == device
    *_, step = ddim(predict, initial_noise(5), schedule, schedule.timesteps(4))                # noise on the CPU, handed over directly
    assert step.xs.device.type == "cpu"
    assert_close(there.cpu(), step.xs, rtol=0, atol=0.02)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA alone can tell that it had to wait")
@pytest.mark.parametrize("sampler", [ddpm, dpmpp_2m])
def test_no_step_waits_for_the_gpu(sampler):
    "CUDA raises where the host waits for it: not in the walk of a sampler, nor in a loss and its gradient."
    net, schedule = pretrained("sprites")
    predict = clipped(predictor(net.cuda(), schedule, one_hot(torch.arange(6) % 5)), schedule)
    (x0, context), generator = Sprites.draw(6).batch(range(6)), torch.Generator()
    x0, context = x0.cuda(), context.cuda()
    def both():
        for _ in sampler(predict, initial_noise(6, device="cuda"), schedule, schedule.timesteps(8), noise=per_sample_noise(0, 6)): pass
        prediction_loss(net, x0, context, schedule, generator=generator.manual_seed(0)).backward()
    both()                                                                                     # the first call sets up libraries
    torch.cuda.set_sync_debug_mode("error")
    try: both()
    finally: torch.cuda.set_sync_debug_mode("default")

@device
@pytest.mark.parametrize("autocast", [False, None])
def test_training_learns_and_resumes(device, autocast, tmp_path):
    data, schedule = Sprites.draw(64), Schedule.cosine()
    def run(resume=None, steps=30): return list(train(ContextUnet(n_feat=8), data, schedule, steps=steps, batch_size=16, device=device, autocast=autocast, resume=resume))
    torch.manual_seed(0)
    steps = run()
    assert steps[-1].loss < steps[0].loss
    save_training(tmp_path, steps[-1].state())
    assert resume_training(tmp_path).settings["step"] == 30

@device
def test_compiled_network(device):
    net, schedule = pretrained("sprites")
    expected = draw(copy.deepcopy(net), schedule, device, ddim)
    compiled = torch.compile(net.to(device))
    predict = clipped(predictor(compiled, schedule, one_hot(torch.arange(6) % 5).to(device), kind=net.predicts), schedule)
    assert_close(sample(predict, schedule, 6, sampler=ddim, steps=8, device=device).cpu(), expected, rtol=0, atol=0.02)

def test_the_best_device_is_one_that_works():
    x = torch.ones(2, device=best_device())
    assert (x + x).sum().item() == 4
    assert fast_dtype(torch.device("cpu")) in (None, torch.bfloat16) # more about it in test_machines.py
