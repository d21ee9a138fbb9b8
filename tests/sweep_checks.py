# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which promises the sweep asks of a model with an adapter, and of the bare model, and with which inputs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch
from methods import METHODS
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from tiny import adapted, batch

from peft_instance_prompt.tools import promises
from peft_instance_prompt.tools.promises import GREEDY, Inputs, Probe


LM, PAIR, CLASSIFIER, MASKED = "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", None
PROMPT, CHANGED = 5, 7  # how many tokens the instruction has, and the first token that the leak check changes
NEW, LENGTHS = 3, (9, 6)
WIDTH = max(LENGTHS)
# In which ways a row is padded, and whether texts are compared, or logits.
WAYS = {LM: [("left", True), ("right", False)], PAIR: [("right", True), ("left", True)]}
WAYS.update({CLASSIFIER: [("right", False), ("left", False)], MASKED: [("right", False), ("left", False)]})
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


def ended(inputs: Inputs, end: int | None) -> Inputs:
    """Rows whose last token is the end token, which some classifiers look for."""
    if not isinstance(end, int):
        return inputs
    columns = torch.arange(inputs["input_ids"].shape[1])
    last = (inputs["attention_mask"] * columns).argmax(dim=1)  # (B,)
    return {**inputs, "input_ids": inputs["input_ids"].scatter(1, last[:, None], end)}


class Checks:
    """The promises of one model, with the inputs that they are asked with.

    Args:
        subject (`Subject`): The bare model.
        model (`nn.Module`): The model with an adapter, or the bare model again.
    """

    def __init__(self, subject: Subject, model: torch.nn.Module):
        self.s, config = subject, subject.bare.config
        self.pad = config.get_text_config().pad_token_id or 0  # some models find padding by its id
        self.end = getattr(config, "eos_token_id", None)
        generation = {**GREEDY, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": self.pad}
        self.probe = Probe(model, self.outputs, subject.kind in (LM, MASKED), TOLERANCE, generation)

    def outputs(self, model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
        out = model(**inputs).logits
        if self.s.kind == CLASSIFIER:
            return out  # (B, classes)
        # Some models put more in front of the text.
        return out[:, -(inputs["input_ids"].shape[1] if self.probe.per_token else WIDTH) :]  # (B, S, V)

    def of(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The promises that this kind of model makes, by name."""
        probe, kind, labelled = self.probe, self.s.kind, self.labelled
        adapted = isinstance(probe.model, PeftModel)
        if adapted:  # first: training moves what some base models count, the norms of a batch for one
            yield "saved", lambda: promises.saved(probe, copy.deepcopy(self.s.bare), labelled())
        yield "rows", self.rows
        if kind in (LM, PAIR):
            # Labels of a pair stand one place later among its inputs.
            early, at, lengths = (6, 0, LENGTHS) if kind == PAIR else (CHANGED, PROMPT - 1, (PROMPT, PROMPT))
            yield "cache", lambda: promises.cache(probe, self.texts("left"))
            yield "leak", lambda: promises.leak(probe, labelled(0), labelled(7), early)
            yield "prompt", lambda: promises.prompt(probe, labelled(), at, self.texts("right", lengths))
        if adapted:
            yield "gradient", lambda: promises.gradient(probe, labelled())
        if adapted and kind != CLASSIFIER:
            yield "effect", lambda: promises.effect(probe, labelled(), TOLERANCE)

    def rows(self) -> None:
        """What is padded is the second row."""
        for side, generates in WAYS[self.s.kind][: 1 if self.s.source else 2]:
            inputs = self.texts(side)
            inputs = ended(inputs, self.end) if self.s.kind == CLASSIFIER else inputs
            promises.rows(self.probe, inputs, [1], generates)

    def ids_of(self, *lengths: int, side: str = "right", seed: int = 0) -> Inputs:
        return batch(*lengths, side=side, seed=seed, pad=self.pad, tokens=TEXT)

    def texts(self, side: str, lengths: tuple[int, ...] = LENGTHS) -> Inputs:
        return self.called(self.ids_of(*lengths, side=side))

    def called(self, inputs: Inputs) -> Inputs:
        """With the further arguments that the model wants, or with what its encoder reads in place of a text."""
        if not self.s.source:
            return {**inputs, **self.s.extra(inputs["input_ids"])}
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        return {**rest, **self.s.source}

    def labelled(self, seed: int = 0) -> Inputs:
        """A batch for training: the tokens from `CHANGED` on depend on the seed."""
        if self.s.kind == PAIR:
            parts = [self.ids_of(5, 5)["input_ids"], self.ids_of(4, 4, seed=1 + seed)["input_ids"]]
            return self.called({**self.ids_of(*LENGTHS), "labels": torch.cat(parts, 1)})  # (B, 9)
        inputs = self.ids_of(WIDTH, 8)
        if self.s.kind == LM:
            new = self.ids_of(WIDTH, 8, seed=seed)["input_ids"]
            late = torch.arange(WIDTH) >= CHANGED
            inputs["input_ids"] = torch.where(late, new, inputs["input_ids"])  # (B, S)
            unlabelled = (torch.arange(WIDTH) < PROMPT) | (inputs["attention_mask"] == 0)  # (B, S)
            inputs["labels"] = inputs["input_ids"].masked_fill(unlabelled, -100)  # (B, S)
        elif self.s.kind == CLASSIFIER:
            inputs = {**ended(inputs, self.end), "labels": torch.tensor([0, 1])}
        else:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # (B, S)
        return self.called(inputs)
