# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Before a stack runs: open the slots.

Shapes: B rows, S tokens, L slots, N = S + L positions in the stack, e the width of the embeddings, d that of the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache as once
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..generator import INPUT, Source
from .batch import Group, in_place, put
from .calls import PACKED_ARGUMENTS, cache_of
from .edits import edit_groups
from .instances import InstanceTokens
from .intercept import intercepted
from .layout import Layout, insert, take
from .place import Places, place_slots
from .plain import run_plain
from .request import Request
from .stack import StackInfo
from .text import Text, count_positions, find_scopes, shown_response
from .widen import lengths_of, no_padding, widen


def open_slots(
    stack: PreTrainedModel, info: StackInfo, groups: list[Group], text: Text, request: Request, call: dict[str, Any]
) -> tuple[dict[str, Any], list[Group], Layout | None]:
    """Change the arguments of a stack from S tokens to N = S + L positions, if an adapter has slots.

    Args:
        stack (`PreTrainedModel`): The stack.
        info (`StackInfo`): Facts about it.
        groups (`list[Group]`): The rows that have an adapter.
        text (`Text`): The tokens.
        request (`Request`): The request.
        call (`dict`): The arguments of the stack.

    Returns:
        The new call; the groups with their instances, or the positions that they edit, among the stack's positions; and the layout, None if
        there are no slots.

    Raises:
        ValueError: The call cannot get prompts, as `find_scope`, `place_slots` and `widen` say.
    """
    packing, by_row = text.packing, groups
    if packing is not None:
        groups = [own for group in groups if (own := group.of_sequences(packing))]
        if not groups:
            raise ValueError("No packed row with an adapter holds a sequence of two or more tokens.")
    scope = find_scopes(groups, text, request, info, stack.training)  # (B, S)
    groups = [group for group in groups if group.model.num_slots]
    if not groups:
        if packing is not None:  # with a cache, transformers would not keep their sequences apart
            call = {**call, "use_cache": False}
        elif text.mask is not None and "position_ids" in info.forward_args and call.get("position_ids") is None:
            call = {**call, "position_ids": count_positions(text, by_row, info)}  # (B, S)
        return call, edit_groups(by_row, scope, None), None
    name, cache = cache_of(call)
    call = prepare(call, text, groups, info)
    plain = {key: value for key, value in call.items() if key != name}
    if cache is not None and cache.is_compileable:
        plain["attention_mask"] = without_room(plain.get("attention_mask"), *text.tokens.shape)
    plain["use_cache"] = False

    response = shown_response(stack, info, call, text, scope, request)  # (B, S)
    frozen_states = once(partial(last_states, stack, plain, text, response))
    if packing is None:
        selection = InstanceTokens.of_rows(scope, text.tokens)
    else:
        selection = InstanceTokens.of_sequences(scope, packing.sequence)
    groups = [encode(group, text, selection, request, frozen_states) for group in groups]
    layout, places = place_slots(groups, text, selection, info)

    embeds = embed_slots(groups, places, text, selection, layout)  # (B, N, e)
    call = {**call, "input_ids": None, "inputs_embeds": embeds}
    call = widen(stack, info, call, text, layout, max(group.model.num_slots for group in groups))
    selection = selection.within(layout)
    groups = [replace(group, selection=selection.pick(group.rows)) for group in groups]
    return call, groups + edit_groups(by_row, scope, layout), layout


def prepare(call: dict[str, Any], text: Text, groups: list[Group], info: StackInfo) -> dict[str, Any]:
    """Add `position_ids`; drop packing arguments if no row is packed."""
    packing = text.packing
    # Only layers without attention read `seq_idx`, and packed rows are refused there.
    dropped = PACKED_ARGUMENTS if packing is None else ("seq_idx",)
    call = {key: value for key, value in call.items() if key not in dropped}
    if packing is not None:
        call["use_cache"] = False
    if "position_ids" in info.forward_args and call.get("position_ids") is None:
        positions = None if packing is None else packing.position + info.position_offset  # (B, S)
        call["position_ids"] = count_positions(text, groups, info) if positions is None else positions
    return call


