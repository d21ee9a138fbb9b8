# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""A cell: one task, one number of examples, one method, one seed; and the file with its result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from machine import setup
from torch.utils.data import DataLoader
from transformers import set_seed

from peft_instance_prompt import instance_report
from quality.methods import METHODS
from quality.tasks import Task, is_mixture, load
from quality.training import fit


EVAL_BATCH = 16


@dataclass(frozen=True)
class Cell:
    task: str
    size: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.size} {self.method} seed {self.seed}"

    def file(self, folder: Path) -> Path:
        return folder / f"{self.task}-{self.size}" / f"{self.method}-seed{self.seed}.json"


@dataclass(frozen=True)
class Plan:
    """What all cells of a run have in common.

    Attributes:
        suite: An `Encoder` or a `Causal`.
        steps, batch_size: Of training; a mixture has `mixture_steps`.
        rates: How many learning rates are tried.
        most: The most examples in dev and test, of each task.
        folder: Where the results are.
        likely: The learning rates of methods that want others on this suite's model than `METHODS` says.
    """

    suite: object
    steps: int
    mixture_steps: int
    batch_size: int
    rates: int
    most: tuple[int, int]
    folder: Path
    likely: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def steps_of(self, task: str) -> int:
        return self.mixture_steps if is_mixture(task) else self.steps


def run_cell(plan: Plan, cell: Cell) -> dict:
    """Compute a cell and write its file, whole or not at all."""
    suite, start = plan.suite, time.perf_counter()
    task = load(cell.task, cell.size, plan.most, suite.free_text)
    result = {
        "task": cell.task,
        "size": cell.size,
        "method": cell.method,
        "seed": cell.seed,
        "score": suite.score,
        "train_examples": sum(len(part.splits["train"]) for part in task.each()),
        "steps": plan.steps_of(cell.task),
        "batch_size": plan.batch_size,
    }
    if cell.method == "zero-shot":
        result["steps"] = 0
        result["test"] = {
            part.name: {"own": _texts(told(part, suite.zero_shot(part, part.splits["test"])))} for part in task.each()
        }
    else:
        result.update(_trained(plan, cell, task))
    result["seconds"] = round(time.perf_counter() - start, 2)
    result["setup"] = {"model": Path(suite.folder).name, **setup(suite.device)}
    file = cell.file(plan.folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, file)
    file.with_suffix(".tried").unlink(missing_ok=True)
    return result


def _trained(plan: Plan, cell: Cell, task: Task) -> dict:
    if cell.seed == 0:
        rates = plan.likely.get(cell.method, METHODS[cell.method].rates)[: plan.rates]
    else:
        first = Cell(cell.task, cell.size, cell.method, 0).file(plan.folder)
        rates = [json.loads(first.read_text())["rate"]]
    # A run that is broken off goes on from the rates that it has tried.
    notes = cell.file(plan.folder).with_suffix(".tried")
    tried = [json.loads(line) for line in notes.read_text().splitlines()] if notes.is_file() else []
    tried, kept = [note for note in tried if note["rate"] in rates], None
    for rate in [rate for rate in rates if rate not in {note["rate"] for note in tried}]:
        model, record = train(plan, cell, task, rate)
        dev = [summary(evaluate(plan.suite, model, part, "dev")) for part in task.each()]
        score = sum(values[plan.suite.score] for values in dev) / len(dev)
        loss = sum(values["loss"] for values in dev) / len(dev)
        tried.append({"rate": rate, "score": round(score, 4), "loss": round(loss, 4)})
        tried[-1]["train_seconds"] = round(record["seconds"], 2)
        tried[-1]["last_losses"] = round(sum(record["losses"][-20:]) / len(record["losses"][-20:]), 4)
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text("".join(json.dumps(note) + "\n" for note in tried))
        if best_of(tried)["rate"] == rate:
            kept = model, record
        del model
    rate = best_of(tried)["rate"]
    model, record = kept or train(plan, cell, task, rate)
    start = time.perf_counter()
    exchanged = METHODS[cell.method].exchanged
    test, spread = {}, {}
    for part in task.each():
        test[part.name], spread = tested(plan.suite, model, part, exchanged)
    if len(task.each()) > 1 and exchanged:
        spread = add_prompts_of_other_tasks(plan.suite, model, task, test)
    return {
        "rate": rate,
        "tried": tried,
        "trainable": record["trainable"],
        "head": record["head"],
        "train_seconds": round(record["seconds"], 2),
        "train_cpu_seconds": round(record["cpu_seconds"], 2),
        "test_seconds": round(time.perf_counter() - start, 2),
        "above_loaded_mb": round(record["above_loaded_mb"], 1),
        # how far the generated vectors of the test's instances differ, by layer: of a mixture, over all tasks
        **({"spread": {depth: round(share, 4) for depth, share in spread.items()}} if spread else {}),
        "test": test,
    }


