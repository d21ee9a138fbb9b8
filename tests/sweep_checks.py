# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the sweep asks of a model with an adapter, and of the bare model. A check raises an AssertionError if something is wrong.

A check compares a model with itself: a row with the row alone, a cache with none, training with generation. So what is wrong with
the bare model, too, is told apart from what an adapter makes wrong.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from conformance_models import must
from methods import METHODS
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from tiny import adapted


LM, PAIR, CLASSIFIER, MASKED = "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", None
PROMPT, CHANGED = 5, 7  # how many tokens the instruction has, and the first token that the leak check changes
NEW = 3
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1}
GREEDY.update(output_logits=True, return_dict_in_generate=True)
TOLERANCE = 2e-3
TEXT = (10, 96)  # token ids of texts: below are special ones, above the marks of images


@dataclasses.dataclass
class Subject:
    """A bare model and how it is called.

    Attributes:
        bare (`nn.Module`): The model in eval mode.
        kind (`str`, *optional*): PEFT's task type: a causal LM, an encoder-decoder model, a classifier, or None.
        source (`dict`): What a pair's encoder reads, if that is not text: two rows.
        extra (`Callable`): Further arguments of a forward, from `input_ids`.
    """

    bare: torch.nn.Module
    kind: str | None
    source: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    extra: Callable[[torch.Tensor], dict[str, torch.Tensor]] = lambda ids: {}

    def with_method(self, method: str) -> PeftModel:
        torch.manual_seed(0)
        base = copy.deepcopy(self.bare)
        task = (
            None if self.source else self.kind
        )  # PEFT's model for SEQ_2_SEQ_LM passes `input_ids` on, whatever there is
        if method == "lora":
            made: PeftConfig = LoraConfig(task_type=task, r=4, target_modules=lora_targets(base))
        else:
            made = METHODS[method](task_type=task)
        return adapted(base, made)


def lora_targets(base: torch.nn.Module) -> list[str] | str:
    """PEFT's own choice, else the queries and values, else all linear layers."""
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(base.config.model_type, [])
    ends = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    usual = ("q_proj", "v_proj", "query", "value", "q", "v", "Wqkv", "c_attn", "query_key_value", "qkv_proj")
    return [n for n in known if n in ends] or [n for n in usual if n in ends] or "all-linear"


def ids_of(*lengths: int, side: str, seed: int = 0, pad: int = 0) -> dict[str, torch.Tensor]:
    """Random rows of these lengths, padded on one side, with their mask; a row depends on its place only."""
    ids = torch.full((len(lengths), max(lengths)), pad)  # (B, S)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        columns = slice(ids.shape[1] - n, None) if side == "left" else slice(0, n)
        ids[row, columns] = torch.randint(*TEXT, (n,), generator=generator)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask}


def ended(inputs: dict[str, torch.Tensor], end: int | None) -> dict[str, torch.Tensor]:
    """Rows whose last token is the end token, which some classifiers look for."""
    if not isinstance(end, int):
        return inputs
    columns = torch.arange(inputs["input_ids"].shape[1])
    last = (inputs["attention_mask"] * columns).argmax(dim=1)  # (B,)
    return {**inputs, "input_ids": inputs["input_ids"].scatter(1, last[:, None], end)}


