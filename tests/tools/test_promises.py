# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The comparisons beneath the promises. That each promise can fail is tested where it is used: doctor, sweep, fuzz, conformance."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, causal_lm

from peft_instance_prompt.tools.promises import Broken, Probe, leak, off, pack, row_alone


def test_a_difference_is_measured_in_units_of_the_largest_number():
    assert off(torch.tensor([3.0, 40.0]), torch.tensor([1.0, 40.0])) == pytest.approx(0.05)
    assert off(torch.tensor([0.3]), torch.tensor([0.1])) == pytest.approx(0.2)
    probe = Probe(torch.nn.Identity(), tolerance=0.06)
    probe.same(torch.tensor([3.0, 40.0]), torch.tensor([1.0, 40.0]), "numbers")
    for other in ([4.0, 40.0], [1.0, torch.nan], [torch.inf, 40.0]):
        with pytest.raises(Broken, match="numbers: off by"):
            probe.same(torch.tensor(other), torch.tensor([1.0, 40.0]), "numbers")
    with pytest.raises(Broken, match=r"the output has the shape \(2,\) and not \(1, 2\)"):
        off(torch.zeros(2), torch.zeros(1, 2))


def test_steps_are_compared_as_long_as_the_texts_are_the_same():
    probe = Probe(torch.nn.Identity(), tolerance=0.1)
    tie, other = torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([[0.49, 0.51], [1.0, 0.0]])  # (T, V)
    probe.same_steps(tie, other, "texts")
    with pytest.raises(Broken, match="texts, step 0: off by 0.5"):
        probe.same_steps(tie, other.flip(0), "texts")
    with pytest.raises(Broken, match="texts, step 1: off by 0.51"):
        probe.same_steps(other[[0, 0]], other, "texts")


def test_rows_alone_and_packed():
    inputs = {**batch(3, 2), "decoder_input_ids": torch.tensor([[7, 8, 9], [7, 5, 6]])}
    alone = row_alone(inputs, 1)
    assert alone["input_ids"].tolist() == inputs["input_ids"][1:, 1:].tolist()
    assert alone["decoder_input_ids"].tolist() == [[7, 5, 6]]
    parts = [{"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])} for ids in ([4, 5], [6], [7, 8])]
    packed = pack([parts[:2], parts[2:]], pads=1)
    assert packed["input_ids"].tolist() == [[4, 5, 6, 0], [7, 8, 0, 0]]
    assert packed["labels"].tolist() == [[4, 5, 6, -100], [7, 8, -100, -100]]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]


def test_inputs_that_do_not_differ_show_no_leak():
    with pytest.raises(Broken, match="the changed tokens change nothing"):
        leak(Probe(causal_lm()), batch(5), batch(5), early=3)
