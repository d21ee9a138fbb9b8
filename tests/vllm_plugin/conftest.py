# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A real engine and adapters for it. Tests that need vLLM are collected where it is installed: `make test-vllm`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parent))  # for served.py

if find_spec("vllm") is None:
    collect_ignore = [
        "test_complaints.py",
        "test_edits.py",
        "test_front_calls.py",
        "test_internals.py",
        "test_points.py",
        "test_registration.py",
        "test_front_end.py",
        "test_server.py",
        "test_variants.py",
    ]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory):
    """The base model's folder, adapters, and what transformers answers with each of them."""
    from served import Served

    return Served.make(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def engine(served):
    """An engine in this process that serves the adapters, with blocks of 32 tokens in its prefix cache."""
    from served import Engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield Engine(served, enforce_eager=True, block_size=32)
