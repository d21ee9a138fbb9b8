# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Write a plan's prompt vectors into the inputs of an engine's layers.

The hooks exist only while a step with a plan runs: decoding is the bare engine's, and compiled graphs hold no hooks.

Shapes: T rows of the flat batch, d the width of the layers, G instances, l prompt vectors each, K slots in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..engine.calls import forward_args
from ..generator import INPUT, Source
from .adapters import no_pass
from .plan import Rows


@contextmanager
def filled(layers: Sequence[nn.Module], plan: list[Rows]) -> Iterator[None]:
    """Fill the plan's slots while the layers run inside the block.

    Args:
        layers (`Sequence[nn.Module]`): The model's layers, in order.
        plan (`list[Rows]`): The plan.

    Raises:
        RuntimeError: At the end of the block, if vectors were not written: an answer without its prompt must not leave the engine.
    """
    handles = [
        layer.register_forward_pre_hook(Fill(depth, plan), with_kwargs=True) for depth, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for rows in plan:
        if tuple(rows.written) != rows.group.model.depths:
            raise RuntimeError(
                f"Prompt vectors were due at {rows.group.model.depths} and were written at {rows.written}."
            )


class Fill:
    """The forward pre-hook of a layer.

    Args:
        depth (`int`): The layer's number.
        plan (`list[Rows]`): The plan.
    """

    def __init__(self, depth: int, plan: list[Rows]):
        self.depth = depth
        self.plan = plan

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = {**dict(zip(forward_args(layer), args)), **kwargs}
        hidden, residual = (flat(call.get(name)) for name in ("hidden_states", "residual"))
        assert hidden is not None  # the layers were chosen by it
        for rows in self.plan:
            if self.depth == 0:
                encode(rows, hidden)
                write(rows, INPUT, hidden, residual)
            write(rows, self.depth, hidden, residual)


def flat(states: torch.Tensor | None) -> torch.Tensor | None:
    """A view of the states as (T, d): layers of the transformers backend take (1, T, d)."""
    return None if states is None else states.view(-1, states.shape[-1])  # (T, d)


def encode(rows: Rows, embeds: torch.Tensor) -> None:
    """Set the group's vector to the output of its adapters' `encode`, from the input embeddings (T, d)."""
    vectors: list[Any] = []
    for generator, own in rows.group:
        selection = rows.selection.pick(own)
        ids = rows.token_ids if own is None else rows.token_ids[own]  # (G, n)
        source = Source(ids, selection.take(embeds[None]), selection.mask, None, no_pass)
        vectors.append(generator.encode(source))
    rows.group.vector = None if vectors[0] is None else torch.cat(vectors)  # (G, ...)


def write(rows: Rows, depth: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
    """Write the vectors of one depth into a layer's input (T, d), which is `hidden + residual` where there is a residual."""
    model = rows.group.model
    if depth not in model.depths:
        return
    states = hidden if residual is None else hidden + residual  # (T, d)
    prompts = rows.group.run(states[None], depth, rows.selection, None)  # (G, l, d)
    prompts = prompts[rows.instance, rows.vector].to(hidden.dtype)  # (K, d)
    if model.adds_at(depth):
        hidden.index_add_(0, rows.rows, prompts)
    else:
        hidden.index_copy_(0, rows.rows, prompts)
        if residual is not None:
            residual.index_fill_(0, rows.rows, 0)
    rows.written.append(depth)
