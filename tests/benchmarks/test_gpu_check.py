# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The first check on a GPU runs in its tiny form, on the CPU, and its table has the cells that were measured."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402


def test_tiny_form_prints_the_table() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--tiny", "--without-vllm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[:2] == ["|  | bare | LoRA | IAPT | PreFT |", "| --- | --- | --- | --- | --- |"]
    rows = [line.strip("| ").split(" | ") for line in lines[2:7]]
    assert [row[0] for row in rows] == [
        *("decoding, a step, 1 tenant", "first token, 1 tenant", "decoding, a step, 3 tenants"),
        *("first token, 3 tenants", "training step, 2 rows of 16 tokens"),
    ]
    for _, bare, *ratios in rows:
        assert re.fullmatch(r"\d+\.\d ms", bare) and len(ratios) == 3
        for ratio in ratios:
            median, low, high = map(float, re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", ratio).groups())
            assert 0 < low <= median <= high
    assert "shape tiny, dtype float32, prompt 8 tokens" in lines[-1]


def test_rows_of_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Engines of which each takes a second, or a multiple of it, for the decoding steps of all requests."""
    started, closed = [], []

    class Engine:
        def __init__(self, kind: str, folder: Path, tenants: int, eager: bool, more: dict):
            started.append((kind, tenants, more["model"]))
            self.factor = {"bare": 1.0, "prompt": 1.5, "lora": 3.0}[kind]

        def __call__(self, call: str, tokens: int, tenants: int) -> dict[str, float]:
            return {"decode": self.factor * tenants, "first": 0.25}

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(gpu_check, "Remote", Engine)
    args = argparse.Namespace(tenants=(1, 8), rounds=3, new_tokens=11, dtype="float32", tiny=True)
    assert list(gpu_check.vllm_rows(tmp_path, args)) == [
        ["vLLM: decoding, a step, 1 tenant", "100.0 ms", "3.00 [3.00, 3.00]", "1.50 [1.50, 1.50]", "not measured"],
        ["vLLM: first step, 1 tenant", "250.0 ms", "1.00 [1.00, 1.00]", "1.00 [1.00, 1.00]", "not measured"],
        ["vLLM: decoding, a step, 8 tenants", "800.0 ms", "3.00 [3.00, 3.00]", "1.50 [1.50, 1.50]", "not measured"],
        ["vLLM: first step, 8 tenants", "250.0 ms", "1.00 [1.00, 1.00]", "1.00 [1.00, 1.00]", "not measured"],
    ]
    assert [kind for kind, *_ in started] == ["bare", "lora", "prompt"] and len(closed) == 3
    assert {(tenants, model) for _, tenants, model in started} == {(8, str(tmp_path / "model"))}
    assert sum(share for _, share in gpu_check.ENGINES.values()) < 0.95, "they stand on one card"
