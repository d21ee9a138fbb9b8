# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the pictures share: figures and colours of matplotlib, which is imported when the first one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .themes import Theme


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_axes(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """The figure and the axes to draw into; new ones, `width` and `height` inches, if `ax` is None.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install peft-instance-prompt[plots]`.") from error
    figure = Figure(figsize=(width, height), layout="constrained")  # not pyplot's, which keeps every figure alive
    return figure, figure.subplots()


def dress(ax: Axes, theme: Theme) -> Figure:
    """Give everything around the data a theme's colours. After drawing: axes of the caller's are dressed as well."""
    ax.figure.set_facecolor(theme.paper)
    ax.set_facecolor(theme.paper)
    ax.tick_params(which="both", color=theme.line, labelcolor=theme.ink)
    for name, spine in ax.spines.items():
        spine.set_color(theme.line)
        if name in ("top", "right"):
            spine.set_visible(False)
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set_color(theme.ink)
    ax.title.set_fontsize("medium")
    for text in getattr(ax.get_legend(), "texts", ()):
        text.set_color(theme.ink)
    return ax.figure


def ramp(number: int, theme: Theme) -> list:
    """Colours of an order, such as the layers'."""
    from matplotlib import colormaps

    low, high = theme.ramp
    return [colormaps["viridis"](low + (high - low) * n / max(number - 1, 1)) for n in range(number)]


def reading_colours(theme: Theme) -> tuple[Any, Any, tuple[float, ...]]:
    """The scale, its colours and ticks for shares over the uniform share: logarithmic, and 1 has the background's colour."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    ticks = (0.125, 0.25, 0.5, 1, 2, 4, 8)
    colours = LinearSegmentedColormap.from_list(
        "reading", [theme.less, theme.paper, theme.more], N=257
    )  # has a middle
    bad = theme.less  # a share of 0 has no logarithm
    return LogNorm(vmin=ticks[0], vmax=ticks[-1]), colours.with_extremes(bad=bad), ticks