def row(inputs: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    """A row alone, without its padding."""
    real = inputs["attention_mask"][n].bool()
    return {name: value[n : n + 1, real] for name, value in inputs.items()}


def near(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return off(actual, expected) <= TOLERANCE


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in units of the largest number, or of 1."""
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def same(actual: torch.Tensor, expected: torch.Tensor, complaint: str) -> None:
    must(near(actual, expected), f"{complaint}: off by {off(actual, expected):.2g}")


class Checks:
    """The checks of one model. What two of them need is run once.

    Args:
        subject (`Subject`): The bare model.
        model (`nn.Module`): The model with an adapter, or the bare model again.
    """

    def __init__(self, subject: Subject, model: torch.nn.Module):
        self.s, self.model, self.kept = subject, model, {}

    @property
    def is_adapted(self) -> bool:
        return isinstance(self.model, PeftModel)

    def ids_of(self, *lengths: int, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Some models find padding by its id."""
        return ids_of(*lengths, pad=self.pad, **kwargs)

    @property
    def pad(self) -> int:
        return self.s.bare.config.get_text_config().pad_token_id or 0

    @property
    def end(self) -> int | None:
        return getattr(self.s.bare.config, "eos_token_id", None)

    def of(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The checks that this kind of model has, by name."""
        if self.is_adapted:
            yield (
                "saved",
                self.saved,
            )  # first: training moves what some base models count, the norms of a batch for one
        yield "rows", self.rows
        if self.s.kind in (LM, PAIR):
            yield "cache", self.cache
            yield "leak", self.leak
            yield "prompt", self.prompt
        if self.is_adapted:
            yield "gradient", self.gradient

    # ------------------------------------------------------------------------------------------------------- passes

    def forward(self, inputs: dict[str, torch.Tensor], rows: slice = slice(None), **kwargs: Any) -> torch.Tensor:
        source = {name: value[rows] for name, value in self.s.source.items()}
        if source:
            inputs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        extra = self.s.extra(inputs["input_ids"]) if "input_ids" in inputs else {}
        return self.model(**inputs, **source, **extra, **kwargs)

    def steps(self, side: str = "left", alone: int | None = None, lengths=(9, 6), **kwargs: Any) -> torch.Tensor:
        """The logits (B, steps, V) that `generate` reads, up to the first step at which two runs may differ in text."""
        key = (side, alone, lengths, *kwargs.items())
        if key not in self.kept:
            inputs, source = self.ids_of(*lengths, side=side), self.s.source
            if alone is not None:
                inputs = row(inputs, alone)
                source = {name: value[alone : alone + 1] for name, value in source.items()}
            inputs = source or {**inputs, **self.s.extra(inputs["input_ids"])}
            with torch.no_grad():
                out = self.model.eval().generate(**inputs, **{**GREEDY, "pad_token_id": self.pad}, **kwargs)
            self.kept[key] = torch.stack(out.logits, dim=1).float()  # (B, steps, V)
        return self.kept[key]

    # ------------------------------------------------------------------------------------------------------- checks

    @torch.no_grad()
    def rows(self) -> None:
        """(a) A padded row = the row alone."""
        self.model.eval()
        if self.s.kind == PAIR:
            for side in ("right", "left") if not self.s.source else ("right",):
                same_steps(self.steps(side)[1], self.steps(side, alone=1)[0], f"rows, padded {side}, generate")
            return
        if self.s.kind == LM:
            same_steps(self.steps()[1], self.steps(alone=1)[0], "rows, padded left, generate")
        # A decoder as a classifier finds the last token of a left-padded row, too.
        for side in ("right",) if self.s.kind == LM else ("right", "left"):
            inputs = self.ids_of(9, 6, side=side)
            if self.s.kind == CLASSIFIER:
                inputs = ended(inputs, self.end)
            out = self.forward(inputs).logits[1]
            real = inputs["attention_mask"][1].bool()
            out = out if self.s.kind == CLASSIFIER else out[-9:][real]
            expected = self.forward(row(inputs, 1)).logits[0]
            expected = expected if self.s.kind == CLASSIFIER else expected[-6:]
            same(out, expected, f"rows, padded {side}, forward")

    def cache(self) -> None:
        """(b) With a cache = without."""
        same_steps(self.steps(), self.steps(use_cache=False), "cache")

    def labelled(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """A batch for training: the tokens from `CHANGED` on depend on the seed."""
        if self.s.kind == PAIR:
            target = torch.cat(
                [
                    self.ids_of(5, 5, side="right")["input_ids"],
                    self.ids_of(4, 4, side="right", seed=1 + seed)["input_ids"],
                ],
                1,
            )
            return {**self.ids_of(9, 6, side="right"), "labels": target}  # (B, 9)
        inputs = self.ids_of(9, 8, side="right")
        if self.s.kind == LM:
            new = self.ids_of(9, 8, side="right", seed=seed)["input_ids"]
            late = torch.arange(9) >= CHANGED
            inputs["input_ids"] = torch.where(late, new, inputs["input_ids"])  # (B, S)
            unlabelled = (torch.arange(9) < PROMPT) | (inputs["attention_mask"] == 0)  # (B, S)
            inputs["labels"] = inputs["input_ids"].masked_fill(unlabelled, -100)  # (B, S)
        elif self.s.kind == CLASSIFIER:
            inputs = {**ended(inputs, self.end), "labels": torch.tensor([0, 1])}
        else:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # (B, S)
        return inputs

    @torch.no_grad()
    def leak(self) -> None:
        """(c) Logits do not depend on later tokens. Labels of a pair stand one place later among its inputs."""
        early = slice(0, 6 if self.s.kind == PAIR else CHANGED)
        for training in (False, True):
            self.model.train(training)
            one, two = (self.forward(self.labelled(seed)).logits[:, -9:] for seed in (0, 7))
            self.model.eval()
            must(not near(one, two), "leak: the changed tokens change nothing")
            same(one[:, early], two[:, early], f"leak in {'training' if training else 'evaluation'}")

    @torch.no_grad()
    def prompt(self) -> None:
        """(c) The prompt in training = the prompt in generation."""
        if self.s.kind == PAIR:
            expected, at = self.steps("right")[:, 0], 0
        else:
            expected, at = self.steps("right", lengths=(PROMPT, PROMPT))[:, 0], PROMPT - 1
        for training in (False, True):
            self.model.train(training)
            out = self.forward(self.labelled()).logits[:, -9:].float()
            self.model.eval()
            where = "training" if training else "evaluation"
            same(out[:, at], expected, f"prompt in {where} is not that of generation")

    def gradient(self) -> None:
        """(d) A gradient reaches every weight of the adapter, and the adapter has an effect."""
        out = self.forward(self.labelled())
        self.model.train().zero_grad()
        self.forward(self.labelled()).loss.backward()
        self.model.eval()
        weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        without = [
            n
            for n, p in weights.items()
            if p.grad is None or not bool(p.grad.isfinite().all()) or not bool(p.grad.any())
        ]
        # LoRA stands where PEFT puts it, in layers too that the model does not run: unused experts, the other half of a pair.
        enough = len(without) < len(weights) if any("lora_" in n for n in weights) else not without
        must(bool(weights) and enough, f"gradient: {len(without)} of {len(weights)} weights get none, {without[:2]}")
        with torch.no_grad(), self.model.disable_adapter():
            plain = self.forward(self.labelled())
        must(self.s.kind == CLASSIFIER or not near(plain.logits, out.logits), "gradient: the adapter has no effect")

    @torch.no_grad()
    def saved(self) -> None:
        """(e) Saved and loaded into a fresh base model = before."""
        before = self.forward(self.labelled()).logits
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            twin = PeftModel.from_pretrained(copy.deepcopy(self.s.bare), folder).eval()
        same(Checks(self.s, twin).forward(self.labelled()).logits, before, "saved")


def same_steps(actual: torch.Tensor, expected: torch.Tensor, complaint: str) -> None:
    """Equal logits (..., steps, V), as far as the same text has been generated."""
    must(actual.shape == expected.shape, f"{complaint}: the shapes differ")
    for step in range(actual.shape[-2]):
        one, two = actual[..., step, :], expected[..., step, :]
        same(one, two, f"{complaint}, step {step}")
        if not torch.equal(one.argmax(-1), two.argmax(-1)):
            return
