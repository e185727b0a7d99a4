"Sprites emerging from noise, made with the shipped model: OUT/emerging.gif and OUT/contact_sheet.png."
import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") # before torch is imported: waiting threads give their core to others

import torch

from diffusion_course.checkpoints import pretrained
from diffusion_course.context import one_hot
from diffusion_course.plots import animate, save_images
from diffusion_course.sampling import clipped, ddpm, initial_noise, per_sample_noise, predictor
from diffusion_course.sprites import CLASSES


def emerge(per_class, steps, seed=0):
    "The states of DDPM from noise to sprites, `per_class` sprites of each class in a row of its own."
    net, schedule = pretrained("sprites")
    context = one_hot(torch.arange(len(CLASSES)).repeat_interleave(per_class))
    predict = clipped(predictor(net, schedule, context), schedule)
    loop = ddpm(predict, initial_noise(len(context), seed=seed), schedule, schedule.timesteps(steps), noise=per_sample_noise(seed, len(context)))
    states = [step.xs for step in loop]
    return [initial_noise(len(context), seed=seed), *states]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    states = emerge(8, 100)
    chosen = states[:60:12] + states[60::3] # noise compresses badly and says little: few frames of it
    large = [state.repeat_interleave(3, 2).repeat_interleave(3, 3) for state in chosen] # viewers of GIFs blur what they enlarge
    animate(large, ncols=8, fps=10, alt="Noise turns into five rows of sprites: heroes, creatures, food, spells and people in profile").save(out / "emerging.gif")
    save_images(out / "contact_sheet.png", states[-1], ncols=8)
    print(f"{out / 'emerging.gif'}: sprites emerging from noise\n{out / 'contact_sheet.png'}: the same sprites, larger")


if __name__ == "__main__": main()
