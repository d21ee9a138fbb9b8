# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Before a layer runs: write this depth's vectors into the slots, and hide those that the layer does not see yet."""

from __future__ import annotations

import torch

from .batch import put
from .cache import length
from .calls import LayerCall
from .layout import fill, take
from .masks import hide
from .passes import Pass
from .stack import StackInfo


def fill_slots(running: Pass, info: StackInfo, depths: range, call: LayerCall) -> LayerCall | None:
    """The call of a layer with the slots filled; None if it stays as it is.

    Args:
        running (`Pass`): The pass.
        info (`StackInfo`): Facts about the stack.
        depths (`range`): The depths of the layer: more than one where it is run several times.
        call (`LayerCall`): The call of the layer.
    """
    layout, table, key = running.layout, running.table, id(call.layer)
    if table is None or (layout is None and not table.late_layers):
        return None
    run = running.runs[key] = running.runs.get(key, -1) + 1
    depth = depths[run % len(depths)] if len(depths) > 1 else depths[0]  # a count recompiles the graph
    states = call.states  # (B, N, d)
    late = table.late_layers
    groups = [group for group in running.groups if depth in group.model.depths]
    if (groups or late) and layout is not None and states.shape[:2] != layout.order.shape:
        raise ValueError(
            f"The layers of {info.name!r} take states of shape {tuple(states.shape)} and not (rows, positions, width): "
            "prompts cannot be written between them. Use a method that writes to the input only."
        )
    if late and (depth < late[-1] or running.attention.startswith("flash_attention")):
        call = hide_late_slots(running, info, depth, call)
    for group in groups:
        assert layout is not None and group.selection is not None  # the pass opened the slots of its groups
        prompts = group.run(states, depth, group.selection, layout)  # (G, l, d)
        if group.rows is not None:
            standing = take(states, layout.slot_index)  # (B, L, d)
            standing = torch.zeros_like(standing) if group.model.adds else standing
            prompts = put(standing, group.rows, prompts)  # (B, L, d)
        states = fill(states, prompts, layout, add=group.model.adds)  # (B, N, d)
    return call.with_states(states)


def hide_late_slots(running: Pass, info: StackInfo, depth: int, call: LayerCall) -> LayerCall:
    """The call of a layer with a mask that hides the slots which it does not see yet."""
    mask, cache, table, states = call.mask, call.cache, running.table, call.states  # states (B, N, d)
    assert table is not None  # it says that there are late slots
    num_queries, seen, start = states.shape[1], 0, 0
    num_keys = num_queries
    if cache is not None:
        seen = length(cache, depth)
        num_keys, start = cache.get_mask_sizes(num_queries, depth)
    # Layers of one kind share their mask, so the new mask is found by the id of the old one. The old one is kept with it, so that
    # no other mask gets its id.
    stage = sum(depth < late for late in table.late_layers)
    key = (id(mask), stage, num_keys, start)
    if key not in running.masks:
        hidden = table.hidden_at(depth, start, num_keys).to(states.device)  # (B, num_keys)
        made = hide(
            mask, hidden, num_queries, seen, start, info.causal, running.attention, states.dtype, info.true_hides
        )
        running.masks[key] = mask, made
    return call.with_mask(running.masks[key][1])
