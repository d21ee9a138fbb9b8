# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""The tables of Evidence, from the cells of a suite."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from quality.command import numbers
from quality.methods import CONTROLS, METHODS, OURS, SETTING_OF
from quality.statistics import paired_interval


NOTHING = "No results yet.\n"
# What the others are compared with: the first of these that was run. That of rank 8 has about as many parameters as IAPT.
LORA = ("lora-r8-qv", "lora-r16")


class Results:
    """The cells of one suite on one model, by (task, size, method, seed)."""

    def __init__(self, folder: Path):
        loaded = [json.loads(file.read_text()) for file in sorted(folder.glob("*/*.json"))]
        self.cells = {(r["task"], r["size"], r["method"], r["seed"]): r for r in loaded}
        self.score = loaded[0]["score"] if loaded else None
        self.methods = [name for name in METHODS if any(key[2] == name for key in self.cells)]
        self.tasks = list(dict.fromkeys(key[0] for key in self.cells))

    def of(self, task: str, size: str, method: str) -> list[dict]:
        return [self.cells[key] for key in sorted(self.cells) if key[:3] == (task, size, method)]

    def values(self, task: str, size: str, method: str, measure: str, prompts: str = "own") -> dict:
        """By part of the task and seed, the value of each test instance; `free text` is scored by what was written."""
        found: dict[str, dict[int, torch.Tensor]] = {}
        for cell in self.of(task, size, method):
            for part, by_prompt in cell["test"].items():
                values = by_prompt.get(prompts, {}).get(measure)
                if values is not None:
                    found.setdefault(part, {})[cell["seed"]] = torch.tensor(numbers(values), dtype=torch.float64)
        return found


def difference(
    results: Results, size: str, one: tuple, other: tuple, measure: str, tasks: list[str], only: str | None = None
):
    """
    Mean and interval of one minus other, each (method, prompts), over the tasks and seeds that both have; None without any.
    `only` is a part of a mixture.
    """
    trainings = []
    for task in tasks:
        left = results.values(task, size, one[0], measure, one[1])
        right = results.values(task, size, other[0], measure, other[1])
        parts = []
        for part in left if only is None else [only]:
            seeds = sorted(set(left.get(part, {})) & set(right.get(part, {})))
            if seeds:
                parts.append(torch.stack([left[part][s] - right[part][s] for s in seeds]))
        if parts:
            trainings.append(parts)
    return (paired_interval(trainings), sum(map(len, trainings))) if trainings else None


def shown(found, percent: bool = True) -> str:
    if found is None:
        return "-"
    (mean, low, high), count = found
    factor, digits = (100, 1) if percent else (1, 3)
    text = f"{factor * mean:+.{digits}f} [{factor * low:+.{digits}f}, {factor * high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def scores(results: Results, size: str, task_names: list[str], measure: str) -> str:
    """Mean over seeds of each method on each task, in percent, with what it took."""
    columns = [(task, part) for task in task_names for part in parts_of(results, size, task, measure)]
    rows = []
    for method in results.methods:
        cells = [cell for task in task_names for cell in results.of(task, size, method)]
        if not cells:
            continue
        row, means = [method], []
        for task, part in columns:
            by_seed = results.values(task, size, method, measure).get(part)
            if by_seed is None:
                row.append("-")
                continue
            seeds = [values.mean().item() * 100 for values in by_seed.values()]
            means.append(sum(seeds) / len(seeds))
            spread = f"±{torch.tensor(seeds).std().item():.1f}" if len(seeds) > 1 else ""
            row.append(f"{means[-1]:.1f}{spread}")
        row.append(f"{sum(means) / len(means):.1f}" if means and len(means) == len(columns) else "-")
        trained = [cell for cell in cells if "trainable" in cell]
        row.append(f"{trained[0]['trainable']:,}" if trained else "0")
        row.append(median(cell.get("train_cpu_seconds", cell["train_seconds"]) for cell in trained))
        row.append(median(cell["above_loaded_mb"] for cell in trained))
        rows.append(row)
    if not rows or not columns:
        return NOTHING
    return table(["method", *(part for _, part in columns), "mean", "parameters", "s", "MB"], rows)


def parts_of(results: Results, size: str, task: str, measure: str) -> list[str]:
    names = [list(results.values(task, size, method, measure)) for method in results.methods]
    return max(names, key=len, default=[])


def median(values) -> str:
    ordered = sorted(values)
    return f"{ordered[len(ordered) // 2]:.0f}" if ordered else "-"


def instance(results: Results, size: str, task_names: list[str], measure: str, percent: bool = True) -> str:
    """Own prompts against the constant control, and against prompts that are exchanged."""
    names = [name for name in OURS if name in results.methods]
    exchanged = ["shuffled", "mean", "none"]
    if any(
        "shuffled over tasks" in part
        for cell in results.cells.values()
        if cell["task"] in task_names
        for part in cell["test"].values()
    ):
        exchanged[2:2] = ["shuffled over tasks", "mean over tasks"]
    rows = []
    for name in names:
        own = (name, "own")
        control = difference(results, size, own, (CONTROLS[name], "own"), measure, task_names)
        others = [difference(results, size, own, (name, prompts), measure, task_names) for prompts in exchanged]
        if any((control, *others)):
            row = [name, *(shown(found, percent) for found in (control, *others))]
            rows.append([*row, spread(results, size, name, task_names)] if percent else row)
    header = ["method", "own - constant", *(f"own - {p}" for p in exchanged), *["spread"] * percent]
    return table(header, rows) if rows else NOTHING


HEADERS = {
    "scores": "mean score",
    "constant": "own - constant",
    "lora": "minus LoRA",
    "default": "minus the default",
}


