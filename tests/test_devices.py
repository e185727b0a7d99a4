"CUDA and MPS, where they exist: the same samples as on the CPU, autocast, torch.compile. Elsewhere these tests skip, and say so."
import copy

import pytest
import torch
from torch.testing import assert_close

from diffusion_course.checkpoints import pretrained, resume_training, save_training
from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import ddim, dpmpp_2m
from diffusion_course.sampling import Schedule, clipped, ddpm, predictor, sample
from diffusion_course.sprites import Sprites
from diffusion_course.training import best_device, fast_dtype, train
from diffusion_course.unet import ContextUnet

DEVICES = [name for name, there in {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.items() if there]
device = pytest.mark.parametrize("device", DEVICES or [pytest.param("cuda", marks=pytest.mark.skip(reason="this machine has neither CUDA nor MPS"))])


def draw(net, schedule, device, sampler): return sample(clipped(predictor(net.to(device), schedule, one_hot(torch.arange(6) % 5).to(device)), schedule), schedule, 6, sampler=sampler, steps=8, device=device).cpu()

@device
@pytest.mark.parametrize("sampler", [ddpm, ddim, dpmpp_2m])
def test_samples_are_those_of_the_cpu(device, sampler):
    net, schedule = pretrained("sprites")
    on_cpu = draw(copy.deepcopy(net), schedule, "cpu", sampler)
    assert_close(draw(net, schedule, device, sampler), on_cpu, rtol=0, atol=0.02) # a GPU adds up in another order, perhaps in TF32

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
    assert fast_dtype(torch.device("cpu")) in (None, torch.bfloat16)
