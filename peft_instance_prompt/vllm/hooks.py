# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Write a plan's prompt vectors and edits into the inputs of an engine's layers.

A [`Writer`] hooks the layers for as long as adapters are loaded. In a step without a plan, such as one that only decodes, its hooks
return at once; compiled code and CUDA graphs hold none of them.

Shapes: T rows of the flat batch, d the width of the layers, G instances, l prompt vectors each (edits: n), K rows to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .adapters import no_pass
from .package import INPUT, Source, forward_args
from .package import write as write_rows
from .plan import Plan, Rows


class Writer:
    """The hooks of a model.

    Args:
        layers (`Sequence[nn.Module]`): The model's layers, in order.

    Attributes:
        plan (`Plan`): What the current step writes.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.plan = Plan()
        self._handles = [
            layer.register_forward_pre_hook(partial(self._fill, depth), with_kwargs=True)
            for depth, layer in enumerate(layers)
        ]

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()

    def close(self) -> Plan:
        """End a step. Returns its plan, whose failures are the requests whose answers must not leave the engine, and why."""
        plan, self.plan = self.plan, Plan()
        plan.close()
        return plan

    def _fill(self, depth: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not self.plan.rows:
            return
        call = {**dict(zip(forward_args(layer), args)), **kwargs}
        hidden, residual = (flat(call.get(name)) for name in ("hidden_states", "residual"))
        assert hidden is not None  # the layers were chosen by it
        for rows in self.plan.rows:
            if depth == 0:
                encode(rows, hidden)
                write(rows, INPUT, hidden, residual)
            write(rows, depth, hidden, residual)


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
    """Write the vectors or edits of one depth into a layer's input (T, d), which is `hidden + residual` where there is a residual."""
    model = rows.group.model
    if depth not in model.depths:
        return
    states = hidden if residual is None else hidden + residual  # (T, d)
    values = rows.group.run(states[None], depth, rows.selection, None)  # (G, l, d)
    values = values[rows.instance, rows.vector].to(hidden.dtype)  # (K, d)
    put(hidden, residual, rows.rows, values, states if model.adds_at(depth) else None)
    rows.written.append(depth)


def put(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    values: torch.Tensor,
    onto: torch.Tensor | None,
) -> None:
    """Make `values` (K, d) the input of a layer at `rows` (K,), or what is added to the states `onto` (T, d) there."""
    # The whole input stands in `hidden`: added to a residual in half precision, it would be rounded twice.
    write_rows(hidden, rows, values if onto is None else onto[rows] + values, in_place=True)
    if residual is not None:
        residual.index_fill_(0, rows, 0)
