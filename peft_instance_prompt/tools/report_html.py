# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""An [`InstanceReport`] as a page: the findings in sentences, charts, a table, and the first texts with each token shaded by its share.

The page needs no other file, no network and no script, and is light or dark as the reader's system is. Radio buttons choose a layer;
a rule of the style for each layer shows its texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

import torch

from .inspection import Reading
from .themes import THEMES


Cell = dict[str, float]  # mean, low, high

MEANING = {
    "own": "The prompt that is generated from the instance itself.",
    "shuffled": "The prompt of a different instance of the same batch. If it is as good as own, it does not matter which instance a "
    "prompt is from.",
    "mean": "The mean of all instances' prompts, the same for each. If it is as good as own, one prompt for all would do.",
    "none": "No prompt. Whatever else was trained, such as a classification head, stays.",
}
# The sign of a difference that is an improvement; of other measures it is not known.
BETTER = {"loss": -1, "accuracy": 1}

MOST_TOKENS = 300  # of a text, which the page holds once for each layer and vector
STEPS = 4  # shades on either side of a uniform reading, each half a power of two

STYLE = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
.soft { color: var(--soft); }
.answer { border-left: 4px solid var(--more); padding: .1rem 0 .1rem 1rem; }
.answer p { margin: .4rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
@media (max-width: 40rem) { td { white-space: normal; } }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 1rem 0; }
dt { font-weight: 600; }
dd { margin: 0; }
svg { display: block; width: 100%; max-width: 40rem; overflow: visible; font-size: 14px; }
svg text { fill: var(--ink); stroke: var(--paper); stroke-width: 4px; paint-order: stroke; }
svg .axis text { fill: var(--soft); font-size: 12px; }
svg .axis line { stroke: var(--line); }
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


