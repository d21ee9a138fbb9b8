# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The page says what the numbers say, can be opened anywhere, and shows texts as they are."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest
import torch

from peft_instance_prompt.tools.inspection import Reading
from peft_instance_prompt.tools.report import InstanceReport
from peft_instance_prompt.tools.report_html import (
    MOST_TOKENS,
    axis_ends,
    make_frame,
    make_page,
    make_section,
    make_style,
    most_selective,
    nice_ticks,
    shade,
)


NASTY = '<script>alert("&")</script>'
VOID = {"meta", "input", "line", "circle"}


def make_report(measure: str = "loss", readings=(), **shifts: float) -> InstanceReport:
    """Losses that differ between prompts by `shifts`, and from instance to instance by noise."""
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(100, generator=generator, dtype=torch.double)
    values = {
        name: own + shifts.get(name, 0.0) + (0.05 * torch.randn(100, generator=generator) if name != "own" else 0)
        for name in ("own", "shuffled", "mean", "none")
    }
    return InstanceReport({"loss": values, measure: values}, 0.95, 200, 0, "IAPT, 4 prompt vectors", list(readings))


class Page(HTMLParser):
    """Checks that tags are closed in their order; keeps tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def nasty_reading() -> Reading:
    tokens = [NASTY, " a\tb", "\n", "</i>"]
    return Reading(tokens, torch.arange(4), torch.tensor([True] * 4), {0: torch.full((2, 4), 0.25)})


def test_page_needs_nothing_else():
    text = make_page(make_report(readings=[nasty_reading()]))
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not [
        a for _, attributes in page.tags for a in attributes if a in ("src", "href", "srcset") or a[:2] == "on"
    ]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    used, defined = set(re.findall(r"var\(--(\w+)\)", style)), re.findall(r"--(\w+):", style)
    assert used and all(defined.count(name) == 2 for name in used)  # light and dark


def test_texts_and_names_are_shown_as_they_are():
    page = Page(make_page(make_report(measure="<lambda>", readings=[nasty_reading()])))
    assert page.text.count(NASTY) == 2 and page.text.count("</i>") == 2  # once for each vector
    assert "<lambda>" in page.text


def test_numbers_of_the_table():
    report = make_report(none=5.0)
    page = Page(make_page(report))
    for cell in report.summary()["loss"].values():
        assert f"{cell['mean']:.4f} [{cell['low']:.4f}, {cell['high']:.4f}]" in page.text
    assert "100 instances, 95% intervals of 200 bootstrap resamples" in page.text
    assert "IAPT, 4 prompt vectors" in page.text


@pytest.mark.parametrize(
    "shifts, head",
    [
        ({"shuffled": 0.1, "mean": 0.1, "none": 1.0}, "Yes: by the loss"),
        ({"shuffled": 0.0, "mean": 0.1, "none": 1.0}, "Not shown: by the loss"),
        ({"shuffled": 0.1, "mean": -0.1, "none": 1.0}, "No: by the loss"),
    ],
)
def test_answer(shifts, head):
    report = make_report(measure="accuracy", **shifts)
    text = Page(make_page(report)).text
    assert head in text
    cell = report.summary()["loss"]["own - none"]
    assert f"better than none ({cell['mean']:+.4f}, from {cell['low']:+.4f} to {cell['high']:+.4f})" in text
    # The same values as accuracies: what is better as a loss is worse.
    assert re.search(r"accuracy with own prompts: .*worse than none", text)
    assert ("is lost when the prompts are exchanged" in text) == (shifts["shuffled"] > 0)


def test_answer_by_a_measure_of_the_callers():
    """Whether more of it is better is not known."""
    text = Page(make_page(make_report(measure="words", shuffled=0.0, mean=0.1, none=1.0))).text
    assert re.search(
        r"words with own prompts: shuffled: no difference shown .*mean: different .*none: different", text
    )


def test_share_that_is_lost():
    own = torch.zeros(10, dtype=torch.double)
    values = {"own": own, "shuffled": own + 0.1, "mean": own + 0.1, "none": own + 2}
    text = Page(make_page(InstanceReport({"loss": values}, 0.95, 10, 0))).text
    assert "5.0% is lost when the prompts are exchanged" in text


def places(page: Page, kind: str, name: str) -> list[float]:
    (found,) = [a for tag, a in page.tags if tag == kind and a.get("class") == name]
    return [float(found[key].rstrip("%")) for key in ("cx", "x1", "x2") if key in found]


def test_chart():
    """Points stand in the order of the means, within their intervals; what lies far off is named at the edge."""
    own = torch.rand(50, dtype=torch.double)
    values = {"own": own, "shuffled": own + 0.2, "mean": own + 0.1, "none": own + 0.4}
    page = Page(make_page(InstanceReport({"loss": values}, 0.95, 100, 0)))
    points = {name: places(page, "circle", name)[0] for name in values}
    assert sorted(points, key=points.get) == ["own", "mean", "shuffled", "none"]
    assert points["shuffled"] - points["own"] == pytest.approx((points["none"] - points["own"]) / 2, abs=0.02)
    for name, place in points.items():
        low, high = places(page, "line", name)
        assert 0 <= low < place < high <= 100
    far = Page(make_page(InstanceReport({"loss": {**values, "none": own + 40}}, 0.95, 100, 0)))
    assert "off the chart →" in far.text and "← off the chart" not in far.text
    assert not [a for tag, a in far.tags if tag == "circle" and a["class"] == "none"]
    near = Page(make_page(InstanceReport({"loss": {**values, "none": own - 40}}, 0.95, 100, 0)))
    assert "← off the chart" in near.text
    endless = {**values, "none": own * float("inf")}
    assert "not finite" in Page(make_page(InstanceReport({"loss": endless}, 0.95, 100, 0))).text


def test_axis():
    for low, high in ((0.0, 1.0), (0.26, 0.41), (-3.2, 1e4), (0.5, 0.5 + 1e-6)):
        ticks = nice_ticks(low, high)
        assert 2 <= len(ticks) <= 6 and all(low < tick < high for tick in ticks)
    flat = {name: {"mean": 0.0, "low": 0.0, "high": 0.0} for name in ("own", "shuffled", "mean", "none")}
    low, high = axis_ends(flat)
    assert low < 0 < high and nice_ticks(low, high)


def test_frame_holds_the_page():
    report = make_report(readings=[nasty_reading()])
    ((tag, attributes),) = Page(make_frame(report)).tags
    assert tag == "iframe" and attributes["srcdoc"] == make_page(report) == html.unescape(
        html.escape(make_page(report))
    )


# ------------------------------------------------------------------------------------------------------------ the texts


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
