"On what, with what and when a benchmark ran: one line for each report."
import os
import platform
from datetime import date
from pathlib import Path

import torch


def processor():
    "The name of the processor, where the system tells it."
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    return (f"{date.today().isoformat()}, {processor()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores; "
            f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}")
