# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of what an adapter does, one function each. They need matplotlib, which is imported when the first one is drawn:
`pip install peft-instance-prompt[plots]`.

Each takes `theme`, `"light"` (the default) or `"dark"`, and `ax`, matplotlib axes to draw into instead of a new figure. Each returns
the `Figure` that it drew into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..nn.rational import rational
from ..nn.ridge import leave_one_out
from .inspection import active_generator, check_depth, generated_parts, placements, readings
from .report import PROMPTS, InstanceReport
from .themes import Theme, check_theme


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_report(report: InstanceReport, measure: str = "loss", theme: str = "light", ax: Axes | None = None) -> Figure:
    """The paired differences between own and shuffled or mean prompts, with their intervals.

    Args:
        report (`InstanceReport`): The result of [`instance_report`].
        measure (`str`): One of the report's measures. Defaults to `"loss"`.

    Raises:
        ValueError: The report has no such measure.
    """
    colours, summary = check_theme(theme), report.summary()
    if measure not in summary:
        raise ValueError(f"`measure` must be one of {list(summary)}, got {measure!r}.")
    figure, ax = new_axes(ax, width=4.6, height=1.9)
    names = [f"own - {prompts}" for prompts in PROMPTS[1:3]]
    for place, name in enumerate(names):
        found = summary[measure][name]
        ax.plot([found["low"], found["high"]], [place, place], color=colours.series[0], linewidth=3)
        ax.plot(found["mean"], place, "o", color=colours.series[0], markersize=8)
    ax.axvline(0, color=colours.soft, linewidth=1, linestyle="--")
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"difference in {measure} ({report.level:.0%} interval)")
    ax.locator_params(axis="x", nbins=4)
    ax.set_title(f"Is its own prompt better?  n = {len(report)}")
    return dress(ax, colours)


def plot_reading(
    model: nn.Module,
    batch: Mapping[str, Any],
    tokens: Any,
    depth: int | None = None,
    row: int = 0,
    theme: str = "light",
    ax: Axes | None = None,
) -> Figure:
    """A heat map: each instruction token's share in each prompt vector, over its share in a uniform reading.

    Args:
        model (`nn.Module`): The model with the adapter, e.g. a [`~peft.PeftModel`].
        batch (`Mapping`): The arguments of the model's forward, `input_ids` among them.
        tokens (tokenizer or `Sequence[str]`): A tokenizer that decodes the ids, or the text of each column of the row.
        depth (`int`, *optional*): The layer. Defaults to the middle of the layers at which vectors are generated.
        row (`int`): The row of the batch. Defaults to 0.

    Raises:
        ValueError: The method's prompt vectors are no weighted means over tokens, or `tokens` does not fit the batch.
    """
    colours, generator = check_theme(theme), active_generator(model)[1]
    depth, columns = check_depth(generator, depth), batch["input_ids"].shape[1]
    decodes = hasattr(tokens, "decode")
    if not decodes and len(tokens) != columns:
        raise ValueError(f"`tokens` must have one text per column, {columns}, got {len(tokens)}.")
    reading = readings(model, batch, tokens if decodes else None)[row]
    if depth not in reading.weights:
        raise ValueError(f"The prompt vectors of {type(generator).__name__} are no weighted means over tokens here.")
    ratios, read = reading.ratios(depth)[:, reading.inside], reading.tokens_read(depth)  # (l, n), (l,)
    texts = reading.tokens if decodes else [tokens[column] for column in reading.columns]
    texts = [_visible(text) for text, inside in zip(texts, reading.inside) if inside]
    figure, ax = new_axes(ax, width=max(3.4, 0.32 * len(texts) + 1.8), height=0.34 * len(ratios) + 1.7)
    scale, colour_map, ticks = reading_colours(colours)
    image = ax.imshow(ratios, aspect="auto", cmap=colour_map, norm=scale)
    ax.set_xticks(range(len(texts)), texts, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(ratios)), [f"{n} (reads {count:.1f})" for n, count in enumerate(read.tolist(), 1)])
    ax.set_ylabel("prompt vector")
    ax.set_title(f"What each prompt vector reads of {len(texts)} tokens, {_place(depth)}")
    bar = ax.figure.colorbar(image, ax=ax, label="share / uniform share", ticks=list(ticks), extend="both")
    bar.ax.set_yticklabels([f"×{tick:g}" for tick in ticks])
    bar.ax.minorticks_off()  # a logarithmic scale labels them, too
    dress(bar.ax, colours)
    return dress(ax, colours)


