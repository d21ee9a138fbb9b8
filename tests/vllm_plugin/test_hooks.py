# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The hooks, on layers that stand in for an engine's."""

from __future__ import annotations

import pytest
import torch
from test_plan import editing, editor, generator, plan, prefill
from torch import nn

from peft_instance_prompt.generator import Instances
from peft_instance_prompt.vllm.hooks import Writer, put
from peft_instance_prompt.vllm.plan import Plan


class Layer(nn.Module):
    """Takes the layer's input in two parts and keeps what it got."""

    def forward(self, positions, hidden_states, residual):
        self.got = hidden_states.clone(), None if residual is None else residual.clone()
        return hidden_states, residual


def run(layers, found, states, residual) -> dict[str, str]:
    writer = Writer(layers)
    writer.plan = found
    for layer in layers:
        layer(None, states, residual)
    failures = writer.close().failures
    assert writer.plan == Plan()
    writer.remove()
    return failures


@pytest.mark.parametrize("split", [False, True])
def test_vectors_stand_in_the_slots(split) -> None:
    adapter = generator(init_weights=False, prompt_position="before")  # at the end they are added to what stands there
    layers = [Layer() for _ in range(3)]
    states = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    before = states.clone()
    hidden, residual = (states / 4, states * 3 / 4) if split else (states, None)
    found = plan(prefill("r", "a", 4, [0, 1, 2, 3], total=8, row=0), a=adapter)
    assert run(layers, found, hidden, residual) == {}
    text = before[4:][None]
    with torch.no_grad():
        wanted = adapter(Instances(text, torch.ones(1, 4, dtype=torch.bool), text[:, :1]), 2)[0]  # (4, d)
    got, rest = layers[2].got
    got = got if rest is None else got + rest
    torch.testing.assert_close(got[:4], wanted)
    torch.testing.assert_close(got[4:], before[4:])
    assert not any(layer._forward_pre_hooks for layer in layers)


@pytest.mark.parametrize("split", [False, True])
def test_edits_of_two_adapters_beside_slots(split) -> None:
    a, b, slots, layers = editor(), editor(), generator(init_weights=False), [Layer() for _ in range(3)]
    states = torch.randn(120, 32, generator=torch.Generator().manual_seed(0))
    before = states.clone()
    hidden, residual = (states / 4, states * 3 / 4) if split else (states, None)
    found = plan(
        editing("r1", "a", [[0, 3], [5, 90]], row=1, done=2, length=80),  # its tokens 2 and 5 to 81
        editing("r2", "b", [[0, 9]], row=81, done=0, length=10),
        editing("r3", "a", [[0, 4]], row=91, done=3, length=5),
        prefill("r4", "c", 4, [0, 1, 2, 3], total=8, row=96),
        **{"a": a, "b": b, "c": slots},
    )
    assert run(layers, found, hidden, residual) == {}
    edited = {"a": [1, *range(4, 81), 91], "b": list(range(81, 90))}
    wanted = before.clone()
    for depth in range(3):  # the layers hand on what they get
        for key, rows in edited.items():
            adapter = {"a": a, "b": b}[key]
            down, bias, up = adapter.down[depth], adapter.bias[depth], adapter.up[depth]
            wanted[rows] += ((wanted[rows] @ down + bias) @ up).detach()
        got, rest = layers[depth].got
        got = got if rest is None else got + rest
        others = [row for row in range(120) if row not in range(96, 100)]  # but the slots
        torch.testing.assert_close(got[others], wanted[others])
    assert not torch.allclose(wanted[edited["a"]], before[edited["a"]], atol=0.1)


def test_answers_without_their_prompt_are_told() -> None:
    layers = [Layer() for _ in range(2)]  # of three
    found = plan(prefill("r", "a", 4, [0, 1, 2, 3], total=8, row=0))
    failures = run(layers, found, torch.randn(8, 32), None)
    assert list(failures) == ["r"] and "were written at (0, 1)" in failures["r"].replace("[", "(").replace("]", ")")
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_step_without_a_plan_is_left_alone() -> None:
    layers, states = [Layer() for _ in range(3)], torch.randn(8, 32)
    before = states.clone()
    assert run(layers, Plan(), states, None) == {} and torch.equal(states, before)


def test_what_is_added_is_rounded_once() -> None:
    """In transformers the prompt is added to the layer's input, which vLLM has in two parts."""
    states = torch.full((3, 4), 257.0).bfloat16()
    hidden, residual = torch.full((3, 4), 1.0).bfloat16(), torch.full((3, 4), 256.0).bfloat16()
    values = torch.full((2, 4), 1.0).bfloat16()
    put(hidden, residual, torch.tensor([0, 2]), values, onto=hidden + residual)
    wanted = (states + 1)[[0, 2]]
    assert torch.equal((hidden + residual)[[0, 2]], wanted) and residual[1].tolist() == [256.0] * 4
