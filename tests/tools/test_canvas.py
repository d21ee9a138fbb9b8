# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What all pictures share: the theme's colours around the data, in axes of our own and of the caller's."""

from __future__ import annotations

from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from peft_instance_prompt.tools.canvas import dress, new_axes, ramp, reading_colours
from peft_instance_prompt.tools.themes import THEMES


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
