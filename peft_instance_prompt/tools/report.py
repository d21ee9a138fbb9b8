# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Did the instance matter? The same data with each instance's own prompt, a different instance's, the mean of all, and none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import default_data_collator

from ..engine.intercept import Generated, intercept
from ..engine.request import note
from ..generator import INPUT, PromptGenerator
from . import report_html
from .inspection import (
    Reading,
    active_generator,
    evaluating,
    generated_part,
    on_device_of,
    readings,
    record,
    recording,
    with_part,
)


PROMPTS = ("own", "shuffled", "mean", "none")


@dataclass
class InstanceReport:
    """The result of [`instance_report`]; `print` it for a table, or write it as a page with `to_html`.

    Attributes:
        values (`dict[str, dict[str, torch.Tensor]]`): By measure (`"loss"`, `"accuracy"` or the metric's name) and prompt
            (`"own"`, `"shuffled"`, `"mean"`, `"none"`): a tensor (instances,).
        level (`float`): The share of resamples that an interval covers.
        resamples (`int`): The number of bootstrap resamples.
        seed (`int`): The seed of the resampling.
        subject (`str`): The adapter in words, e.g. "IAPT, 4 prompt vectors at each of 30 layers".
        readings (`list[Reading]`): Those of the first instances, if a tokenizer was given.
        spread (`dict[int, float]`): By depth, the distance of the generated parts from their mean, over their size (both are
            root mean squares over instances): 0 if all instances have the same generated part, 1 if its mean is 0.
    """

    values: dict[str, dict[str, torch.Tensor]]
    level: float
    resamples: int
    seed: int
    subject: str = ""
    readings: list[Reading] = field(default_factory=list)
    spread: dict[int, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values["loss"]["own"])

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """By measure and by prompt, or difference such as `"own - none"`: the mean and the `low` and `high` end of its interval."""
        return {measure: self._bootstrap(by_prompt) for measure, by_prompt in self.values.items()}

    def _bootstrap(self, by_prompt: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
        pairs = {f"own - {other}": by_prompt["own"] - by_prompt[other] for other in PROMPTS[1:]}
        series = {**by_prompt, **pairs}
        table = torch.stack(list(series.values()), dim=1)  # (n, 7)
        generator = torch.Generator().manual_seed(self.seed)
        # All columns of a resample are of the same instances, so the differences are paired.
        picks = (torch.randint(len(table), (len(table),), generator=generator) for _ in range(self.resamples))
        means = torch.stack([table[pick].mean(dim=0) for pick in picks])  # (resamples, 7)
        tail = (1 - self.level) / 2
        low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=means.dtype), dim=0)  # (7,) each
        cells = torch.stack([table.mean(dim=0), low, high], dim=1)  # (7, 3)
        return {name: dict(zip(("mean", "low", "high"), cell)) for name, cell in zip(series, cells.tolist())}

    def to_json(self) -> str:
        """The setting, the summary, the spread and the values of all instances, as JSON."""
        setting = {"instances": len(self), "level": self.level, "resamples": self.resamples, "seed": self.seed}
        values = {m: {p: value.tolist() for p, value in by_prompt.items()} for m, by_prompt in self.values.items()}
        return json.dumps({**setting, "summary": self.summary(), "spread": self.spread, "values": values}, indent=2)

    def spread_in_words(self) -> str:
        """The spread, in a sentence."""
        shares = sorted(self.spread.values())
        span = f"{shares[0]:.1%}" if shares[0] == shares[-1] else f"{shares[0]:.1%} to {shares[-1]:.1%}, by layer,"
        return f"The generated vectors differ between instances by {span} of their size."

    def to_html(self, path: str | os.PathLike | None = None) -> str:
        """The report as an HTML page that needs no other file: findings, charts, table, and each token's share in the first texts.

        Args:
            path (`str`, *optional*): A file to write the page to.

        Returns:
            `str`: The page.
        """
        page = report_html.make_page(self)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def _repr_html_(self) -> str:
        return report_html.make_frame(self)

    def __str__(self) -> str:
        summary = self.summary()
        lines = [f"{len(self)} instances, {self.level:.0%} intervals of {self.resamples} bootstrap resamples"]
        lines.append(f"{'prompt':<16}" + "".join(f"{measure:<28}" for measure in summary).rstrip())
        for name in next(iter(summary.values())):
            cells = (report_html.as_text(by_name[name]) for by_name in summary.values())
            lines.append(f"{name:<16}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
        lines += [self.spread_in_words()] if self.spread else []
        return "\n".join(lines)


def instance_report(
    model: nn.Module,
    data: Any,
    batch_size: int = 8,
    collate_fn: Callable | None = None,
    metric: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    tokenizer: Any = None,
    texts: int = 4,
) -> InstanceReport:
    """Measure whether prompts that are generated from the instance do more than prompts that are not.

    The model runs on the same data with four kinds of prompts:
    - `own`: each instance's own;
    - `shuffled`: what was generated for a different instance of the same batch, at every depth and by the method's `encode`, which
      decides places and lengths. The start of the vectors (see [`PromptGenerator.forward`]) stays the row's own;
    - `mean`: the mean of what was generated for all instances, the same for each;
    - `none`: no prompt. Whatever else was trained, such as a classification head, stays.

    If `own` is no better than `shuffled` and `mean`, the adapter has learned a prompt for the task and not for the instance. The
    report's `spread` says whether the prompts differ at all.

    Args:
        model (`nn.Module`): The model with an active adapter, e.g. a [`~peft.PeftModel`].
        data (`DataLoader` or `Dataset`): Batches, or examples, with `labels`. In a causal model these are -100 on the instruction,
            unless the config or the batch says otherwise where it ends.
        batch_size (`int`): For a data set. Defaults to 8; at least 2.
        collate_fn (`Callable`, *optional*): For a data set. Defaults to transformers' `default_data_collator`.
        metric (`Callable`, *optional*): From logits and batch to a number for each row. Defaults to accuracy: for classes, 1 if
            the likeliest is the label; for tokens, the share of a row's labelled tokens that are the likeliest; for regression,
            none.
        level (`float`): The share of bootstrap resamples that an interval covers. Defaults to 0.95.
        resamples (`int`): The number of bootstrap resamples over instances. Defaults to 1000.
        seed (`int`): The seed of the exchange of prompts and of the resampling. Defaults to 0.
        tokenizer (*optional*): Lets `to_html` show what the prompt vectors read of the first `texts` texts.
        texts (`int`): Defaults to 4.

    Returns:
        [`InstanceReport`]: Means over instances (an instance's loss is its labelled tokens' mean), and intervals.

    Raises:
        ValueError: There is no active adapter, no pair of instances, no label, or an argument is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level}.")
    if resamples < 1:
        raise ValueError(f"`resamples` must be at least 1, got {resamples}.")
    generator = active_generator(model)[1]
    if not isinstance(data, DataLoader):
        data = DataLoader(data, batch_size=batch_size, collate_fn=collate_fn or default_data_collator)
    batches = list(data)  # on the host, and in one order for all passes
    if len(batches) < 2 and (not batches or count_rows(batches[0]) < 2):
        raise ValueError("At least two instances are needed for one to get the prompt of another.")
    with evaluating(model):
        values, spread = compare_prompts(model, batches, metric, torch.Generator().manual_seed(seed))
        every = (reading for batch in batches for reading in readings(model, batch, tokenizer))
        shown = [] if tokenizer is None else list(islice(every, texts))
    return InstanceReport(values, level, resamples, seed, describe(generator), shown, spread)


def compare_prompts(
    model: nn.Module, batches: list[Mapping[str, Any]], metric: Callable | None, picks: torch.Generator
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[int, float]]:
    """`values` and `spread` of an [`InstanceReport`]: one pass over the batches with each kind of prompt.

    A batch is on the model's device only while it runs. `picks` decides who lends whom its prompt.
    """
    layer, generator = active_generator(model)
    found: dict[str, dict[str, list[torch.Tensor]]] = {}

    def measure(prompts: str, batch: dict[str, Any]) -> None:
        for name, values in evaluate(model, batch, layer.info.causal_lm, metric).items():
            found.setdefault(name, {}).setdefault(prompts, []).append(values.double().cpu())

    total: dict[int | None, torch.Tensor] = {}
    spread = Spread(generator)
    for number, batch in enumerate(batches):
        batch, rows = on_device_of(model, batch), count_rows(batch)
        with recording() as made:
            measure("own", batch)
        own = exchangeable(generator, made)
        spread.add(made)
        for depth, values in own.items():
            total[depth] = total.get(depth, 0) + values.double().sum(dim=0)
        order = torch.randperm(rows, generator=picks)
        donors = torch.empty_like(order).index_copy_(0, order, order.roll(1))  # one cycle: no row gets its own
        lenders = own
        if rows == 1:  # the first row of the batch before it lends its prompt
            lenders, donors = exchangeable(generator, record(model, batches[number - 1])), torch.tensor([0])
        shuffled = {depth: values[donors.to(values.device)] for depth, values in lenders.items()}
        with intercept(partial(exchanged, generator, shuffled)):
            measure("shuffled", batch)
        with note(adapters={layer: ([], {})}):  # not by `adapter_names`, which name trained heads, too
            measure("none", batch)
    mean = {depth: values / spread.count for depth, values in total.items()}  # (l, d) each, or (k)

    with intercept(partial(exchanged, generator, mean)):
        for batch in batches:
            measure("mean", on_device_of(model, batch))
    by_measure = {name: {prompts: torch.cat(lists[prompts]) for prompts in PROMPTS} for name, lists in found.items()}
    return by_measure, spread.shares()


class Spread:
    """Sums over instances, from which `spread` of an [`InstanceReport`] is computed."""

    def __init__(self, generator: PromptGenerator):
        self.generator = generator
        self.sums: dict[int, torch.Tensor] = {}
        self.squares: dict[int, float] = {}
        self.count = 0

    def add(self, made: Mapping[int | None, Generated]) -> None:
        for depth in self.generator.depths:
            parts = generated_part(self.generator, made[depth]).double().cpu()  # (B, l, d)
            self.sums[depth] = self.sums.get(depth, 0) + parts.sum(dim=0)  # (l, d)
            self.squares[depth] = self.squares.get(depth, 0.0) + float(parts.square().sum())
        self.count += len(parts)

    def shares(self) -> dict[int, float]:
        found = {}
        for depth, total in self.sums.items():
            size = self.squares[depth] / self.count
            common = float((total / self.count).square().sum())
            found[depth] = max(0.0, 1 - common / size) ** 0.5 if size else 0.0
        return found


def describe(generator: PromptGenerator) -> str:
    """An adapter in words, e.g. "IAPT, 4 prompt vectors at each of 30 layers"."""
    depths = generator.depths
    places = f"each of {len(depths)} layers" if len(depths) > 1 else f"layer {depths[0]}"
    places = "the input" if depths == (INPUT,) else places
    return f"{generator.config.peft_type.value}, {generator.num_slots} prompt vectors at {places}"


def exchangeable(generator: PromptGenerator, made: Mapping[int | None, Generated]) -> dict[int | None, torch.Tensor]:
    """By depth what instances can exchange: the generated parts of their vectors, and under None the output of `encode`."""
    found = {depth: generated_part(generator, m) for depth, m in made.items() if depth is not None}
    # An output with a dimension over tokens, as IPT's, is as long as the batch's longest row. What is made from it is exchanged anyway.
    if None in made and made[None].values.dim() == 2:
        found[None] = made[None].values
    return found


def exchanged(
    generator: PromptGenerator, others: Mapping[int | None, torch.Tensor], made: Generated
) -> torch.Tensor | None:
    """What was generated for others, in place of the rows' own; None, for no change, if it is not exchanged. The start, which may be a
    state of the row itself, stays the row's."""
    if made.depth not in others:
        return None
    if made.depth is None:
        return others[None].to(made.values).expand_as(made.values)
    return with_part(generator, made, others[made.depth])


def count_rows(batch: Mapping[str, Any]) -> int:
    """The number of rows. Raises a ValueError if the batch has no labels."""
    if batch.get("labels") is None:
        raise ValueError(f"Each batch must have `labels`, got {sorted(batch)}.")
    return len(batch["labels"])


def evaluate(
    model: nn.Module, batch: Mapping[str, Any], causal_lm: bool, metric: Callable | None = None
) -> dict[str, torch.Tensor]:
    """Loss and accuracy, or `metric`, of each row: tensors of shape (B,)."""
    logits, labels = model(**batch).logits.float(), batch["labels"]
    given = None if metric is None else torch.as_tensor(metric(logits, batch))
    if logits.dim() == 2 and (logits.shape[1] == 1 or labels.is_floating_point()):
        kind = F.mse_loss if logits.shape[1] == 1 else F.binary_cross_entropy_with_logits
        loss, accuracy = kind(logits, labels.view_as(logits).float(), reduction="none").mean(dim=1), None  # (B,)
    else:
        if logits.dim() == 2:
            logits, labels = logits[:, None], labels[:, None]  # (B, 1, C), (B, 1)
        elif causal_lm:
            logits, labels = logits[:, :-1], labels[:, 1:]  # (B, S - 1, V), (B, S - 1)
        asked = labels != -100
        if not asked.any(dim=1).all():
            empty = (~asked.any(dim=1)).nonzero().flatten().tolist()
            raise ValueError(f"Row(s) {empty} of a batch have no label that is not -100.")
        count = asked.sum(dim=1)  # (B,)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")  # (B, S)
        right = (logits.argmax(dim=-1) == labels) & asked  # (B, S)
        loss, accuracy = losses.sum(dim=1) / count, right.sum(dim=1) / count  # (B,), (B,)
    if metric is not None:
        return {"loss": loss, getattr(metric, "__name__", "metric"): given}
    return {"loss": loss} if accuracy is None else {"loss": loss, "accuracy": accuracy}
