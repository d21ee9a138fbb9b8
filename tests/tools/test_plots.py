# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The pictures show the numbers that they are said to show."""

from __future__ import annotations

import importlib
import sys

import matplotlib
import pytest
import tiny
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from methods import METHODS
from peft import get_peft_model

from peft_instance_prompt.tools import plots
from peft_instance_prompt.tools.inspection import active_generator, generated_parts, placements, token_weights
from peft_instance_prompt.tools.plots import (
    dress,
    new_axes,
    plot_activations,
    plot_placements,
    plot_prompt_map,
    plot_reading,
    plot_report,
    plot_separation,
    plot_tokens_read,
    ramp,
    reading_colours,
)
from peft_instance_prompt.tools.report import InstanceReport
from peft_instance_prompt.tools.themes import THEMES


matplotlib.use("agg")

BATCHES = [
    {"input_ids": torch.randint(3, tiny.VOCAB, (4, 7), generator=torch.Generator().manual_seed(n))} for n in (0, 1)
]


def adapted(method: str = "iapt", **changes):
    return get_peft_model(
        tiny.causal_lm(), METHODS[method](task_type="CAUSAL_LM", init_weights=False, **changes)
    ).eval()


def drawn(figure: Figure) -> Figure:
    figure.canvas.draw()  # whatever cannot be drawn fails here
    return figure


