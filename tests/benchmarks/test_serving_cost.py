# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The benchmark of serving and training runs, and fits what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import serving_cost  # noqa: E402


def test_growth_finds_the_law_that_the_times_follow() -> None:
    groups = []
    for tokens in (32, 128):
        for tenants in (1, 8):
            times = {"bare": 10.0 + tokens}
            slots = {"bare": 0, "lora-r16": 0, "iapt": 4, "iapt-16-tokens": 16}
            for name in ("iapt", "iapt-16-tokens"):
                times[name] = times["bare"] + 2 + 0.5 * slots[name] + 0.01 * tokens + 0.25 * tenants
            times["lora-r16"] = 9999.0  # is not fitted
            groups.append(
                {
                    **{"kind": "serving", "tokens": tokens, "tenants": tenants},
                    "methods": {name: {"per_token": {"median": value}} for name, value in times.items()},
                    "sizes": {name: {"slots": n} for name, n in slots.items()},
                }
            )
    found = serving_cost.growth(groups, "per_token")
    assert found == pytest.approx({"constant": 2, "slots": 0.5, "tokens": 0.01, "tenants": 0.25})
    with pytest.raises(ValueError, match="Four measurements"):
        serving_cost.growth(groups[:1], "per_token")


def test_smoke_run_can_be_resumed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "serving_cost.py"), "--smoke", "--results", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert sorted(found) == ["serving-1-8", "serving-3-8", "training-16", "training-16-ckpt"]
    ours = {"iapt", "iapt-16-tokens", "iapt-128", "m-idpg", "s-idpg", "ipt", "dp", "lpt", "idspam"}
    assert all(ours | {"bare", "lora-r16"} <= set(group["methods"]) for group in found.values())
    assert all(set(serving_cost.ONE_TENANT) >= set(group["refused"]) for group in found.values())
    assert all(
        group["methods"]["bare"][what]["ratio"] == 1 for group in found.values() for what in group["methods"]["bare"]
    )
    # 4 layers: two projections of 64 by 16, a pooling of 16 by 4, and 12 coefficients
    assert found["serving-1-8"]["sizes"]["iapt"] == {"adapter_bytes": 4 * 4 * (2 * 64 * 16 + 16 * 4 + 12), "slots": 4}
    (tmp_path / "training-16.json").unlink()
    again = subprocess.run(command, capture_output=True, text=True)
    assert (
        again.returncode == 0
        and "3 of 4 groups are there" in again.stdout
        and (tmp_path / "training-16.json").is_file()
    )
