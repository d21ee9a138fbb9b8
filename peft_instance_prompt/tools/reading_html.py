# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the prompt vectors read of some texts, as a part of a page: each token is shaded by its share, layer by layer.

A layer is chosen with radio buttons, and a rule of the style for each shows its part: there is no script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

import torch

from .inspection import Reading


MOST_TOKENS = 300  # of a text: at each layer, each vector has the whole text once
STEPS = 4  # shades on either side of a uniform reading, each half a power of two

STYLE = """
.pick { position: absolute; opacity: 0; pointer-events: none; }
.layers { display: flex; flex-wrap: wrap; gap: .25rem; align-items: center; margin: .75rem 0; }
.layers label { min-width: 2.4rem; padding: .3rem .4rem; text-align: center; border: 1px solid var(--line); border-radius: .3rem;
  cursor: pointer; font-variant-numeric: tabular-nums; }
.layers span, .scale span { margin-right: .4rem; }
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem; font-size: .9rem; margin: .5rem 0; }
.scale i { padding: .1rem .45rem; }
.layer { display: none; }
.vector { margin: .6rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.vector b { display: block; font-size: .85rem; font-weight: 600; }
i { font-style: normal; border-radius: .2rem; }
.out { color: var(--soft); }
"""


def make_style(readings: list[Reading]) -> str:
    """The rules of the section."""
    rules = [STYLE]
    for step in range(-STEPS, STEPS + 1):
        colour, share = ("more", 14 * step) if step > 0 else ("less", -8 * step)  # what is read stands out
        rules.append(
            f".{shade_name(step)} {{ background: color-mix(in srgb, var(--{colour}) {share}%, var(--paper)); }}"
        )
    for depth in depths_of(readings):
        name = layer_name(depth)
        rules.append(f"#{name}:checked ~ .texts .{name} {{ display: block; }}")
        rules.append(
            f"#{name}:checked ~ .layers label[for={name}] {{ background: var(--ink); color: var(--paper); border-color: var(--ink); }}"
        )
        rules.append(f"#{name}:focus-visible ~ .layers label[for={name}] {{ outline: 3px solid var(--more); }}")
    return "\n".join(rules)


def make_section(readings: list[Reading], values: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """The section; a sentence where there is nothing to show.

    Args:
        readings (`list[Reading]`): Those of the first instances.
        values (`dict`): Of all instances, as in [`InstanceReport`].
    """
    if not readings:
        return "<p>Give <code>instance_report</code> a <code>tokenizer</code>, and the first texts are shown here, shaded.</p>"
    depths = depths_of(readings)
    if not depths:
        return "<p>The prompt vectors of this method are no weighted means over tokens: there are no shares of tokens to show.</p>"
    most = most_selective(readings)
    picks = "".join(
        f'<input class="pick" type="radio" name="layer" id="{layer_name(depth)}"{" checked" if depth == most else ""}>'
        for depth in depths
    )
    labels = "".join(
        f'<label for="{layer_name(depth)}" title="reads {tokens_read(readings, depth)}">{"input" if depth < 0 else depth}</label>'
        for depth in depths
    )
    steps = range(-STEPS, STEPS + 1)
    scale = "".join(f'<i class="{shade_name(step)}">{2 ** (step / 2):.2g}</i>' for step in steps)
    texts = "".join(
        f"<h3>Text {number + 1}</h3><p class=soft>{losses(values, number)}</p>{make_text(reading)}"
        for number, reading in enumerate(readings)
    )
    return (
        "<p>A prompt vector is a weighted mean over the tokens of the instruction. Its shade says how many times its share in a "
        "uniform reading a token has; pointing at a token shows the numbers. The layer that is shown first is the one that chooses "
        "most among tokens.</p>"
        f'{picks}<div class="layers"><span>Layer</span>{labels}</div>'
        f'<div class="scale"><span>times the uniform share</span>{scale}</div><div class="texts">{texts}</div>'
    )


def make_text(reading: Reading) -> str:
    """One text, once for each layer and prompt vector."""
    parts = []
    for depth in reading.weights:
        ratios, shares = reading.ratios(depth).tolist(), reading.weights[depth].tolist()  # (l, S) each
        lines = []
        for number, count in enumerate(reading.tokens_read(depth).tolist()):
            head = f"vector {number + 1}: reads {count:.1f} of {int(reading.inside.sum())} tokens"
            lines.append(
                f'<div class="vector"><b>{head}</b>{make_line(reading, ratios[number], shares[number])}</div>'
            )
        parts.append(f'<div class="layer {layer_name(depth)}">{"".join(lines)}</div>')
    return "".join(parts)


def make_line(reading: Reading, ratios: list[float], shares: list[float]) -> str:
    """The text as one vector reads it."""
    tokens = []
    for token, inside, ratio, share in list(zip(reading.tokens, reading.inside.tolist(), ratios, shares))[
        :MOST_TOKENS
    ]:
        text = escape(token.replace("\n", "↵\n")) or "␣"
        if inside:
            tokens.append(f'<i class="{shade_name(shade(ratio))}" title="×{ratio:.2f}, {share:.1%}">{text}</i>')
        else:
            tokens.append(f'<i class="out" title="not in the instruction">{text}</i>')
    more = len(reading.tokens) - MOST_TOKENS
    return "".join(tokens) + (f' <span class="out">… and {more} more tokens</span>' if more > 0 else "")


def shade(ratio: float) -> int:
    """The shade of a token's share over the uniform share, from -STEPS to STEPS; 0 if it is about uniform."""
    return -STEPS if ratio <= 0 else max(-STEPS, min(STEPS, round(2 * math.log2(ratio))))


def shade_name(step: int) -> str:
    return f"s{step + STEPS}"


def layer_name(depth: int) -> str:
    return "input" if depth < 0 else f"layer{depth}"


def depths_of(readings: list[Reading]) -> list[int]:
    return list(readings[0].weights) if readings else []


def tokens_read(readings: list[Reading], depth: int) -> str:
    """Over texts and vectors, the mean share of the tokens that is read, in words."""
    return f"{share_read(readings, depth):.0%} of the tokens"


def share_read(readings: list[Reading], depth: int) -> float:
    shares = [reading.tokens_read(depth).mean() / reading.inside.sum() for reading in readings]
    return torch.stack(shares).mean().item()


def most_selective(readings: list[Reading]) -> int:
    """The depth at which the fewest tokens are read."""
    return min(depths_of(readings), key=lambda depth: share_read(readings, depth))


def losses(values: Mapping[str, Mapping[str, torch.Tensor]], number: int) -> str:
    """The loss of an instance with each kind of prompt."""
    found = ", ".join(f"{name} {by_instance[number]:.3f}" for name, by_instance in values["loss"].items())
    return f"loss by prompt: {found}"
