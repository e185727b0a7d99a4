"""How fast is our network beside the labs'? They are timed in turns within one run: drift of the machine hits all.

    python benchmarks/network.py            prints a table and writes it to benchmarks/results/network.md
"""
import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from diffusion_course.unet import ContextUnet
from labs_unet import LabsUnet
from machine import machine

RESULTS = Path(__file__).parent / "results" / "network.md"
LABS, REPAIRED, OURS = "labs", "labs, repaired", "ours"


def networks() -> dict[str, nn.Module]:
    "Ours gets random weights everywhere, so that no zero-initialised layer could make it look faster."
    torch.manual_seed(0)
    ours = ContextUnet()
    for p in ours.parameters(): nn.init.normal_(p, std=0.05)
    return {LABS: LabsUnet(), REPAIRED: LabsUnet(shortcut="learned"), OURS: ours}


def inputs(n: int):
    torch.manual_seed(0)
    return torch.randn(n, 3, 16, 16), torch.randint(1, 501, (n,)), F.one_hot(torch.randint(5, (n,)), 5).float()


def forward(net, n):
    x, t, context = inputs(n)
    net.eval()
    def run():
        with torch.no_grad(): net(x, t, context)
    return run


def training_step(net, n):
    (x, t, context), eps = inputs(n), torch.randn(n, 3, 16, 16)
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    def run():
        loss = F.mse_loss(net(x, t, context), eps)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return run


def medians(jobs: dict, rounds: int, warm_up: int = 2) -> dict[str, float]:
    "Median seconds of each job; in every round each job runs once, in turn."
    seconds = {name: [] for name in jobs}
    for i in range(rounds + warm_up):
        for name, job in jobs.items():
            start = time.perf_counter(); job(); elapsed = time.perf_counter() - start
            if i >= warm_up: seconds[name].append(elapsed)
    return {name: statistics.median(s) for name, s in seconds.items()}


def measure(rounds: int) -> list[tuple]:
    rows = []
    kinds = [("forward of 32", forward, 32, rounds), ("training step of 100", training_step, 100, rounds // 3)]
    for label, make, n, k in kinds:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            rows.append((label, threads, medians({name: make(net, n) for name, net in networks().items()}, max(k, 3))))
    return rows


def report(rows, rounds) -> str:
    size = {name: sum(p.numel() for p in net.parameters()) for name, net in networks().items()}
    lines = ["# Our network beside the labs'", "",
             f"Float32, images 3x16x16, median of {rounds} rounds (a third of that for training), "
             "the three networks timed in turns; forward passes in eval mode under no_grad.",
             f"{machine()}. Repeat with: "
             f"`python benchmarks/network.py --rounds {rounds}`", "",
             "Absolute times change from machine to machine; the ratio is what counts.", "",
             f"| what | threads | labs ({size[LABS]:,} parameters) | labs, repaired ({size[REPAIRED]:,}) "
             f"| ours ({size[OURS]:,}) | ours / labs | ours / repaired |", "|---|---|---|---|---|---|---|"]
    for label, threads, s in rows:
        lines.append(f"| {label} | {threads} | {s[LABS]*1e3:.1f} ms | {s[REPAIRED]*1e3:.1f} ms | {s[OURS]*1e3:.1f} ms "
                     f"| {s[OURS]/s[LABS]:.2f} | {s[OURS]/s[REPAIRED]:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="how often each forward pass is timed")
    rounds = parser.parse_args().rounds
    text = report(measure(rounds), rounds)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)
    print(text)
