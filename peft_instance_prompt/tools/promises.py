# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What every adapter promises: one list, which the doctor and the tests use.

A promise is a function of a [`Probe`] and of inputs, and raises [`Broken`] with a sentence if it does not hold. It compares a model
with itself, so most can be asked of a bare model, too: what is wrong there is not the adapter's fault.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


Inputs = dict[str, torch.Tensor]
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}
MODES = ("evaluation", "training")
BASE = "__base__"  # in `adapter_names`: no adapter


class Broken(AssertionError):
    """A promise does not hold."""


def outputs(model: PreTrainedModel | PeftModel, **inputs: Any) -> torch.Tensor:
    """The logits (B, S, V), or the last states (B, S, d) of an encoder without a head.

    An encoder-decoder model gives the logits (B, T, V) at its decoder's tokens; without labels, these are the same three for all rows.
    """
    if model.config.is_encoder_decoder and not {"labels", "decoder_input_ids"} & inputs.keys():
        inputs["decoder_input_ids"] = torch.tensor([[0, 5, 6]]).expand(len(inputs["input_ids"]), -1)  # (B, 3)
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


@dataclass(frozen=True)
class Probe:
    """A model in evaluation mode, and how it is asked.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`): The model.
        outputs (`Callable`): What a forward pass gives, from the model and named inputs. Defaults to [`outputs`].
        per_token (`bool`): Whether an output stands at each token of the input. A decoder that has an encoder gives one at each
            of its own tokens, a classifier one per row.
        tolerance (`float`): The largest difference that counts as rounding, in units of the largest expected number or of 1.
        generation (`dict`): Arguments of `generate`. Defaults to four new tokens, greedily.
    """

    model: PreTrainedModel | PeftModel
    outputs: Callable[..., torch.Tensor] = outputs
    per_token: bool = True
    tolerance: float = 1e-5
    generation: dict[str, Any] = field(default_factory=GREEDY.copy)

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> torch.Tensor:
        return self.outputs(self.model, **inputs)

    def steps(self, **inputs: Any) -> torch.Tensor:
        """The logits (B, T, V) of the T new tokens of `generate`."""
        how = {**self.generation, "return_dict_in_generate": True, "output_logits": True}
        return torch.stack(self.model.generate(**{**how, **inputs}).logits, dim=1)  # (B, T, V)

    def at_tokens(self, outputs: torch.Tensor, inputs: Inputs, row: int) -> torch.Tensor:
        """The outputs (n, ...) of a row of a batch, without those at its padding."""
        return outputs[row][inputs["attention_mask"][row].bool()] if self.per_token else outputs[row]

    def same(self, actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        if not off(actual, expected) <= self.tolerance:  # NaN fails, too
            raise Broken(f"{what}: off by {off(actual, expected):.2g}")

    def same_steps(self, actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Equal logits (..., T, V), as far as the texts are the same: two tokens may have the same logit but for rounding."""
        for step, (one, two) in enumerate(zip(actual.unbind(-2), expected.unbind(-2), strict=True)):
            self.same(one, two, f"{what}, step {step}")
            if not torch.equal(one.argmax(-1), two.argmax(-1)):
                return


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest expected number or of 1; NaN if a number is not finite.

    Raises:
        Broken: The shapes differ.
    """
    if actual.shape != expected.shape:
        raise Broken(f"the output has the shape {tuple(actual.shape)} and not {tuple(expected.shape)}")
    if not actual.isfinite().all():
        return float("nan")
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0)) if actual.numel() else 0.0


def row_alone(inputs: Inputs, row: int) -> Inputs:
    """A row of a batch (B, S, ...), without its padding; a decoder's own tokens have none."""
    mask = inputs.get("attention_mask")

    def own(name: str, value: torch.Tensor) -> torch.Tensor:
        padded = mask is not None and value.shape[:2] == mask.shape and not name.startswith("decoder_")
        return value[row : row + 1, mask[row].bool()] if padded else value[row : row + 1]  # (1, n, ...)

    return {name: own(name, value) for name, value in inputs.items()}


def pack(rows: Sequence[Sequence[Inputs]], pads: int = 0) -> Inputs:
    """Rows of several sequences (1, n), with at least `pads` pads at position 0 behind them, as TRL writes them."""
    width = pads + max(sum(one["input_ids"].shape[1] for one in row) for row in rows)
    made: dict[str, list[torch.Tensor]] = {}
    for row in rows:
        places = [{**one, "position_ids": torch.arange(one["input_ids"].shape[1])[None]} for one in row]
        for name in places[0]:
            whole = torch.cat([one[name] for one in places], dim=1)  # (1, tokens)
            padding = whole.new_full((1, width - whole.shape[1]), -100 if name == "labels" else 0)
            made.setdefault(name, []).append(torch.cat([whole, padding], dim=1))  # (1, width)
    return {name: torch.cat(values) for name, values in made.items()}  # (B, width)


@contextmanager
def mode(model: nn.Module, name: str) -> Iterator[None]:
    """Put the model into one of [`MODES`], and into evaluation mode afterwards."""
    model.train(name == "training")
    try:
        yield
    finally:
        model.eval()


@contextmanager
def only(model: PeftModel, name: str) -> Iterator[None]:
    """Use one adapter alone, or none for [`BASE`]; the active one is active again afterwards."""
    if name == BASE:
        with model.disable_adapter():
            yield
        return
    before = model.active_adapter
    model.set_adapter(name)
    yield
    model.set_adapter(before)


