# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of what an adapter does. They need matplotlib: `pip install peft-instance-prompt[plots]`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..nn.rational import rational
from .inspection import active_generator, check_depth, placements, prompt_vectors, token_weights


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_reading(
    model: nn.Module,
    batch: Mapping[str, Any],
    tokens: Any,
    depth: int | None = None,
    row: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """Which instruction tokens each prompt vector reads, as a heat map over the text.

    Args:
        model (`nn.Module`): The model with the adapter, e.g. a [`~peft.PeftModel`].
        batch (`Mapping`): What the model is called with, `input_ids` among it.
        tokens (`Sequence[str]` or tokenizer): The text of each column of the row, or a tokenizer to turn its ids into text.
        depth (`int`, *optional*): The layer. Defaults to the middle one of those at which vectors are generated.
        row (`int`): The row of the batch. Defaults to 0.
        ax (`Axes`, *optional*): Where to draw. Defaults to a new figure.

    Returns:
        `Figure`: The figure that it was drawn in.

    Raises:
        ValueError: The method does not pool over tokens, or `tokens` does not fit the batch.
    """
    depth = check_depth(active_generator(model)[1], depth)
    weights = token_weights(model, batch, depth)[row]  # (l, S)
    if hasattr(tokens, "decode"):
        tokens = [tokens.decode([int(token)]) for token in batch["input_ids"][row]]
    if len(tokens) != weights.shape[1]:
        raise ValueError(f"`tokens` must have one text per column, {weights.shape[1]}, got {len(tokens)}.")
    if batch.get("attention_mask") is not None:
        kept = batch["attention_mask"][row].bool().cpu()
        weights, tokens = weights[:, kept], [token for token, keep in zip(tokens, kept) if keep]  # (l, tokens)
    figure, ax = _axes(ax, width=max(3.0, 0.32 * len(tokens) + 1.4), height=0.34 * len(weights) + 1.7)
    image = ax.imshow(weights, aspect="auto", cmap="Blues", vmin=0.0)
    ax.set_xticks(
        range(len(tokens)), [_visible(token) for token in tokens], rotation=60, ha="right", rotation_mode="anchor"
    )
    ax.set_yticks(range(len(weights)), range(1, len(weights) + 1))
    ax.set_ylabel("prompt vector")
    ax.set_title("what each prompt vector reads, " + _place(depth))
    figure.colorbar(image, ax=ax, label="weight")
    return figure


def plot_activations(model: nn.Module, span: tuple[float, float] = (-3.0, 3.0), ax: Axes | None = None) -> Figure:
    """The learned activation of each layer, and the GELU that it started from.

    Args:
        model (`nn.Module`): The model with the adapter.
        span (`tuple[float, float]`): The range of inputs.
        ax (`Axes`, *optional*): Where to draw. Defaults to a new figure.

    Returns:
        `Figure`: The figure that it was drawn in.

    Raises:
        ValueError: The adapter has no learned activation.
    """
    generator = active_generator(model)[1]
    learned = generator.activation_coefficients  # (layers, 1, 12)
    if learned is None:
        raise ValueError(f"{type(generator).__name__} has no learned activation here.")
    figure, ax = _axes(ax, width=4.6, height=3.4)
    x = torch.linspace(*span, 200)
    colours = _colours(len(learned))
    for number, coefficients in enumerate(learned.detach()):
        y = rational(x.to(coefficients.device)[None], coefficients)[0].cpu()  # (points,)
        label = f"layer {generator.depths[number]}" if number in (0, len(learned) - 1) else None
        ax.plot(x, y, color=colours[number], linewidth=1, label=label)
    ax.plot(x, nn.functional.gelu(x), color="black", linestyle="--", linewidth=1, label="GELU")
    ax.set(xlabel="x", ylabel="g(x)", title="learned activations")
    ax.legend()
    return figure


def plot_placements(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], what: str = "position", ax: Axes | None = None
) -> Figure:
    """How instances differ in where their prompt vectors stand, or in how many they have, as a histogram.

    Args:
        model (`nn.Module`): The model with the adapter.
        batches (`Iterable`): Batches, e.g. a `DataLoader`.
        what (`str`): `"position"`, how many of its vectors stand behind an instance's text, or `"length"`, how many it has.
        ax (`Axes`, *optional*): Where to draw. Defaults to a new figure.

    Returns:
        `Figure`: The figure that it was drawn in.
    """
    labels = {"position": "prompt vectors behind the text", "length": "prompt vectors in use"}
    if what not in labels:
        raise ValueError(f"`what` must be one of {list(labels)}, got {what!r}.")
    lengths, behind = placements(model, batches)
    counts = torch.bincount(
        lengths if what == "length" else behind, minlength=active_generator(model)[1].num_slots + 1
    )
    figure, ax = _axes(ax, width=4.6, height=3.0)
    ax.bar(range(len(counts)), counts)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel=labels[what], ylabel="instances")
    return figure


def plot_prompt_map(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    labels: Sequence[Any] | None = None,
    depth: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The prompts of many instances, by their two principal components.

    Args:
        model (`nn.Module`): The model with the adapter.
        batches (`Iterable`): Batches, e.g. a `DataLoader`.
        labels (`Sequence`, *optional*): One for each instance, for the colours.
        depth (`int`, *optional*): The layer. Defaults to the middle one of those at which vectors are generated.
        ax (`Axes`, *optional*): Where to draw. Defaults to a new figure.

    Returns:
        `Figure`: The figure that it was drawn in.
    """
    depth = check_depth(active_generator(model)[1], depth)
    points = prompt_vectors(model, batches, depth).flatten(1)  # (n, l * d)
    if labels is not None and len(labels) != len(points):
        raise ValueError(f"`labels` must have one entry per instance, {len(points)}, got {len(labels)}.")
    if len(points) < 3:
        raise ValueError(f"A map needs at least 3 instances, got {len(points)}.")
    points = points - points.mean(dim=0)
    u, s, _ = torch.pca_lowrank(points, q=2, center=False)
    share = s**2 / points.square().sum().clamp(min=torch.finfo(s.dtype).tiny)
    places = u * s  # (n, 2)
    figure, ax = _axes(ax, width=4.6, height=3.6)
    groups = [None] * len(points) if labels is None else [str(label) for label in labels]
    for colour, group in zip(_colours(len(set(groups)), "tab10"), sorted(set(groups), key=str)):
        own = places[[label == group for label in groups]]  # (instances of the group, 2)
        ax.scatter(*own.T, s=12, alpha=0.7, color=colour, label=group)
    ax.set(xlabel=f"component 1 ({share[0]:.0%})", ylabel=f"component 2 ({share[1]:.0%})")
    ax.set_title("prompts of the instances, " + _place(depth))
    if labels is not None:
        ax.legend()
    return figure


def _axes(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install peft-instance-prompt[plots]`.") from error
    figure = Figure(figsize=(width, height), layout="constrained")  # not pyplot's, which keeps every figure alive
    return figure, figure.subplots()


def _colours(number: int, name: str = "viridis") -> list:
    from matplotlib import colormaps

    colours = colormaps[name]
    if name == "viridis":
        return [colours(i / max(number - 1, 1)) for i in range(number)]
    return [colours(i % colours.N) for i in range(number)]


def _place(depth: int) -> str:
    return "at the input" if depth < 0 else f"layer {depth}"


def _visible(token: str) -> str:
    """A token as it can be read below a column; a dollar sign would begin a formula."""
    return token.strip(" ").replace("\n", "↵").replace("$", r"\$") or "␣"
