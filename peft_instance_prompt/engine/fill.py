# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Before a layer runs: write this depth's prompt vectors into the slots, edit the instruction's tokens, and hide from the layer what it must not see.

It must not see late slots, and in a packed row no token sees a different sequence. A plain pass only collects the layer's input, if
it is asked to.
"""

from __future__ import annotations

import torch

from .batch import Group, put
from .cache import length
from .calls import LayerCall
from .layout import Layout, fill, take
from .masks import hide
from .passes import Pass
from .stack import StackInfo


def fill_slots(running: Pass, info: StackInfo, depths: range, call: LayerCall) -> LayerCall:
    """The call of a layer with the slots filled.

    Args:
        running (`Pass`): The pass.
        info (`StackInfo`): Facts about the stack.
        depths (`range`): The depths of the layer: more than one if the stack runs it several times.
        call (`LayerCall`): The call of the layer.

    Raises:
        ValueError: The layer's input does not have the shape (B, N, d), or its mask has an unknown form.
    """
    layout, key = running.layout, id(call.layer)
    late = running.late_layers
    run = running.runs[key] = running.runs.get(key, -1) + 1
    depth = depths[run % len(depths)] if len(depths) > 1 else depths[0]  # a counter would recompile the graph
    running.ran.add(depth)
    states = call.states  # (B, N, d)
    if running.states is not None:
        running.states[depth] = states
    groups = [group for group in running.groups if depth in group.model.depths]
    if groups or late:
        check_states(states, info, layout, groups)
    flash = running.attention.startswith("flash_attention")
    hides = (late and (depth < late[-1] or flash)) or (running.segment_ids is not None and not flash)
    if hides and depth not in info.image_layers:
        call = hide_positions(running, info, depth, call)
    in_place = may_overwrite(running, info, depth)
    for group in groups:
        if group.model.edits:
            states = group.edit(states, depth)  # (B, N, d)
            continue
        assert layout is not None and group.selection is not None  # the pass has opened its groups' slots
        prompts = group.run(states, depth, group.selection, layout)  # (G, l, d)
        if group.rows is not None or layout.seats is not None:
            standing = take(states, layout.slot_index)  # (B, L, d)
            standing = torch.zeros_like(standing) if group.model.adds_at(depth) else standing
            prompts = put(standing, group.rows, prompts, layout.seats)  # (B, L, d)
        states = fill(states, prompts, layout, group.model.adds_at(depth), in_place)  # (B, N, d)
    return call.with_states(states)


def check_states(states: torch.Tensor, info: StackInfo, layout: Layout | None, groups: list[Group]) -> None:
    """Raise a ValueError if a layer's input has not one state (B, N, d) for each position of the stack."""
    shapes = [group.edited.shape for group in groups if group.edited is not None and group.rows is None]
    shapes = [layout.order.shape] if layout is not None else shapes
    if states.dim() == 3 and all(states.shape[:2] == shape for shape in shapes):
        return
    adds_tokens = states.dim() == 3 and all(len(states) == shape[0] for shape in shapes)
    cure = (
        "It adds tokens of its own; choose another base model."
        if adds_tokens
        else "Use a method that writes to the input only, such as IPT or S-IDPG."
    )
    wanted = f", where its input has {tuple(shapes[0])} positions" if shapes else ""
    raise ValueError(
        f"The layers of {info.name!r} take states of shape {tuple(states.shape)}{wanted}: prompts cannot be written between them. {cure}"
    )


def may_overwrite(running: Pass, info: StackInfo, depth: int) -> bool:
    """Whether to write in place: only where nobody else holds the tensor, in decoder layers after the first, without gradients.

    Some models read the first layer's input, the embeddings, again; encoders may read a layer's input again behind the layer; and
    checkpointing keeps inputs in training. A copy at each layer costs one percent of a pass over 100 tokens.
    """
    return depth > 0 and info.causal_lm and not (torch.is_grad_enabled() or running.stack.training)


def hide_positions(running: Pass, info: StackInfo, depth: int, call: LayerCall) -> LayerCall:
    """The call of a layer with a mask that hides slots it does not see yet, and the sequences of a row from each other."""
    mask, cache, states = call.mask, call.cache, call.states  # states (B, N, d)
    table, segment_ids = running.table, running.segment_ids
    # Gemma 3n's layers take several streams of states at once, (streams, B, N, d).
    num_queries, seen, start = states.shape[1] if segment_ids is None else segment_ids.shape[1], 0, 0
    num_keys = num_queries
    if cache is not None:
        seen = length(cache, depth)
        num_keys, start = cache.get_mask_sizes(num_queries, depth)
    # Layers of one kind share a mask, so the id of the given mask is the key of the changed one. The given mask is kept, too, so that
    # its id is not used again.
    stage = 0 if table is None else sum(depth < late for late in table.late_layers)
    key = (id(mask), stage, num_keys, start, states.device)
    if key not in running.masks:
        hidden = None
        if table is not None and table.late_layers:
            hidden = table.hidden_at(depth, start, num_keys).to(states.device)  # (B, num_keys)
        if segment_ids is not None:
            others = (segment_ids[:, :, None] != segment_ids[:, None]).to(states.device)  # (B, N, N)
            hidden = others if hidden is None else others | hidden[:, None]
        assert hidden is not None  # there is something to hide
        causal = info.causal and not info.prefix_lm  # the kernel of a prefix-LM hides nothing without a mask
        made = hide(mask, hidden, num_queries, seen, start, causal, running.attention, states.dtype, info.true_hides)
        running.masks[key] = mask, made
    return call.with_mask(running.masks[key][1])
