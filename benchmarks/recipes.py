"""The training recipes that `training.py` compares. Each is a generator that makes a network, trains it, and yields the one to sample with after every step.

labs: the labs' network and settings (Adam 1e-3 with linear decay, batch 100, noise prediction, linear betas up to 0.02 at T = 500),
    repaired only where they are wrong: the square root in the noise, and a shortcut that is trained. Float32, as it was written.
labs, bfloat16: the same in bfloat16 and channels_last, their best setting on a processor that multiplies bfloat16.
ours, noise: ContextUnet with 24 features, noise prediction, cosine schedule, Muon, times around the middle, batch 32, averaged weights, bfloat16 where the processor has it.
ours, v: the same with v-prediction, and a shorter average.

All see the same sprites, drop the context of one in ten, and draw order, times and noise from the seed.
"""
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from diffusion_course.context import with_dropped_context
from diffusion_course.muon import muon
from diffusion_course.sampling import Schedule
from diffusion_course.sprites import Sprites
from diffusion_course.training import middle_times, noise_prediction_loss, prediction_loss, shuffled_batches, train
from diffusion_course.unet import ContextUnet
from labs_unet import LabsUnet

LABS = Schedule.linear(500, 1e-4, 0.02)


class Recipe(NamedTuple):
    network: Callable[[], nn.Module]
    schedule: Schedule
    batch: int
    train: Callable[[Sprites, int, int], Iterator[nn.Module]] # (data, steps, seed)


def labs_network(): return LabsUnet(shortcut="learned")


def generator(*key: int) -> torch.Generator: # of its own for each seed and step
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def labs(data, steps, seed, bfloat16=False):
    torch.manual_seed(seed)
    layout = torch.channels_last if bfloat16 else torch.contiguous_format
    net = labs_network().to(memory_format=layout)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loss = with_dropped_context(noise_prediction_loss)
    for step, batch in enumerate(shuffled_batches(len(data), 100, steps, seed=seed)):
        net.train()
        x0, context = data.batch(batch)
        for group in optimizer.param_groups: group["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss(net, x0.contiguous(memory_format=layout), context, LABS, generator=generator(seed, step))
        value.backward()
        optimizer.step()
        yield net


def our_network(predicts): return ContextUnet(n_feat=24, predicts=predicts)


def ours(data, steps, seed, predicts, ema):
    torch.manual_seed(seed)
    loss = with_dropped_context(partial(prediction_loss, times=middle_times))
    loop = train(our_network(predicts), data, Schedule.cosine(), steps=steps, batch_size=32, ema=ema, optimizer=muon, loss=loss, seed=seed, device="cpu")
    for step in loop: yield step.ema


RECIPES = {"labs": Recipe(labs_network, LABS, 100, labs),
           "labs, bfloat16": Recipe(labs_network, LABS, 100, partial(labs, bfloat16=True)),
           "ours, noise": Recipe(partial(our_network, "eps"), Schedule.cosine(), 32, partial(ours, predicts="eps", ema=0.995)),
           "ours, v": Recipe(partial(our_network, "v"), Schedule.cosine(), 32, partial(ours, predicts="v", ema=0.99))}
