# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""Two charts as SVG text, light or dark as the reader's screen is: what a decoding step costs, and accuracy beside LoRA's."""

from __future__ import annotations

from html import escape


WIDTH, ROW, LABELS = 720, 30, 190  # pixels: of the picture, of a row, and of the names on the left
STYLE = """<style>
  text { font: 14px system-ui, sans-serif; fill: #24292f }
  .note { font-size: 12px; fill: #57606a }
  .bar { fill: #2f6fbf } .other { fill: #8c959f } .axis, .whisker { stroke: #57606a }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .note { fill: #9da7b3 }
    .bar { fill: #6cb0ff } .other { fill: #7d8590 } .axis, .whisker { stroke: #9da7b3 }
  }
</style>"""


def _svg(rows: list[str], count: int, note: str, title: str) -> str:
    height = ROW * (count + 1)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">',
            STYLE,
            *rows,
            f'<text class="note" x="0" y="{height - 8}">{escape(note)}</text>',
            "</svg>\n",
        ]
    )


def bars(ratios: dict[str, float], ours: set[str], note: str) -> str:
    """A horizontal bar for each name, as long as its ratio."""
    unit = (WIDTH - LABELS - 70) / max(ratios.values())
    rows = []
    for number, (name, ratio) in enumerate(ratios.items()):
        top = ROW * number
        kind = "bar" if name in ours else "other"
        rows.append(f'<text x="0" y="{top + 20}">{escape(name)}</text>')
        rows.append(f'<rect class="{kind}" x="{LABELS}" y="{top + 5}" width="{unit * ratio:.0f}" height="20" rx="2"/>')
        rows.append(f'<text x="{LABELS + unit * ratio + 8:.0f}" y="{top + 20}">{ratio:.2f} x</text>')
    return _svg(rows, len(ratios), note, "Time of a decoding step: " + note)


def intervals(found: dict[str, tuple[float, float, float]], ours: set[str], note: str) -> str:
    """A dot with its interval for each name, `(mean, low, high)`, around a line at 0."""
    least = min(0.0, *(low for _, low, _ in found.values()))
    unit = (WIDTH - LABELS - 80) / (max(0.0, *(high for _, _, high in found.values())) - least)

    def at(value: float) -> str:
        return f"{LABELS + 20 + unit * (value - least):.0f}"

    rows = [f'<line class="axis" x1="{at(0)}" x2="{at(0)}" y1="0" y2="{ROW * len(found)}" stroke-dasharray="4 3"/>']
    for number, (name, (mean, low, high)) in enumerate(found.items()):
        middle = ROW * number + 15
        kind = "bar" if name in ours else "other"
        rows.append(f'<text x="0" y="{middle + 5}">{escape(name)}</text>')
        rows.append(
            f'<line class="whisker" x1="{at(low)}" x2="{at(high)}" y1="{middle}" y2="{middle}" stroke-width="2"/>'
        )
        rows.append(f'<circle class="{kind}" cx="{at(mean)}" cy="{middle}" r="6"/>')
        rows.append(f'<text class="note" x="{WIDTH - 45}" y="{middle + 5}">{mean:+.1f}</text>')
    return _svg(rows, len(found), note, "Difference in accuracy: " + note)
