"""How fast is our network beside others of its size? Its arithmetic is counted, and all are timed in turns.

    python benchmarks/network.py            writes results/network.md; about ten minutes

Each network is timed in four settings: float32 and bfloat16 (autocast), each in two memory layouts. The table shows float32 as it comes, and the best.
"""
import argparse
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import peers
from diffusion_course.unet import ContextUnet
from labs_unet import LabsUnet
from machine import RESULTS, in_turns, machine

LAYOUTS = {"": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def ours():
    "With random weights everywhere, so that no zero-initialised layer could make it look faster."
    net = ContextUnet()
    for p in net.parameters(): nn.init.normal_(p, std=0.05)
    return net


NETWORKS = {"ours": ours, "labs, repaired": lambda: LabsUnet(shortcut="learned"), **peers.NETWORKS}


def inputs(n):
    g = torch.Generator().manual_seed(0)
    context = F.one_hot(torch.randint(5, (n,), generator=g), 5).float()
    return torch.randn(n, 3, 16, 16, generator=g), torch.randint(1, 501, (n,), generator=g), context


def flops(net):
    "Million floating-point operations of one forward pass per image; a multiplication and its addition are two."
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net.eval()(*inputs(4))
    return counter.get_total_flops() / 4e6


def job(make, n, dtype, layout, training):
    net, (x, t, context) = make().to(memory_format=layout).train(training), inputs(n)
    x = x.contiguous(memory_format=layout)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    def answer():
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16): return net(x, t, context).float()
    def forward():
        with torch.no_grad(): answer()
    def step():
        optimizer.zero_grad()
        F.mse_loss(answer(), x).backward()
        optimizer.step()
    return step if training else forward


def timed(n, training, rounds):
    "name -> {setting: seconds}"
    settings = {f"{d} {l}".strip(): (DTYPES[d], LAYOUTS[l]) for d, l in product(DTYPES, LAYOUTS)}
    jobs = {(name, s): job(make, n, *settings[s], training) for name, make in NETWORKS.items() for s in settings}
    seconds = in_turns(jobs, rounds, warm_up=1)
    return {name: {s: seconds[name, s] for s in settings} for name in NETWORKS}


def rows(forward, training):
    for name, make in NETWORKS.items():
        net = make()
        cells = [name, f"{sum(p.numel() for p in net.parameters()):,}", f"{flops(net):.0f}"]
        for seconds in (forward[name], training[name]):
            best = min(seconds, key=seconds.get)
            cells += [f"{1000 * seconds['float32']:.0f}", f"{1000 * seconds[best]:.0f} ({best})"]
        yield "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="how often each is timed")
    parser.add_argument("--n", type=int, default=64, help="images in a batch")
    args = parser.parse_args()
    lines = ["# Networks: arithmetic and speed", "",
             f"{machine()}. Images 3 × 16 × 16, batches of {args.n}, milliseconds, median of {args.rounds} rounds in turns; forward passes in eval mode. "
             "MFLOP: of one image, forward. " + ", ".join(f"{name} {version}" for name, version in peers.VERSIONS.items()) + ". Repeat with:", "",
             f"    python benchmarks/network.py --rounds {args.rounds} --n {args.n}"]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        forward, training = timed(args.n, False, args.rounds), timed(args.n, True, max(args.rounds // 2, 3))
        lines += ["", f"## {threads} thread{'s' * (threads > 1)}", "",
                  "| network | parameters | MFLOP | forward, float32 | forward, best setting | training step, float32 | training step, best setting |",
                  "|---|---|---|---|---|---|---|", *rows(forward, training)]
    text = "\n".join(lines) + "\n"
    (RESULTS / "network.md").write_text(text)
    print(text)


if __name__ == "__main__": main()
