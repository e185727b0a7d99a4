"On what, with what and when a benchmark ran, and how several things are timed in turns."
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def processor():
    "The name of the processor, where the system tells it."
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    native = "native" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "emulated"
    return (f"{date.today().isoformat()}, {processor()} ({torch.backends.cpu.get_cpu_capability()}, bfloat16 {native}), {os.cpu_count()} cores; "
            f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}")


def in_turns(jobs: dict, rounds: int, warm_up: int = 2, clock=time.perf_counter) -> dict:
    "Median seconds of each job. In every round each job runs once, so that a drift of the machine hits all."
    seconds = {name: [] for name in jobs}
    for i in range(rounds + warm_up):
        for name, job in jobs.items():
            start = clock()
            job()
            if i >= warm_up: seconds[name].append(clock() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}
