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
from matplotlib.figure import Figure
from methods import METHODS
from peft import get_peft_model

from peft_instance_prompt.tools import plots
from peft_instance_prompt.tools.inspection import active_generator, placements, prompt_vectors, token_weights
from peft_instance_prompt.tools.plots import plot_activations, plot_placements, plot_prompt_map, plot_reading


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
    model = adapted()
    batch = {**BATCHES[0], "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 4)}
    figure = drawn(plot_reading(model, batch, ["<pad>", "<pad>", "A", " fine", "\n", "$1", " "], depth=2, row=1))
    (image,) = figure.axes[0].images
    assert torch.equal(torch.tensor(image.get_array()), token_weights(model, batch, depth=2)[1][:, 2:])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["A", "fine", "↵", r"\$1", "␣"]

    class Tokenizer:
        def decode(self, ids):
            return f"w{ids[0]}"

    figure = plot_reading(model, BATCHES[0], Tokenizer())
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == [f"w{token}" for token in BATCHES[0]["input_ids"][0].tolist()]
    drawn(plot_reading(adapted("lpt_pooled"), BATCHES[0], Tokenizer()))
    with pytest.raises(ValueError, match="`tokens`"):
        plot_reading(model, BATCHES[0], ["A"])


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
    """Distances in the plane are those of the prompts, as far as two components hold them: here, all of it."""
    model = adapted(bottleneck_dim=1, num_virtual_tokens=2, condition="instance")
    three = [{"input_ids": BATCHES[0]["input_ids"][:3]}]  # three points lie in a plane
    figure = drawn(plot_prompt_map(model, three, labels=["good", "bad", "good"], depth=1))
    bad, good = figure.axes[0].collections
    places = torch.tensor([good.get_offsets()[0], bad.get_offsets()[0], good.get_offsets()[1]], dtype=torch.float)
    torch.testing.assert_close(
        torch.pdist(places), torch.pdist(prompt_vectors(model, three, 1).flatten(1)), rtol=1e-2, atol=1e-3
    )
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["bad", "good"]
    drawn(plot_prompt_map(model, BATCHES))
    with pytest.raises(ValueError, match="`labels`"):
        plot_prompt_map(model, three, labels=["good"])


def test_given_axes_are_drawn_into():
    figure = Figure(figsize=(8, 8))
    axes = figure.subplots(2, 2).flat
    model = adapted()
    tokens = [str(n) for n in range(7)]
    assert plot_reading(model, BATCHES[0], tokens, ax=axes[0]) is figure
    assert plot_activations(model, ax=axes[1]) is figure
    assert plot_placements(model, BATCHES, ax=axes[2]) is figure
    assert plot_prompt_map(model, BATCHES, ax=axes[3]) is figure
    drawn(figure)
    assert axes[0].images and axes[1].lines and axes[2].patches and axes[3].collections


def test_without_matplotlib(monkeypatch):
    """The module can be imported without it; a plot says what to install."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(plots)
    with pytest.raises(ImportError, match=r"pip install peft-instance-prompt\[plots\]"):
        plots.plot_activations(adapted())
