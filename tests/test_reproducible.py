"Same seed, same samples: across batch sizes, processes and threads. Same weights: the shipped files are these and no others."
import hashlib
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close

from diffusion_course.checkpoints import pretrained
from diffusion_course.context import one_hot
from diffusion_course.fast_sampling import ddim
from diffusion_course.sampling import clipped, ddpm, predictor, sample

SHIPPED = { # after `make pretrained` these change, and so does the quality in the header
    "sprites.safetensors": "18f9419ff71b43a020163e9770961ecf2fa6926750a33398b0547caa5f9a194e",
    "sprites-fast.safetensors": "0cec7ae305a38612494bdef7e1172cc6727be095d4026a26e49dd28127152a77",
    "features.safetensors": "80c5e1158a23ac4c0277b71c70631741af3bc78397633f466f58f43dad8118b2",
}

@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights(name):
    found = hashlib.sha256((ROOT / "diffusion_course" / "pretrained" / name).read_bytes()).hexdigest()
    assert found == SHIPPED[name], f"{name} is not the file that was shipped: SHA-256 {found}"

def test_nothing_else_is_shipped(): assert {p.name for p in (ROOT / "diffusion_course" / "pretrained").glob("*.safetensors")} == set(SHIPPED)


def drawn(indices, threads=1, stochastic=True):
    torch.set_num_threads(threads)
    net, schedule = pretrained("sprites")
    predict = clipped(predictor(net, schedule, one_hot(torch.as_tensor(indices) % 5)), schedule)
    return sample(predict, schedule, list(indices), sampler=ddpm if stochastic else ddim, steps=5, seed=3).numpy()

def close(a, b): assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-4)

@pytest.mark.parametrize("parts", [[range(8)], [range(4), range(4, 8)], [[i] for i in range(8)], [[7, 0, 3], [1, 2, 4, 5, 6]]], ids=["8", "4+4", "one by one", "mixed"])
def test_batches(parts):
    whole = drawn(range(8))
    for part in parts: close(drawn(part), whole[list(part)])

def test_processes():
    "Two processes share the work; their samples are those of one."
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool: halves = list(pool.map(drawn, [range(4), range(4, 8)]))
    whole = drawn(range(8))
    close(halves[0], whole[:4]); close(halves[1], whole[4:])

def test_threads():
    before = torch.get_num_threads()
    try: close(drawn(range(6), threads=2), drawn(range(6), threads=1))
    finally: torch.set_num_threads(before)

def test_no_process_is_left_behind():
    "Training and sampling start no workers."
    code = """
import os, torch
from diffusion_course.sampling import Schedule, predictor, sample
from diffusion_course.sprites import Sprites
from diffusion_course.training import train
from diffusion_course.unet import ContextUnet
net, schedule = ContextUnet(n_feat=8), Schedule.cosine(20)
for step in train(net, Sprites.draw(16), schedule, steps=2, batch_size=4, device='cpu'): pass
sample(predictor(net, schedule), schedule, 2, steps=2)
children = [pid for pid in os.listdir('/proc') if pid.isdigit() and open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[1] == str(os.getpid())] if os.path.isdir('/proc') else []
print(children)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
