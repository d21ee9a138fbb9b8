# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of the page Cost, from the groups that serving_cost.py has measured, and of vLLM's page, from what serving.py has."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from quality.tables import setup_lines, table
from serving import compare
from serving_models import METHODS


ENGINES = {"preft": "PreFT", "prompt": "IAPT", "lora": "vLLM's own LoRA"}  # by their names in serving.py
TIMES = {
    "all, CPU": "CPU time",
    "all": "wall time",
    "first, 95 %": "95th percentile of the first token",
}
SETUP = ("model", "dtype", "device", "threads", "torch", "transformers", "peft", "revision")


def blocks(folder: Path) -> dict[str, str]:
    """By name, `serving_cost.MODEL.WHAT`, and `serving_cost.setup` for all models. Without results there are none."""
    made, measured = {}, []
    for path in sorted(p for p in folder.glob("serving_cost/*") if p.is_dir()):
        groups = [json.loads(file.read_text()) for file in sorted(path.glob("*.json"))]
        groups.sort(key=lambda g: (g["tokens"], g.get("tenants", 0), g.get("checkpointing", False)))
        serving = {
            f"{g['tokens']} tokens, {g['tenants']} tenant{'s' * (g['tenants'] > 1)}": g
            for g in groups
            if g["kind"] == "serving"
        }
        training = {
            f"{g['tokens']} tokens{', checkpointing' * g['checkpointing']}": g
            for g in groups
            if g["kind"] == "training"
        }
        for kind, measures in ((serving, ("first_token", "per_token")), (training, ("step", "memory_mb"))):
            for measure in measures if kind else ():
                made[f"serving_cost.{path.name}.{measure}"] = ratios(kind, measure)
        if serving:
            made[f"serving_cost.{path.name}.methods"] = methods(serving)
        made[f"serving_cost.{path.name}.setup"] = setup_lines(groups, SETUP)
        measured += groups
    if measured:
        made["serving_cost.setup"] = setup_lines(measured, SETUP)
    for path in sorted(folder.glob("serving/*.json")):
        found = json.loads(path.read_text())
        made[f"serving.{path.stem}.engines"] = engines(found)
        made[f"serving.{path.stem}.adding"] = adding(found["adding"])
        made[f"serving.{path.stem}.setup"] = setup_lines([found], (*SETUP, "vllm", "compiled"))
    return made


def engines(found: dict) -> str:
    """The ratios of engines of vLLM to the bare one, and their intervals."""
    rows = []
    for name in found["rounds"][0]:
        against = compare([measured[name] for measured in found["rounds"]])
        for what, label in TIMES.items():
            if f"{what}, bare" in against:
                each = [against[f"{what}, {kind}"] for kind in ENGINES]
                cells = [f"{one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" for one in each]
                rows.append([f"{name}, {label}", f"{against[f'{what}, bare']['seconds']:.2f} s", *cells])
    return table([f"medians of {len(found['rounds'])} rounds", "bare", *ENGINES.values()], rows)


def adding(found: dict[str, dict[str, list[float]]]) -> str:
    """What it takes to add and remove an adapter."""
    rows = []
    for count, taken in found.items():
        each = [f"{statistics.median(ms):.1f} ({min(ms):.1f}-{max(ms):.1f})" for ms in taken.values()]
        rows.append([f"{int(count):,}", *each])
    return table(["adapters there", "ms to add one (least-most)", "ms to remove one"], rows)


def ratios(groups: dict[str, dict], measure: str) -> str:
    """Each method's median ratio to the bare model, least and most of the rounds behind it; the bare model in its own unit."""
    rows = []
    for name in METHODS:
        row = [name]
        for group in groups.values():
            found = group["methods"].get(name, {}).get(measure)
            if found is None:
                row.append("refused" if name in group["refused"] else "-")
            elif name == "bare":
                row.append(f"{found['median']:,.0f} {'MB' if measure == 'memory_mb' else 'ms'}")
            else:
                row.append(f"{found['ratio']:.2f} ({min(found['ratios']):.2f}-{max(found['ratios']):.2f})")
        if set(row[1:]) != {"-"}:
            rows.append(row)
    return table(["method", *groups], rows)


def methods(groups: dict[str, dict]) -> str:
    """What a tenant adds: its adapter, its slots in the cache of a row, and time: the least and the most ratio of all groups."""
    found = {name: size for group in groups.values() for name, size in group["sizes"].items() if name != "bare"}
    rows = []
    for name in (name for name in METHODS if name in found):
        row = [name, f"{found[name]['adapter_bytes'] / 1e6:.2f} MB", str(found[name]["slots"])]
        for measure in ("first_token", "per_token"):
            measured = [group["methods"].get(name, {}).get(measure) for group in groups.values()]
            ratios = [value["ratio"] for value in measured if value]
            row.append("-".join(dict.fromkeys(f"{end(ratios):.2f}" for end in (min, max))) if ratios else "-")
        rows.append(row)
    return table(["method", "adapter", "slots", "first token", "each token after it"], rows)