def plot_tokens_read(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], theme: str = "light", ax: Axes | None = None
) -> Figure:
    """A line for each prompt vector: the share of the text that it reads at each layer, the mean over instances.

    The share is the number of tokens read (see [`Reading.tokens_read`]) over the number of tokens: 1 in a uniform reading.

    Args:
        model (`nn.Module`): The model with the adapter.
        batches (`Iterable`): Batches, e.g. a `DataLoader`.

    Raises:
        ValueError: The method's prompt vectors are no weighted means over tokens.
    """
    colours, generator = check_theme(theme), active_generator(model)[1]
    found = [reading for batch in batches for reading in readings(model, batch, None)]
    depths = list(found[0].weights)
    if not depths:
        raise ValueError(f"The prompt vectors of {type(generator).__name__} are no weighted means over tokens here.")
    shares = [torch.stack([r.tokens_read(depth) / r.inside.sum() for r in found]).mean(dim=0) for depth in depths]
    figure, ax = new_axes(ax, width=4.6, height=3.0)
    for number, line in enumerate(torch.stack(shares, dim=1)):  # (l, depths)
        colour = colours.series[number % len(colours.series)]
        ax.plot(depths, line, color=colour, marker="o", markersize=3, linewidth=1.5, label=f"vector {number + 1}")
    ax.set(ylim=(0, 1.05), xlabel="layer", ylabel="share of the tokens read")
    ax.set_title(f"How much of a text is read, mean of {len(found)}")
    ax.legend(frameon=False)
    return dress(ax, colours)


def plot_activations(
    model: nn.Module, span: tuple[float, float] = (-3.0, 3.0), theme: str = "light", ax: Axes | None = None
) -> Figure:
    """The learned activation of each layer, and the GELU that it started as.

    Args:
        model (`nn.Module`): The model with the adapter.
        span (`tuple[float, float]`): The range of inputs. Defaults to -3 to 3.

    Raises:
        ValueError: The adapter has no learned activation.
    """
    colours, generator = check_theme(theme), active_generator(model)[1]
    learned = generator.activation_coefficients  # (layers, 1, 12)
    if learned is None:
        raise ValueError(f"{type(generator).__name__} has no learned activation here.")
    figure, ax = new_axes(ax, width=4.6, height=3.4)
    x = torch.linspace(*span, 200)
    for number, (coefficients, colour) in enumerate(zip(learned.detach(), ramp(len(learned), colours))):
        y = rational(x.to(coefficients.device)[None], coefficients)[0].cpu()  # (points,)
        label = f"layer {generator.depths[number]}" if number in (0, len(learned) - 1) else None
        ax.plot(x, y, color=colour, linewidth=1, label=label)
    ax.plot(x, nn.functional.gelu(x), color=colours.ink, linestyle="--", linewidth=1.5, label="GELU, the start")
    ax.set(xlabel="input x", ylabel="activation g(x)", title="Learned activations")
    ax.legend(frameon=False)
    return dress(ax, colours)


def plot_placements(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    what: str = "position",
    theme: str = "light",
    ax: Axes | None = None,
) -> Figure:
    """A histogram over instances: how many of their prompt vectors stand behind the text, or are used.

    Args:
        model (`nn.Module`): The model with the adapter.
        batches (`Iterable`): Batches, e.g. a `DataLoader`.
        what (`str`): `"position"`, the default, the number of vectors behind the text; or `"length"`, the number of used vectors.

    Raises:
        ValueError: `what` is neither.
    """
    labels = {"position": "prompt vectors behind the text", "length": "prompt vectors in use"}
    colours = check_theme(theme)
    if what not in labels:
        raise ValueError(f"`what` must be one of {list(labels)}, got {what!r}.")
    lengths, behind = placements(model, batches)
    counts = torch.bincount(
        lengths if what == "length" else behind, minlength=active_generator(model)[1].num_slots + 1
    )
    figure, ax = new_axes(ax, width=4.6, height=3.0)
    ax.bar(range(len(counts)), counts, color=colours.series[0])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel=labels[what], ylabel="instances")
    return dress(ax, colours)


