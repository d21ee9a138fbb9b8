# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The benchmark of serving and training runs, and its tables say what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import serving_cost  # noqa: E402
import serving_tables  # noqa: E402


def measured(median: float, *ratios: float) -> dict:
    return {"median": median, "ratio": sorted(ratios)[len(ratios) // 2], "ratios": ratios}


def test_tables(tmp_path: Path) -> None:
    folder = tmp_path / "serving_cost" / "m-cpu-float32"
    folder.mkdir(parents=True)
    for tenants in (8, 1):
        methods = {"bare": measured(1234.4, 1, 1, 1), "iapt": measured(1300, 1.1, 1.04, 1.06 * tenants)}
        group = {
            **{"kind": "serving", "tenants": tenants, "tokens": 32, "refused": {"prompt-tuning": "no"}},
            "methods": {name: {"first_token": value} for name, value in methods.items()},
            "sizes": {"bare": {"adapter_bytes": 0, "slots": 0}, "iapt": {"adapter_bytes": 2_220_960, "slots": 4}},
            "setup": {"model": "m", "threads": 1},
        }
        (folder / f"serving-{tenants}-32.json").write_text(json.dumps(group))
    made = serving_tables.blocks(tmp_path)
    assert made["serving_cost.m-cpu-float32.first_token"].splitlines() == [
        "| method | 32 tokens, 1 tenant | 32 tokens, 8 tenants |",
        "|---|---|---|",
        "| bare | 1,234 ms | 1,234 ms |",
        "| prompt-tuning | refused | refused |",
        "| iapt | 1.06 (1.04-1.10) | 1.10 (1.04-8.48) |",
    ]
    assert made["serving_cost.m-cpu-float32.methods"].splitlines() == [
        "| method | adapter | slots | first token | each token after it |",
        "|---|---|---|---|---|",
        "| iapt | 2.22 MB | 4 | 1.06-1.10 | - |",
    ]
    assert "model m," in made["serving_cost.m-cpu-float32.setup"]
    assert made["serving_cost.setup"] == made["serving_cost.m-cpu-float32.setup"]  # one model, and all
    assert "serving_cost.m-cpu-float32.step" not in made  # no training was measured
    assert serving_tables.blocks(tmp_path / "nothing") == {}


def test_tables_of_engines(tmp_path: Path) -> None:
    """The median is of the rounds' ratios, and not the ratio of medians."""
    rounds = [(1.0, 1.1, 2.0), (2.0, 2.1, 4.2), (4.0, 4.4, 9.6)]  # seconds of the bare engine, IAPT and LoRA
    taken = [{"bare": bare, "preft": bare, "prompt": iapt, "lora": lora} for bare, iapt, lora in rounds]
    calls = [{"8 requests": {kind: {"all": one} for kind, one in each.items()}} for each in taken]
    adding = {"1000": {"add_ms": [5.0, 7.0, 6.0], "remove_ms": [0.5]}}
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving/m.json").write_text(json.dumps({"setup": {"model": "m"}, "adding": adding, "rounds": calls}))
    made = serving_tables.blocks(tmp_path)
    assert made["serving.m.engines"].splitlines() == [
        "| medians of 3 rounds | bare | PreFT | IAPT | vLLM's own LoRA |",
        "|---|---|---|---|---|",
        "| 8 requests, wall time | 2.00 s | 1.00 [1.00, 1.00] | 1.10 [1.05, 1.10] | 2.10 [2.00, 2.40] |",
    ]
    assert made["serving.m.adding"].splitlines()[2] == "| 1,000 | 6.0 (5.0-7.0) | 0.5 (0.5-0.5) |"
    assert made["serving.m.setup"].startswith("- model m,")


@pytest.mark.slow
@pytest.mark.long
def test_smoke_run_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "serving_cost" / "tiny"
    command = [sys.executable, str(ROOT / "benchmarks" / "serving_cost.py"), "--smoke", "--results", str(folder)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    assert sorted(found) == ["serving-1-8", "serving-3-8", "training-16", "training-16-ckpt"]
    ours = {"iapt", "m-idpg", "s-idpg", "ipt", "dp", "lpt", "idspam"}
    assert all(ours | {"bare", "lora-r16"} <= set(group["methods"]) for group in found.values())
    assert all(set(serving_cost.ONE_TENANT) >= set(group["refused"]) for group in found.values())
    assert all(
        group["methods"]["bare"][what]["ratio"] == 1 for group in found.values() for what in group["methods"]["bare"]
    )
    # 4 layers: two projections of 64 by 16, a pooling of 16 by 4, and 12 coefficients
    assert found["serving-1-8"]["sizes"]["iapt"] == {
        "adapter_bytes": 4 * 4 * (2 * 64 * 16 + 2 * 16 * 4),
        "slots": 4,
    }
    (folder / "training-16.json").unlink()
    again = subprocess.run(command, capture_output=True, text=True)
    assert (
        again.returncode == 0 and "3 of 4 groups are there" in again.stdout and (folder / "training-16.json").is_file()
    )
    assert "| lora-r16 | " in serving_tables.blocks(tmp_path)["serving_cost.tiny.step"]
