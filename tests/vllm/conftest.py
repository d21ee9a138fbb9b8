# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A real engine and adapters for it. Where vLLM is not installed, nothing in this folder is collected: `make test-vllm`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest


if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory):
    """The base model's folder, adapters and what transformers answers with each of them."""
    from served import Served

    return Served.make(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def base() -> Path:
    from smollm2 import load_smollm2

    from pypi_assets import asset_folder

    folder = asset_folder("smollm2-135m-instruct")
    if not folder.is_dir():
        load_smollm2()
    return folder
