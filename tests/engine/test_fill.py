# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Prompts are written into a layer's input where it lies only if nobody else can look at it."""

from __future__ import annotations

import pytest
import tiny
import torch

from peft_instance_prompt import IAPTConfig, IDPGConfig


def inputs_of_layers(model: torch.nn.Module, layers: torch.nn.ModuleList, batch: dict, grad: bool) -> list[tuple]:
    """For each layer: its input as the caller has it, and the numbers that it had when the layer was called."""
    seen: list[tuple] = []
    # A hook that was registered first is called first: before the prompts are written.
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(
                (s := args[0] if args else kwargs["hidden_states"], s.detach().clone())
            ),
            with_kwargs=True,
            prepend=True,
        )
        for layer in layers
    ]
    with torch.set_grad_enabled(grad):
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def changed(seen: list[tuple]) -> list[bool]:
    return [not torch.equal(states, before) for states, before in seen]


def adapter(base: torch.nn.Module, task_type: str | None, adds: bool = False) -> torch.nn.Module:
    config = IDPGConfig.preset("m-phm", task_type=task_type, phm_n=4) if adds else IAPTConfig(task_type=task_type)
    return tiny.perturb(tiny.adapted(base, config)).eval()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_without_gradients_the_logits_are_those_with_them(family: str, adds: bool) -> None:
    model = adapter(tiny.causal_lm(family), "CAUSAL_LM", adds)
    batch = tiny.batch(5, 9)
    expected = model(**batch).logits.detach()
    with torch.no_grad():
        tiny.assert_same(model(**batch).logits, expected)
    with torch.inference_mode():
        tiny.assert_same(model(**batch).logits, expected)


def test_a_decoder_is_written_to_in_place_behind_its_first_layer() -> None:
    base = tiny.causal_lm("llama")
    model = adapter(base, "CAUSAL_LM")
    seen = changed(inputs_of_layers(model, base.model.layers, tiny.batch(5, 9), grad=False))
    assert not seen[0], "the embeddings, which some models come back to, were overwritten"
    assert all(seen[1:])


@pytest.mark.parametrize("case", ["gradients", "training", "encoder"])
def test_what_somebody_else_may_hold_is_left_alone(case: str) -> None:
    if case == "encoder":
        base = tiny.encoder("bert")
        model, layers = adapter(base, None), base.encoder.layer
    else:
        base = tiny.causal_lm("llama")
        model, layers = adapter(base, "CAUSAL_LM"), base.model.layers
    batch = tiny.batch(5, 9)
    if case == "training":  # re-entrant checkpointing runs a layer without gradients, and again with its input
        model.train()
        batch["labels"] = torch.where(torch.arange(9) < 6, -100, batch["input_ids"])  # (B, S)
    seen = changed(inputs_of_layers(model, layers, batch, grad=case == "gradients"))
    assert seen and not any(seen)
