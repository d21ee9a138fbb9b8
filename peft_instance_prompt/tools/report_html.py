# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""An [`InstanceReport`] as a page: what was found in sentences, a chart, a table, and what was read of some texts.

The page needs no other file, no network and no script. It is light or dark as the reader's system is.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from . import reading_html
from .themes import THEMES


if TYPE_CHECKING:
    from .report import InstanceReport

Cell = dict[str, float]  # mean, low, high

MEANING = {
    "own": "The prompt that is generated from the instance itself.",
    "shuffled": "The prompt of another instance of the same batch. As good as own: it does not matter which instance a prompt is from.",
    "mean": "The mean of all instances' prompts, the same for each. As good as own: one prompt for all would do.",
    "none": "No prompt. What else was trained, such as a classification head, stays.",
}
BETTER = {
    "loss": -1,
    "accuracy": 1,
}  # the sign of a difference that is an improvement; of other measures it is not known

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
COLOURS
"""


def make_page(report: InstanceReport) -> str:
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
        reading_html.make_section(report.readings, report.values),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Did the instance matter?</title>\n'
        f"<style>{make_style()}{reading_html.make_style(report.readings)}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def make_frame(report: InstanceReport) -> str:
    """The page in a frame of its own, for notebooks: its style and the notebook's do not meet."""
    page = escape(make_page(report), quote=True)
    return f'<iframe srcdoc="{page}" style="width: 100%; height: 40rem; border: 0" title="Did the instance matter?"></iframe>'


def make_style() -> str:
    style = STYLE
    for name, theme in THEMES.items():
        names = {"paper": theme.paper, "ink": theme.ink, "soft": theme.soft, "line": theme.line}
        names |= {"more": theme.more, "less": theme.less}
        names |= dict(zip(MEANING, theme.series))
        style = style.replace(name.upper(), " ".join(f"--{key}: {colour};" for key, colour in names.items()))
    rules = (f"svg .{name} {{ stroke: var(--{name}); fill: var(--{name}); }}" for name in MEANING)
    return style.replace("COLOURS", "\n".join(rules))


# ------------------------------------------------------------------------------------------------------- in sentences


def answer(summary: dict[str, dict[str, Cell]]) -> list[str]:
    """What the differences say, a sentence for each measure and kind of prompt; first, the answer by the first measure, the loss."""
    first = next(iter(summary))
    wins = [verdict(first, summary[first][f"own - {other}"]) for other in ("shuffled", "mean")]
    if all(win == "better" for win in wins):
        head = "Yes: by the loss, its own prompt serves an instance better than another's, and better than the mean of all."
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
    """Of own minus another prompt: "better", "worse", "same" if the interval holds 0, or "differs" if better is not known."""
    if difference["low"] <= 0 <= difference["high"]:
        return "same"
    sign = BETTER.get(measure)
    return "differs" if sign is None else "better" if sign * difference["mean"] > 0 else "worse"


def lost_share(by_name: dict[str, Cell]) -> float | None:
    """Which share of the gain of own prompts over none is lost with others' prompts. None if there is no such gain or loss."""
    if any(verdict("loss", by_name[f"own - {other}"]) != "better" for other in ("none", "shuffled")):
        return None
    return by_name["own - shuffled"]["mean"] / by_name["own - none"]["mean"]


def table(summary: dict[str, dict[str, Cell]]) -> str:
    head = "".join(f"<th>{escape(measure)}</th>" for measure in summary)
    rows = []
    for name in next(iter(summary.values())):
        cells = (by_name[name] for by_name in summary.values())
        texts = (f"<td>{c['mean']:.4f} [{c['low']:.4f}, {c['high']:.4f}]</td>" for c in cells)
        rows.append(f"<tr><th>{name.replace('-', '−')}</th>{''.join(texts)}</tr>")
    return f'<div class="wide"><table><tr><th>prompt</th>{head}</tr>{"".join(rows)}</table></div>'


# ------------------------------------------------------------------------------------------------------------ the chart


def chart(measure: str, by_name: dict[str, Cell]) -> str:
    """Means and intervals of the four prompts. One that lies far off the others (mostly `none`) is an arrow at the edge."""
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
        y, numbers = 38 * number + 14, f"{cell['mean']:.4f} [{cell['low']:.4f}, {cell['high']:.4f}]"
        marks.append(f'<text x="2%" y="{y}">{name}: {numbers}</text>')
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
    """The ends of the axis: all intervals, but for `none` where it would press the others into a fifth of the axis."""
    near = [cell for name, cell in cells.items() if name != "none"]
    spans = [(min(c["low"] for c in some), max(c["high"] for c in some)) for some in (near, list(cells.values()))]
    widths = [high - low for low, high in spans]
    low, high = spans[1] if widths[1] <= 5 * widths[0] else spans[0]
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def nice_ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers within a range, and not at its very ends, where their text would leave the chart."""
    rough = (high - low) / 6
    step = 10.0 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
    margin = 0.04 * (high - low)
    numbers = range(math.ceil((low + margin) / step), math.floor((high - margin) / step) + 1)
    return [round(number * step, 10) for number in numbers]