def best_of(tried: list[dict]) -> dict:
    """Of learning rates with their scores and losses on dev, the one with the least loss, which tells more than a share of right answers."""
    return min(tried, key=lambda note: note["loss"])


def train(plan: Plan, cell: Cell, task: Task, rate: float) -> tuple[torch.nn.Module, dict]:
    """A model that was trained at one learning rate, and what training it took."""
    suite, method, steps = plan.suite, METHODS[cell.method], plan.steps_of(cell.task)
    set_seed(cell.seed)
    base = suite.base(task)
    set_seed(cell.seed)  # the adapter's weights do not depend on how many numbers the model has drawn
    model = method.attach(base, suite.setting(steps)).to(suite.device)
    batches = (
        {key: value.to(suite.device) for key, value in suite.collate(task, rows).items()}
        for rows in task.batches(steps, plan.batch_size, cell.seed)
    )
    return model, fit(
        model, batches, lambda m, batch: suite.loss(m, batch, method.ours), steps, rate, suite.device, method.factors
    )


def loader(suite: object, task: Task, examples: list[dict]) -> DataLoader:
    return DataLoader(examples, batch_size=EVAL_BATCH, collate_fn=lambda rows: suite.collate(task, rows))


@torch.no_grad()
def evaluate(suite: object, model: torch.nn.Module, task: Task, split: str) -> dict[str, torch.Tensor]:
    """Each example's loss and scores, with its own prompt."""
    metric, losses, values = suite.metric(task), [], []
    for batch in loader(suite, task, task.splits[split]):
        batch = {key: value.to(suite.device) for key, value in batch.items()}
        logits = model(**batch).logits
        losses.append(suite.losses(logits, batch).cpu())
        values.append(metric(logits, batch).cpu())
    return {"loss": torch.cat(losses), **suite.unpack(torch.cat(values))}


def summary(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.double().mean().item() for name, value in values.items()}


def tested(
    suite: object, model: torch.nn.Module, task: Task, exchanged: bool
) -> tuple[dict[str, dict[str, str]], dict[int, float]]:
    """
    The test split, by prompt: each instance's own, and where prompts differ by instance another's, the mean, and none. Then
    also how far they differ, by layer.
    """
    examples = task.splits["test"]
    if exchanged:
        found, spread = reported(suite, model, task, examples)
    else:
        found, spread = {"own": evaluate(suite, model, task, "test")}, {}
    found["own"].update(suite.generate(model, task, examples) or {})
    return {prompts: _texts(told(task, values)) for prompts, values in found.items()}, spread


def told(task: Task, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Free text is no choice among labels."""
    return {name: value for name, value in values.items() if task.labels or name != "accuracy"}


def reported(
    suite: object, model: torch.nn.Module, task: Task, examples: list[dict]
) -> tuple[dict[str, dict], dict[int, float]]:
    """Losses and scores by prompt, and the spread of the prompts by layer."""
    metric = suite.metric(task)
    report = instance_report(model, loader(suite, task, examples), metric=metric, resamples=1)
    packed, losses = report.values[metric.__name__], report.values["loss"]
    found = {prompts: {"loss": losses[prompts], **suite.unpack(packed[prompts])} for prompts in packed}
    return found, report.spread


def add_prompts_of_other_tasks(suite: object, model: torch.nn.Module, task: Task, test: dict) -> dict[int, float]:
    """
    Of a mixture: the prompt of an instance of any task, and the mean over all tasks. Rows of all tasks stand in each batch.
    Returns how far the prompts of all tasks differ, by layer.

    Without the labels of one task there is no `accuracy` among them.
    """
    mixed = sorted(
        (i / len(part.splits["test"]), part.name, i) for part in task.each() for i in range(len(part.splits["test"]))
    )
    by_name = {part.name: part for part in task.each()}
    found, spread = reported(suite, model, task, [by_name[name].splits["test"][i] for _, name, i in mixed])
    for name in by_name:
        rows = sorted((i, row) for row, (_, other, i) in enumerate(mixed) if other == name)
        pick = torch.tensor([row for _, row in rows])
        for prompts in ("shuffled", "mean"):
            values = {key: found[prompts][key][pick] for key in ("loss", suite.score)}
            test[name][f"{prompts} over tasks"] = _texts(values)
    return spread


def _texts(values: dict[str, torch.Tensor]) -> dict[str, str]:
    """One number per instance, as a text that takes one line of the file: zeros and ones, or numbers with spaces."""
    whole = {name: bool(((value == 0) | (value == 1)).all()) for name, value in values.items()}
    return {
        name: "".join(str(int(v)) for v in value) if whole[name] else " ".join(f"{v:.3f}" for v in value)
        for name, value in values.items()
    }