def overview(settings: dict[str, tuple[Results, str, list[str]]], what: str, loss: bool = False) -> str:
    """
    One column for each setting, which is (results, size, tasks): with `"scores"` the mean score of each method, with `"constant"` own
    prompts minus the control's, with `"lora"` each method minus LoRA, with `"default"` minus the method that it is another setting of.
    """
    rows = []
    for name in METHODS:
        row = [_overview_cell(*setting, name, what, loss) for setting in settings.values()]
        if set(row) - {"-"}:
            rows.append([name, *row])
    return table([HEADERS[what], *settings], rows) if rows else NOTHING


def summary(settings: dict[str, tuple[Results, str, list[str]]]) -> str:
    """A row for each setting and method, but none for controls and for other settings of a method."""
    left_out = {*CONTROLS.values(), *SETTING_OF}
    rows = []
    for label, setting in settings.items():
        for name in (name for name in METHODS if name not in left_out):
            row = [_overview_cell(*setting, name, what, loss=False) for what in ("scores", "lora", "constant")]
            if row[0] != "-":
                rows.append([label, name, *row])
    return table(["setting", "method", "mean score", "minus LoRA", "minus its control"], rows) if rows else NOTHING


def _overview_cell(results: Results, size: str, tasks: list[str], name: str, what: str, loss: bool) -> str:
    measure = "loss" if loss else results.score
    columns = [(task, part) for task in tasks for part in parts_of(results, size, task, measure)]
    if what == "scores":
        found = [results.values(task, size, name, measure).get(part, {}) for task, part in columns]
        if not found or not all(found):
            return "-"
        means = [sum(values.mean().item() for values in by_seed.values()) / len(by_seed) for by_seed in found]
        mean, seeds = sum(means) / len(means), min(len(by_seed) for by_seed in found)
        return (f"{mean:.3f}" if loss else f"{100 * mean:.1f}") + f" ({seeds} seeds)" * (seeds > 1)
    there = [lora for lora in LORA if any(results.of(task, size, lora) for task in tasks)]
    other = {
        "constant": CONTROLS.get(name),
        "lora": there[0] if there else None,
        "default": SETTING_OF.get(name),
    }[what]
    if other is None or name in (other, "zero-shot"):
        return "-"
    found = difference(results, size, (name, "own"), (other, "own"), measure, tasks)
    partly = found and found[1] < len(columns)
    return shown(found, percent=not loss) + (f" ({found[1]} of {len(columns)} tasks)" if partly else "")


def spread(results: Results, size: str, method: str, task_names: list[str]) -> str:
    """The least and the most of all layers, tasks and seeds, in percent."""
    cells = [cell for task in task_names for cell in results.of(task, size, method)]
    shares = [100 * share for cell in cells for share in cell.get("spread", {}).values()]
    return f"{min(shares):.1f} to {max(shares):.1f}" if shares else "-"


def instance_by_task(results: Results, size: str, task_names: list[str], measure: str) -> str:
    columns = [(task, part) for task in task_names for part in parts_of(results, size, task, measure)]
    rows = []
    for name in OURS:
        sides = (name, "own"), (CONTROLS[name], "own")
        row = [shown(difference(results, size, *sides, measure, [task], part)) for task, part in columns]
        if set(row) != {"-"}:
            rows.append([name, *row])
    return table(["own - constant", *(part for _, part in columns)], rows) if rows else NOTHING


def against_lora(results: Results, size: str, task_names: list[str], measure: str) -> str:
    columns = [(task, part) for task in task_names for part in parts_of(results, size, task, measure)]
    there = [name for name in LORA if any(results.of(task, size, name) for task in task_names)]
    if not there:
        return NOTHING
    lora, rows = there[0], []
    for name in results.methods:
        sides = (name, "own"), (lora, "own")
        if name in (lora, "zero-shot") or not (over := difference(results, size, *sides, measure, task_names)):
            continue
        each = [difference(results, size, *sides, measure, [task], part) for task, part in columns]
        rows.append([name, *(shown(found) for found in (over, *each))])
    return table([f"minus {lora}", "all tasks", *(part for _, part in columns)], rows) if rows else NOTHING


def rates(results: Results) -> str:
    """Which learning rates each method tried, the best on dev first; of several tasks, each task's best."""
    rows = []
    for method in results.methods:
        first = [cell for key, cell in results.cells.items() if key[2] == method and key[3] == 0 and "tried" in cell]
        if not first:
            continue
        tried = sorted({t["rate"] for cell in first for t in cell["tried"]})
        won = sorted({cell["rate"] for cell in first})
        rows.append([method, *(", ".join(f"{rate:g}" for rate in each) for each in (won, tried))])
    return table(["method", "best rate on dev", "tried"], rows) if rows else NOTHING


def setups(results: Results) -> str:
    keys = ("model", "device", "threads", "torch", "transformers", "peft", "peft_instance_prompt", "revision")
    found = setup_lines(results.cells.values(), keys)
    shapes = sorted({(c["task"], c["steps"], c["batch_size"]) for c in results.cells.values() if c["steps"]})
    steps = sorted({f"{steps} steps of {size}" for _, steps, size in shapes})
    return f"{found}- {'; '.join(steps)}\n" if found else NOTHING


def setup_lines(results: Iterable[dict], keys: tuple[str, ...]) -> str:
    """A line for each different set-up, with the revisions that it was run at."""
    found: dict[str, set[str]] = {}
    for setup in (result["setup"] for result in results):
        line = ", ".join(f"{key} {setup.get(key)}" for key in keys if key != "revision")
        revision = str(setup.get("revision"))  # with a + where files were changed
        found.setdefault(line, set()).add(revision[:7] + "+" * revision.endswith("+"))
    return "".join(f"- {line}; revisions {', '.join(sorted(found[line]))}\n" for line in sorted(found))
