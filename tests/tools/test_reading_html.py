# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The part of the page that shows texts: shades, numbers, layers."""

from __future__ import annotations

import re

import pytest
import torch

from peft_instance_prompt.tools.inspection import Reading
from peft_instance_prompt.tools.reading_html import MOST_TOKENS, make_section, make_style, most_selective, shade


VALUES = {"loss": {name: torch.tensor([0.5, 1.25]) for name in ("own", "shuffled", "mean", "none")}}


def make_reading(number: int = 4, depths=(0, 5)) -> Reading:
    """At depth 0 all tokens are read alike; at the others, the first vector reads nothing but the first token."""
    uniform = torch.full((2, number), 1 / number)
    first = torch.cat([torch.eye(number)[:1], uniform[:1]])
    tokens = [f" w{n}" for n in range(number)]
    weights = {depth: first if depth else uniform for depth in depths}
    return Reading(tokens, torch.arange(number), torch.tensor([True] * number), weights)


@pytest.mark.parametrize(
    "ratio, step", [(1.0, 0), (1.1, 0), (2.0, 2), (1.5, 1), (0.5, -2), (4.0, 4), (99.0, 4), (0.01, -4), (0.0, -4)]
)
def test_shades(ratio, step):
    assert shade(ratio) == step


def test_each_layer_has_the_text_once_per_vector():
    readings = [make_reading(), make_reading()]
    section, style = make_section(readings, VALUES), make_style(readings)
    for layer in ("layer0", "layer5"):
        assert section.count(f'<div class="layer {layer}">') == 2
        assert f'id="{layer}"' in section and f'<label for="{layer}"' in section
        assert f"#{layer}:checked ~ .texts .{layer} {{ display: block; }}" in style
    assert section.count('type="radio"') == 2 and section.count(" checked") == 1
    assert 'id="layer5" checked' in section and most_selective(readings) == 5
    assert section.count("vector 1: reads 4.0 of 4 tokens") == section.count("vector 1: reads 1.0 of 4 tokens") == 2
    lines = re.findall(r"tokens</b>(.*?)</div>", section)
    assert len(lines) == 8 and {re.sub("<.*?>", "", line) for line in lines} == {" w0 w1 w2 w3"}
    assert '<i class="s8" title="×4.00, 100.0%"> w0</i><i class="s0" title="×0.00, 0.0%"> w1</i>' in section
    assert '<i class="s4" title="×1.00, 25.0%"> w0</i>' in section
    assert "loss by prompt: own 1.250, shuffled 1.250, mean 1.250, none 1.250" in section


def test_tokens_outside_the_instruction():
    reading = make_reading()
    reading.inside[3] = False
    section = make_section([reading], VALUES)
    assert '<i class="out" title="not in the instruction"> w3</i>' in section and "of 3 tokens" in section


def test_the_input_is_a_layer_of_its_own():
    section = make_section([make_reading(depths=(-1,))], VALUES)
    assert 'id="input"' in section and ">input</label>" in section


def test_long_texts_are_cut():
    section = make_section([make_reading(MOST_TOKENS + 7, depths=(0,))], VALUES)
    assert f" w{MOST_TOKENS - 1}</i>" in section and f" w{MOST_TOKENS}</i>" not in section
    assert "… and 7 more tokens" in section


def test_nothing_to_show():
    assert "<code>tokenizer</code>" in make_section([], VALUES)
    assert "no weighted means over tokens" in make_section([make_reading(depths=())], VALUES)