def last_states(
    stack: PreTrainedModel, call: dict[str, Any], text: Text, response: torch.Tensor | None = None
) -> torch.Tensor:
    """The last hidden states (B, S, d) of the stack without prompts, in which no instruction token sees the `response` (B, S)."""
    if call.get("inputs_embeds") is not None:  # some stacks add positions where the embeddings lie
        call = {**call, "inputs_embeds": call["inputs_embeds"].clone()}  # (B, S, e)
    if text.packing is None:
        return run_plain(stack, call, None if response is None else response.long())
    segment_ids = text.packing.segment_ids  # (B, S)
    call = {**call, "attention_mask": no_padding(stack, segment_ids), **lengths_of(stack, segment_ids, call)}
    return run_plain(stack, call, segment_ids)


def without_room(mask: Any, num_rows: int, num_tokens: int) -> Any:
    """A mask for an empty static cache, in any form, cut to the S tokens."""
    if isinstance(mask, dict):
        return {kind: without_room(one, num_rows, num_tokens) for kind, one in mask.items()}
    if isinstance(mask, torch.Tensor):
        return mask[..., :num_tokens]  # (B, S) or (B, 1, S, S)
    if mask is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    size = (num_rows, None, num_tokens, num_tokens)
    return create_block_mask(mask.mask_mod, *size, device=mask.kv_indices.device)


def encode(
    group: Group, text: Text, selection: InstanceTokens, request: Request, frozen_states: Callable[[], torch.Tensor]
) -> Group:
    """The group with the outputs of its adapters' `encode`."""
    vectors: list[Any] = []  # a tensor each, or None each: the generators are of one class
    for generator, rows in group:
        own, said = selection.pick(rows), request.of_rows(len(selection), rows)
        source = Source(
            token_ids=None if text.ids is None else own.take(text.ids),  # (G, n)
            embeds=own.take(text.embeds),  # (G, n, e)
            mask=own.mask,
            instance_embeds=said.instance_embeds,
            task_ids=said.task_ids,
            frozen_states=partial(_take_states, own, frozen_states),  # (G, n, d)
        )
        with in_place(generator):
            vector = generator.encode(source)
        vectors.append(intercepted(vector, depth=None, generators=[generator], rows=rows))
    if vectors[0] is None:
        return group
    vector = torch.cat(vectors)  # (G, ...)
    return replace(group, vector=vector if group.by_row is None else vector[group.by_row.to(vector.device)])


def _take_states(selection: InstanceTokens, states: Callable[[], torch.Tensor]) -> torch.Tensor:
    return selection.take(states())  # (G, n, d)


def embed_slots(
    groups: list[Group], places: list[Places], text: Text, selection: InstanceTokens, layout: Layout
) -> torch.Tensor:
    """The input embeddings (B, N, e) with the slots in their places, and with prompt vectors in them if a method writes there."""
    # Slots that no generator writes to begin as copies of the first token, which disturbs the model least.
    vectors = take(text.embeds.detach(), layout.first)  # (B, L, e)
    own = None
    for group in groups:
        if INPUT in group.model.depths:
            own = group.run(text.embeds, INPUT, selection.pick(group.rows), layout)  # (G, l, e)
            vectors = put(vectors, group.rows, own, layout.seats)  # (B, L, e)
    embeds = insert(text.embeds, vectors, layout)  # (B, N, e)
    if groups[0].rows_of is not None or own is None:
        return embeds
    (group,), (place,) = groups, places  # one adapter has all rows
    if text.packing is not None:
        return attach_in_rows_apart(group, place, embeds, own, text, layout)
    return group.model.attach_choice_gradient(
        embeds, own, text.embeds, group.vector, layout, place.start, place.stop
    )  # (B, N, e)


def attach_in_rows_apart(
    group: Group, places: Places, embeds: torch.Tensor, prompts: torch.Tensor, text: Text, layout: Layout
) -> torch.Tensor:
    """Attach position gradients to the input embeddings (B, N, e) of packed rows, one sequence at a time."""
    packing, seats = text.packing, layout.seats
    assert packing is not None and seats is not None  # the rows are packed
    used = seats.column < seats.num_slots  # (G, l)
    alone, index = packing.apart(layout, used, places.before_token)  # index (G, n + l)
    rows = packing.rows[:, None].expand_as(index)  # (G, n + l)
    spare = torch.cat([embeds, torch.zeros_like(embeds[:, :1])], dim=1)  # (B, N + 1, e)
    tokens = packing.unpack(text.embeds, 0.0)  # (G, n, e)
    first = packing.columns[:, 0]  # (G,)
    attached = group.model.attach_choice_gradient(
        spare[rows, index], prompts, tokens, group.vector, alone, places.start - first, places.stop - first
    )  # (G, n + l, e)
    return spare.index_put((rows, index), attached)[:, :-1]  # (B, N, e)