def make_page(report: Any) -> str:
    """The page of a report, as HTML."""
    summary = report.summary()
    method = f"{escape(report.subject)}. " if report.subject else ""
    setting = f"{len(report)} instances, {report.level:.0%} intervals of {report.resamples} bootstrap resamples (seed {report.seed})."
    spread = [report.spread_in_words()] if report.spread else []
    body = [
        "<h1>Did the instance matter?</h1>",
        f'<p class="soft">{method}{setting}</p>',
        f'<div class="answer">{"".join(f"<p>{line}</p>" for line in answer(summary) + spread)}</div>',
        "<h2>The same data with four prompts</h2>",
        f"<dl>{''.join(f'<dt>{name}</dt><dd>{text}</dd>' for name, text in MEANING.items())}</dl>",
        *(chart(measure, by_name) for measure, by_name in summary.items()),
        "<h2>Means and intervals</h2>",
        table(summary),
        '<p class="soft">The last three rows are paired differences: each resample takes the same instances for both prompts. Where '
        "such an interval holds 0, the data show no difference.</p>",
        "<h2>What the prompt vectors read</h2>",
        make_section(report.readings, report.values),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Did the instance matter?</title>\n'
        f"<style>{make_style(report.readings)}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def as_text(cell: Cell) -> str:
    """Mean and interval, e.g. "0.5000 [0.4000, 0.6000]"."""
    return f"{cell['mean']:.4f} [{cell['low']:.4f}, {cell['high']:.4f}]"


def make_frame(report: Any) -> str:
    """The page in an iframe, for notebooks: the page's style and the notebook's do not mix."""
    page = escape(make_page(report), quote=True)
    return f'<iframe srcdoc="{page}" style="width: 100%; height: 40rem; border: 0" title="Did the instance matter?"></iframe>'


def make_style(readings: list[Reading]) -> str:
    """The page's style sheet: the themes' colours, a rule for each kind of prompt, shade and layer."""
    style = STYLE
    for name, theme in THEMES.items():
        names = {key: getattr(theme, key) for key in ("paper", "ink", "soft", "line", "more", "less")}
        names |= dict(zip(MEANING, theme.series))
        style = style.replace(name.upper(), " ".join(f"--{key}: {colour};" for key, colour in names.items()))
    rules = [f"svg .{name} {{ stroke: var(--{name}); fill: var(--{name}); }}" for name in MEANING]
    for step in range(-STEPS, STEPS + 1):
        colour, share = ("more", 14 * step) if step > 0 else ("less", -8 * step)  # what is read stands out
        mixed = f"color-mix(in srgb, var(--{colour}) {share}%, var(--paper))"
        rules.append(f".{shade_name(step)} {{ background: {mixed}; }}")
    for depth in readings[0].weights if readings else ():
        name = layer_name(depth)
        chosen = "background: var(--ink); color: var(--paper); border-color: var(--ink);"
        rules.append(f"#{name}:checked ~ .texts .{name} {{ display: block; }}")
        rules.append(f"#{name}:checked ~ .layers label[for={name}] {{ {chosen} }}")
        rules.append(f"#{name}:focus-visible ~ .layers label[for={name}] {{ outline: 3px solid var(--more); }}")
    return "\n".join([style, *rules])


# ------------------------------------------------------------------------------------------------------- in sentences


def answer(summary: dict[str, dict[str, Cell]]) -> list[str]:
    """The answer by the first measure, which is the loss, and for each measure a sentence with its three differences."""
    first = next(iter(summary))
    wins = [verdict(first, summary[first][f"own - {other}"]) for other in ("shuffled", "mean")]
    if all(win == "better" for win in wins):
        head = "Yes: by the loss, its own prompt serves an instance better than a different instance's, and better than the mean of all."
    elif "worse" in wins:
        head = "No: by the loss, its own prompt serves an instance worse than one that is not its own."
    else:
        head = "Not shown: by the loss, a prompt that is not the instance's own does as well within the noise."
    lines = [f"<strong>{head}</strong>"]
    for measure, by_name in summary.items():
        parts = []
        for other in ("shuffled", "mean", "none"):
            cell = by_name[f"own - {other}"]
            found = verdict(measure, cell)
            word = {"same": "no difference shown", "differs": "different"}.get(found, found)
            parts.append(f"{word} than {other}" if found in ("better", "worse") else f"{other}: {word}")
            parts[-1] += f" ({cell['mean']:+.4f}, from {cell['low']:+.4f} to {cell['high']:+.4f})"
        lines.append(f"{escape(measure)} with own prompts: {'; '.join(parts)}.")
    share = lost_share(summary[first])
    if share is not None:
        lines.append(
            f"Of what own prompts gain in the loss over none, {share:.1%} is lost when the prompts are exchanged between instances."
        )
    return lines


def verdict(measure: str, difference: Cell) -> str:
    """How own prompts are in a difference: "better" or "worse"; "same" if its interval holds 0; "differs" if the better sign is not known."""
    if difference["low"] <= 0 <= difference["high"]:
        return "same"
    sign = BETTER.get(measure)
    return "differs" if sign is None else "better" if sign * difference["mean"] > 0 else "worse"


def lost_share(by_name: dict[str, Cell]) -> float | None:
    """The share of own prompts' gain over none that shuffled prompts lose. None if the data show no such gain or loss."""
    if any(verdict("loss", by_name[f"own - {other}"]) != "better" for other in ("none", "shuffled")):
        return None
    return by_name["own - shuffled"]["mean"] / by_name["own - none"]["mean"]


def table(summary: dict[str, dict[str, Cell]]) -> str:
    """A row for each prompt and difference, a column for each measure: mean and interval."""
    head = "".join(f"<th>{escape(measure)}</th>" for measure in summary)
    rows = []
    for name in next(iter(summary.values())):
        cells = "".join(f"<td>{as_text(by_name[name])}</td>" for by_name in summary.values())
        rows.append(f"<tr><th>{name.replace('-', '−')}</th>{cells}</tr>")
    return f'<div class="wide"><table><tr><th>prompt</th>{head}</tr>{"".join(rows)}</table></div>'


# ------------------------------------------------------------------------------------------------------------ the chart


def chart(measure: str, by_name: dict[str, Cell]) -> str:
    """Means and intervals of the four prompts. One that lies far from the others (mostly `none`) is an arrow at the edge."""
    cells = {name: by_name[name] for name in MEANING}
    title = f"<h3>{escape(measure)}</h3>"
    if not all(math.isfinite(value) for cell in cells.values() for value in cell.values()):
        return f"{title}<p>Some values are not finite, so there is no chart.</p>"
    low, high = axis_ends(cells)

    def place(value: float) -> str:
        return f"{2 + 96 * (value - low) / (high - low):.2f}%"

    height, marks = 38 * len(cells), []
    for value in nice_ticks(low, high):
        marks.append(
            f'<g class="axis"><line x1="{place(value)}" x2="{place(value)}" y1="0" y2="{height}"/>'
            f'<text x="{place(value)}" y="{height + 16}" text-anchor="middle">{value:g}</text></g>'
        )
    for number, (name, cell) in enumerate(cells.items()):
        y = 38 * number + 14
        marks.append(f'<text x="2%" y="{y}">{name}: {as_text(cell)}</text>')
        y += 12
        if low <= cell["low"] and cell["high"] <= high:
            marks.append(
                f'<line class="{name}" x1="{place(cell["low"])}" x2="{place(cell["high"])}" y1="{y}" y2="{y}" stroke-width="4"/>'
                f'<circle class="{name}" cx="{place(cell["mean"])}" cy="{y}" r="6"/>'
            )
        else:
            end, anchor, arrow = (
                ("98%", "end", "off the chart →") if cell["mean"] > high else ("2%", "start", "← off the chart")
            )
            marks.append(f'<text x="{end}" y="{y + 5}" text-anchor="{anchor}">{arrow}</text>')
    label = f"{escape(measure)} with four kinds of prompts"
    return f'{title}<svg role="img" aria-label="{label}" height="{height + 22}">{"".join(marks)}</svg>'


def axis_ends(cells: dict[str, Cell]) -> tuple[float, float]:
    """The ends of the axis: all intervals fit, but that of `none` only if it leaves the others a fifth of the axis or more."""
    near = [cell for name, cell in cells.items() if name != "none"]
    spans = [(min(c["low"] for c in some), max(c["high"] for c in some)) for some in (near, list(cells.values()))]
    widths = [high - low for low, high in spans]
    low, high = spans[1] if widths[1] <= 5 * widths[0] else spans[0]
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def nice_ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers within a range, and not at its ends, where their labels would leave the chart."""
    rough = (high - low) / 6
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
    margin = 0.04 * (high - low)
    numbers = range(math.ceil((low + margin) / step), math.floor((high - margin) / step) + 1)
    return [round(number * step, 10) for number in numbers]


# ------------------------------------------------------------------------------------------------------------ the texts


def make_section(readings: list[Reading], values: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """The texts with their shades; a sentence where there is nothing to show.

    Args:
        readings (`list[Reading]`): Those of the first instances.
        values (`dict`): Those of all instances, as in [`InstanceReport`].
    """
    if not readings:
        return "<p>Give <code>instance_report</code> a <code>tokenizer</code>, and the first texts are shown here, shaded.</p>"
    depths = list(readings[0].weights)
    if not depths:
        return "<p>The prompt vectors of this method are no weighted means over tokens: there are no shares of tokens to show.</p>"
    most = most_selective(readings)
    picks = "".join(
        f'<input class="pick" type="radio" name="layer" id="{layer_name(depth)}"{" checked" if depth == most else ""}>'
        for depth in depths
    )
    labels = "".join(
        f'<label for="{layer_name(depth)}" title="reads {share_read(readings, depth):.0%} of the tokens">{"input" if depth < 0 else depth}</label>'
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
    columns = list(zip(reading.tokens, reading.inside.tolist(), ratios, shares))
    for token, inside, ratio, share in columns[:MOST_TOKENS]:
        text = escape(token.replace("\n", "↵\n")) or "␣"
        if inside:
            tokens.append(f'<i class="{shade_name(shade(ratio))}" title="×{ratio:.2f}, {share:.1%}">{text}</i>')
        else:
            tokens.append(f'<i class="out" title="not in the instruction">{text}</i>')
    more = len(columns) - MOST_TOKENS
    return "".join(tokens) + (f' <span class="out">… and {more} more tokens</span>' if more > 0 else "")


def shade(ratio: float) -> int:
    """The shade of a token's share over the uniform share, from -STEPS to STEPS; 0 if it is about uniform."""
    return -STEPS if ratio <= 0 else max(-STEPS, min(STEPS, round(2 * math.log2(ratio))))


def shade_name(step: int) -> str:
    return f"s{step + STEPS}"


def layer_name(depth: int) -> str:
    return "input" if depth < 0 else f"layer{depth}"


def share_read(readings: list[Reading], depth: int) -> float:
    """The share of its tokens that a vector reads at a depth, the mean over texts and vectors."""
    shares = [reading.tokens_read(depth).mean() / reading.inside.sum() for reading in readings]
    return torch.stack(shares).mean().item()


def most_selective(readings: list[Reading]) -> int:
    """The depth at which the fewest tokens are read."""
    return min(readings[0].weights, key=lambda depth: share_read(readings, depth))


def losses(values: Mapping[str, Mapping[str, torch.Tensor]], number: int) -> str:
    """The loss of an instance with each kind of prompt."""
    found = ", ".join(f"{name} {by_instance[number]:.3f}" for name, by_instance in values["loss"].items())
    return f"loss by prompt: {found}"
