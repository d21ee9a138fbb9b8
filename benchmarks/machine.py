# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""On what a benchmark ran, and how much memory it took."""

from __future__ import annotations

import ctypes
import functools
import platform
import resource
import subprocess
from pathlib import Path

import peft
import torch
import transformers

import peft_instance_prompt


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@functools.cache
def setup(device: str) -> dict:
    """Versions, processor, and the revision of this repository: `None` where it is none, with `+` where files are changed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "peft_instance_prompt": peft_instance_prompt.__version__,
        "revision": revision(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def revision() -> str | None:
    def git(*args: str) -> str | None:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
    except OSError:  # there is no git
        return None
    # What the benchmark itself writes does not count as a change.
    return commit and commit + ("+" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "")


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Memory:
    """The peak of the memory from here on, in MB: of the card, or of this process.

    Where there is no /proc, the process's peak is that since its start.
    """

    def __init__(self, device: str):
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif platform.system() == "Linux":
            ctypes.CDLL(None).malloc_trim(
                0
            )  # what earlier work has left is not this work's (musl has no such function)
            Path("/proc/self/clear_refs").write_text("5")
        self.start = self.peak()

    def peak(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        if platform.system() == "Linux":
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    def above_start(self) -> float:
        return self.peak() - self.start
