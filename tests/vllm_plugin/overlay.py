# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Lay the Python of one release of vLLM over the compiled extensions of another, which a CPU build has.

    python overlay.py WHEEL FOLDER

A process with FOLDER on PYTHONPATH runs the wheel's release. It is no release that anyone serves: it tests that the plugin knows it.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path


def lay_over(wheel: Path, folder: Path) -> None:
    installed = Path(importlib.util.find_spec("vllm").origin).parent
    shutil.rmtree(folder, ignore_errors=True)
    kept = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(installed, folder / "vllm", ignore=kept)
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if name.startswith("vllm/") and not name.endswith(".so"):
                files.extract(name, folder)
    # By it vLLM knows that it runs on a CPU.
    release = wheel.name.split("-")[1]
    info = folder / f"vllm-{release}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")


if __name__ == "__main__":
    lay_over(Path(sys.argv[1]), Path(sys.argv[2]))