# ---------------------------------------------------------------------------------------------------------------- promises


def effect(probe: Probe, inputs: Inputs, least: float = 1e-3) -> None:
    """The adapter changes the outputs, and not their shape. Without an effect, the other promises hold trivially."""
    with probe.model.disable_adapter():
        bare = probe(**inputs)
    difference = off(probe(**inputs), bare)
    if not difference >= least:
        raise Broken(
            f"the adapter does nothing: it changes the output by {difference:.2g}, expected is {least:g} or more"
        )


def rows(probe: Probe, inputs: Inputs, among: Sequence[int] | None = None, generates: bool = False) -> None:
    """A row of a padded batch has the outputs of the row alone: in a forward pass, or for the new tokens of `generate`."""
    mask = inputs.get("attention_mask")
    side = "right" if mask is None or mask[:, 0].all() else "left"
    together = probe.steps(**inputs) if generates else probe(**inputs)
    for row in range(len(together)) if among is None else among:
        alone = row_alone(inputs, row)
        if generates:
            probe.same_steps(together[row], probe.steps(**alone)[0], f"rows, padded {side}, generate")
        else:
            found = probe.at_tokens(together, inputs, row)
            probe.same(found, probe(**alone)[0], f"rows, padded {side}, forward")


def packed(probe: Probe, rows: Sequence[Sequence[Inputs]], pads: int = 0) -> None:
    """A sequence of a packed row has the outputs of the sequence alone."""
    for row, found in zip(rows, probe(**pack(rows, pads))):
        ends = torch.tensor([one["input_ids"].shape[1] for one in row]).cumsum(0)
        for one, own in zip(row, found.tensor_split(ends)):
            probe.same(own, probe(**one)[0], "a sequence of a packed row differs from the sequence alone")


def cache(probe: Probe, inputs: Inputs) -> None:
    """`generate` gives the same with a cache as without one."""
    probe.same_steps(probe.steps(**inputs, use_cache=True), probe.steps(**inputs, use_cache=False), "cache")


def leak(probe: Probe, one: Inputs, two: Inputs, early: int, modes: Sequence[str] = MODES) -> None:
    """The outputs at the first `early` tokens do not depend on later tokens, in which the inputs differ, in evaluation and training."""
    for name in modes:
        with mode(probe.model, name):
            ours, theirs = probe(**one), probe(**two)
        if off(ours, theirs) <= probe.tolerance:
            raise Broken("leak: the changed tokens change nothing")
        probe.same(ours[:, :early], theirs[:, :early], f"leak in {name}")


def prompt(probe: Probe, inputs: Inputs, at: int, instruction: Inputs) -> None:
    """The prompt in training is that of generation: the logits at token `at`, the instruction's last, are those of a new token."""
    expected = probe.steps(**instruction)[:, 0]  # (B, V)
    for name in MODES:
        with mode(probe.model, name):
            found = probe(**inputs)[:, at].float()  # (B, V)
        probe.same(found, expected, f"prompt in {name} is not that of generation")


def gradient(probe: Probe, inputs: Inputs) -> None:
    """A gradient reaches every weight of the adapter."""
    with torch.enable_grad(), mode(probe.model, "training"):
        probe.model.zero_grad()
        probe.model(**inputs).loss.backward()
    weights = {name: p.grad for name, p in probe.model.named_parameters() if p.requires_grad}
    without = [name for name, grad in weights.items() if grad is None or not (grad.isfinite().all() and grad.any())]
    # LoRA stands where PEFT puts it, in layers too that the model does not run: unused experts, the other half of a pair.
    enough = len(without) < len(weights) if any("lora_" in name for name in weights) else not without
    if not weights or not enough:
        raise Broken(f"gradient: {len(without)} of {len(weights)} weights get none, {without[:2]}")


def saved(probe: Probe, base: nn.Module, inputs: Inputs, **how: Any) -> None:
    """An adapter that is loaded into another copy of the base model gives what the saved one gives."""
    expected = probe(**inputs)
    with tempfile.TemporaryDirectory() as folder:
        probe.model.save_pretrained(folder, save_embedding_layers=False)  # PEFT would ask the hub about the vocabulary
        loaded = PeftModel.from_pretrained(base, folder, **how).eval()
    probe.same(replace(probe, model=loaded)(**inputs), expected, "saved")


def mixed(probe: Probe, inputs: Inputs, names: list[str], whole: bool = False) -> None:
    """A row of a mixed batch has the outputs of the row with its adapter alone, a [`BASE`] row those of the base model.

    Args:
        whole (`bool`): Compare with the whole batch under one adapter, and not with the row alone. [`BASE`] rows always are, since
            some bare models count padding as positions.
    """
    together = probe(**inputs, adapter_names=names)
    for row, name in enumerate(names):
        with only(probe.model, name):
            batch = whole or name == BASE
            alone = probe.at_tokens(probe(**inputs), inputs, row) if batch else probe(**row_alone(inputs, row))[0]
        found = probe.at_tokens(together, inputs, row)
        probe.same(found, alone, "adapter_names in forward: a row differs from the row alone")


def disabled(probe: Probe, inputs: Inputs, bare: torch.Tensor) -> None:
    """`disable_adapter` gives the base model's outputs, bit for bit."""
    with probe.model.disable_adapter():
        if not torch.equal(probe(**inputs), bare):
            raise Broken("disable_adapter: not bit-equal")