def test_reading():
    """Over the instruction's tokens, the share of each in units of that of a uniform reading."""
    model = adapted()
    batch = {**BATCHES[0], "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 4)}
    batch["instruction_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 0]] * 4)
    figure = drawn(plot_reading(model, batch, ["<pad>", "<pad>", "A", " fine", "\n", "$1", " yes"], depth=2, row=1))
    (image,) = figure.axes[0].images
    weights = token_weights(model, batch, depth=2)[1]  # (l, 7)
    torch.testing.assert_close(torch.tensor(image.get_array()), 4 * weights[:, 2:6])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["A", "fine", "↵", r"\$1"]
    read = [2 ** -(row[2:6] * row[2:6].log2()).sum().item() for row in weights]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        f"{n} (reads {count:.1f})" for n, count in enumerate(read, 1)
    ]

    class Tokenizer:
        def decode(self, ids):
            return " ".join(f"w{token}" for token in ids)

    figure = plot_reading(model, BATCHES[0], Tokenizer())
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == [f"w{token}" for token in BATCHES[0]["input_ids"][0].tolist()]
    drawn(plot_reading(adapted("lpt_pooled"), BATCHES[0], Tokenizer()))
    with pytest.raises(ValueError, match="`tokens`"):
        plot_reading(model, BATCHES[0], ["A"])
    with pytest.raises(ValueError, match="no weighted means"):
        plot_reading(adapted("idpg_single"), BATCHES[0], Tokenizer())


def test_tokens_read():
    """The mean over instances of the exponential of the entropy, per token."""
    model = adapted()
    lines = drawn(plot_tokens_read(model, BATCHES)).axes[0].lines
    assert len(lines) == 4
    for depth in range(3):
        weights = torch.cat([token_weights(model, batch, depth) for batch in BATCHES])  # (8, l, 7)
        wanted = (-(weights * weights.log()).sum(dim=-1)).exp().mean(dim=0) / 7  # (l,)
        assert [line.get_ydata()[depth] for line in lines] == pytest.approx(wanted.tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="no weighted means"):
        plot_tokens_read(adapted("idpg_single"), BATCHES)


def test_activations():
    model = adapted()
    coefficients = active_generator(model)[1].activation[1, 0]  # (12,)
    with torch.no_grad():
        coefficients[1] = 2.0
    lines = drawn(plot_activations(model, span=(-1, 1))).axes[0].lines
    assert len(lines) == 4
    x, y = (torch.as_tensor(values, dtype=torch.float) for values in lines[1].get_data())
    numerator = sum(a * x**j for j, a in enumerate(coefficients[:7].tolist()))
    denominator = 1 + sum(b * x**i for i, b in enumerate(coefficients[7:].tolist(), 1)).abs()
    torch.testing.assert_close(y, numerator / denominator, atol=1e-5, rtol=1e-4)
    for other in (adapted(activation="relu"), adapted("lpt")):
        with pytest.raises(ValueError, match="no learned activation"):
            plot_activations(other)


@pytest.mark.parametrize("what", ["position", "length"])
def test_placements(what):
    model = adapted("dynamic_prompt_all")
    bars = drawn(plot_placements(model, BATCHES, what)).axes[0].patches
    lengths, behind = placements(model, BATCHES)
    wanted = torch.bincount(lengths if what == "length" else behind, minlength=len(bars))
    assert [bar.get_height() for bar in bars] == wanted.tolist() and wanted.sum() == 8
    with pytest.raises(ValueError, match="`what`"):
        plot_placements(model, BATCHES, "width")


def test_prompt_map():
    """Distances in the plane are those of the generated parts, as far as two components hold them: here, all of it."""
    model = adapted(bottleneck_dim=1, num_virtual_tokens=2, condition="instance")
    three = [{"input_ids": BATCHES[0]["input_ids"][:3]}]  # three points lie in a plane
    figure = drawn(plot_prompt_map(model, three, labels=["good", "bad", "good"], depth=1))
    bad, good = figure.axes[0].collections
    places = torch.tensor([good.get_offsets()[0], bad.get_offsets()[0], good.get_offsets()[1]], dtype=torch.float)
    torch.testing.assert_close(
        torch.pdist(places), torch.pdist(generated_parts(model, three, [1])[1].flatten(1)), rtol=1e-2, atol=1e-3
    )
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["bad", "good"]
    drawn(plot_prompt_map(model, BATCHES))
    with pytest.raises(ValueError, match="`labels`"):
        plot_prompt_map(model, three, labels=["good"])


def test_separation(monkeypatch):
    """At each layer the share of instances whose label the others tell, where only one layer's parts know it."""
    labels = ["good", "bad", "good", "good"] * 5
    known = torch.tensor([label == "good" for label in labels]).float()[:, None, None]  # (20, 1, 1)
    noise = torch.randn(20, 4, 32)
    monkeypatch.setattr(plots, "generated_parts", lambda model, batches: {0: noise, 1: noise + 9 * known})
    figure = drawn(plot_separation(adapted(), BATCHES, labels))
    line, commonest = figure.axes[0].lines
    assert line.get_xdata().tolist() == [0, 1] and line.get_ydata()[1] == 1.0 and line.get_ydata()[0] < 0.9
    assert set(commonest.get_ydata()) == {0.75}
    (note,) = figure.axes[0].texts  # at the line's right end, whatever the layers are
    assert note.xycoords == ("axes fraction", "data") and note.xy == (0.99, 0.75) and note.xyann == note.xy
    monkeypatch.undo()
    drawn(plot_separation(adapted(), BATCHES, [0, 1] * 4))
    with pytest.raises(ValueError, match="`labels`"):
        plot_separation(adapted(), BATCHES, ["good"])


def make_report() -> InstanceReport:
    own = torch.rand(20, dtype=torch.double)
    values = {"own": own, "shuffled": own + torch.rand(20), "mean": own + 0.1, "none": own + 5}
    return InstanceReport({"loss": values}, level=0.9, resamples=50, seed=0)


def test_report():
    report = make_report()
    axes = drawn(plot_report(report)).axes[0]
    found = report.summary()["loss"]["own - shuffled"]
    assert axes.lines[0].get_xdata().tolist() == [found["low"], found["high"]]
    assert list(axes.lines[1].get_xdata()) == [found["mean"]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["own - shuffled", "own - mean"]
    with pytest.raises(ValueError, match="`measure` must be one of .'loss'."):
        plot_report(report, "accuracy")


def all_plots(axes, **kwargs):
    model, tokens = adapted(), [str(n) for n in range(7)]
    return [
        plot_reading(model, BATCHES[0], tokens, ax=axes[0], **kwargs),
        plot_activations(model, ax=axes[1], **kwargs),
        plot_placements(model, BATCHES, ax=axes[2], **kwargs),
        plot_prompt_map(model, BATCHES, ax=axes[3], **kwargs),
        plot_separation(model, BATCHES, [0, 1] * 4, ax=axes[4], **kwargs),
        plot_tokens_read(model, BATCHES, ax=axes[5], **kwargs),
        plot_report(make_report(), ax=axes[6], **kwargs),
    ]


def test_given_axes_are_drawn_into():
    figure = Figure(figsize=(8, 12))
    axes = figure.subplots(4, 2).flatten()
    assert all(made is figure for made in all_plots(axes))
    drawn(figure)
    assert axes[0].images and axes[1].lines and axes[2].patches and axes[3].collections
    assert axes[4].lines and axes[5].lines and axes[6].lines and not axes[7].lines


@pytest.mark.parametrize("theme", THEMES)
def test_light_and_dark(theme):
    for figure in all_plots([None] * 7, theme=theme):
        assert {to_hex(ax.get_facecolor()) for ax in (figure, *figure.axes)} == {THEMES[theme].paper}
        labels = [text for ax in figure.axes for text in (ax.xaxis.label, ax.yaxis.label) if text.get_text()]
        assert labels and {to_hex(label.get_color()) for label in labels} == {THEMES[theme].ink}


def test_unknown_theme_is_refused_by_all():
    with pytest.raises(ValueError, match="`theme`"):
        plot_report(make_report(), theme="sepia")


def test_without_matplotlib(monkeypatch):
    """The module can be imported without it; a plot says what to install."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(plots)
    with pytest.raises(ImportError, match=r"pip install peft-instance-prompt\[plots\]"):
        plots.plot_activations(adapted())


def test_everything_around_the_data_has_the_colours():
    theme = THEMES["dark"]
    figure, ax = new_axes(None, width=3, height=2)
    ax.plot([0, 1], [0, 1], label="a line")
    ax.set(xlabel="x", ylabel="y", title="title")
    ax.legend()
    assert dress(ax, theme) is figure
    figure.canvas.draw()
    texts = [ax.xaxis.label, ax.yaxis.label, ax.title, *ax.get_legend().texts, *ax.get_xticklabels()]
    assert {to_hex(text.get_color()) for text in texts} == {theme.ink}
    assert to_hex(figure.get_facecolor()) == to_hex(ax.get_facecolor()) == theme.paper
    assert [name for name, spine in ax.spines.items() if spine.get_visible()] == ["left", "bottom"]


def test_axes_that_are_given():
    whole = Figure()
    part = whole.subfigures(1, 2)[0]
    ax = part.subplots()
    assert new_axes(ax, width=3, height=2) == (part, ax)
    assert dress(ax, THEMES["dark"]) is part and to_hex(part.get_facecolor()) == THEMES["dark"].paper


def test_colours_of_an_order_and_of_shares():
    for theme in THEMES.values():
        assert len(set(ramp(30, theme))) == 30 and len(ramp(1, theme)) == 1
        scale, colours, ticks = reading_colours(theme)
        assert to_hex(colours(scale(1.0))) == theme.paper
        assert to_hex(colours(scale(ticks[0]))) == theme.less and to_hex(colours(scale(ticks[-1]))) == theme.more