def plot_prompt_map(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    labels: Sequence[Any] | None = None,
    depth: int | None = None,
    theme: str = "light",
    ax: Axes | None = None,
) -> Figure:
    """A scatter plot of many instances: the two principal components of the generated parts of their prompts ([`generated_parts`]).

    Args:
        model (`nn.Module`): The model with the adapter.
        batches (`Iterable`): Batches, e.g. a `DataLoader`.
        labels (`Sequence`, *optional*): A label for each instance, shown as its colour.
        depth (`int`, *optional*): The layer. Defaults to the middle of the layers at which vectors are generated.

    Raises:
        ValueError: There are fewer than 3 instances, or not as many labels as instances.
    """
    colours, depth = check_theme(theme), check_depth(active_generator(model)[1], depth)
    points = generated_parts(model, batches, [depth])[depth].flatten(1)  # (n, l * d)
    groups = _groups(labels, len(points)) or [""] * len(points)
    if len(points) < 3:
        raise ValueError(f"A map needs at least 3 instances, got {len(points)}.")
    points = points - points.mean(dim=0)
    u, s, _ = torch.linalg.svd(points, full_matrices=False)
    share = s**2 / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny)
    places = (u * s)[:, :2]  # (n, 2)
    figure, ax = new_axes(ax, width=4.6, height=3.6)
    for number, group in enumerate(sorted(set(groups))):
        own = places[[label == group for label in groups]]  # (instances of the group, 2)
        colour, mark = colours.series[number % len(colours.series)], "osD^vP"[number % 6]
        ax.scatter(*own.T, s=16, marker=mark, alpha=0.75, color=colour, linewidths=0, label=group)
    ax.set(xlabel=f"component 1 ({share[0]:.0%} of the variance)", ylabel=f"component 2 ({share[1]:.0%})")
    ax.set_title(f"Generated parts of {len(points)} prompts, {_place(depth)}")
    if labels is not None:
        ax.legend(frameon=False)
    return dress(ax, colours)


def plot_separation(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    labels: Sequence[Any],
    theme: str = "light",
    ax: Axes | None = None,
) -> Figure:
    """The accuracy, layer by layer, of a linear classifier that reads the generated part of an instance's prompt.

    The classifier (ridge regression on the classes, see [`leave_one_out`]) is fitted on all other instances. A dashed line shows the
    accuracy without reading the prompt, the share of the commonest label.

    Args:
        model (`nn.Module`): The model with the adapter.
        batches (`Iterable`): Batches, e.g. a `DataLoader`.
        labels (`Sequence`): A label for each instance.

    Raises:
        ValueError: There are not as many labels as instances.
    """
    colours = check_theme(theme)
    parts = generated_parts(model, batches)
    groups = _groups(labels, len(next(iter(parts.values()))))
    names = sorted(set(groups))
    targets = torch.tensor([names.index(group) for group in groups])  # (n,)
    one_hot = nn.functional.one_hot(targets, len(names))  # (n, classes)
    right = {
        depth: (leave_one_out(part.flatten(1), one_hot).argmax(dim=1) == targets).double().mean().item()
        for depth, part in parts.items()
    }
    commonest = one_hot.double().mean(dim=0).max().item()
    figure, ax = new_axes(ax, width=4.6, height=3.0)
    ax.plot(list(right), list(right.values()), color=colours.series[0], marker="o", markersize=4, linewidth=1.5)
    ax.axhline(commonest, color=colours.soft, linestyle="--", linewidth=1)
    ax.annotate(
        "commonest label",
        (0.99, commonest),
        xycoords=("axes fraction", "data"),
        color=colours.soft,
        ha="right",
        va="bottom",
    )
    ax.set(ylim=(min(0.5, commonest - 0.1), 1.02), xlabel="layer", ylabel="accuracy, left-out instance")
    ax.set_title(f"The label, told from the prompt alone, n = {len(groups)}")
    return dress(ax, colours)


def _groups(labels: Sequence[Any] | None, number: int) -> list[str]:
    if labels is not None and len(labels) != number:
        raise ValueError(f"`labels` must have one entry per instance, {number}, got {len(labels)}.")
    return [] if labels is None else [str(label) for label in labels]


def _place(depth: int) -> str:
    return "at the input" if depth < 0 else f"layer {depth}"


def _visible(token: str) -> str:
    """A token as a label of a column. The dollar sign is escaped, since it would begin a formula."""
    return token.strip(" ").replace("\n", "↵").replace("$", r"\$") or "␣"


# ------------------------------------------------------------------------------------------- what the pictures share


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
    """Give everything around the data a theme's colours, after drawing; axes that the caller gave, too."""
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
    """As many colours in an order, such as that of the layers."""
    from matplotlib import colormaps

    low, high = theme.ramp
    return [colormaps["viridis"](low + (high - low) * n / max(number - 1, 1)) for n in range(number)]


def reading_colours(theme: Theme) -> tuple[Any, Any, tuple[float, ...]]:
    """Scale, colours and ticks for shares over the uniform share: logarithmic, with the background's colour at 1."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    ticks = (0.125, 0.25, 0.5, 1, 2, 4, 8)
    ends = [theme.less, theme.paper, theme.more]
    colours = LinearSegmentedColormap.from_list("reading", ends, N=257)  # an odd number has a middle
    bad = theme.less  # a share of 0 has no logarithm
    return LogNorm(vmin=ticks[0], vmax=ticks[-1]), colours.with_extremes(bad=bad), ticks
