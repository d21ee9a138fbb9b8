# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Before a stack runs: open the slots.

Shapes: B rows, S tokens, L slots, N = S + L positions in the stack, e the width of the embeddings, d that of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import nn

from ..generator import INPUT, Source
from .batch import Group, pick, put
from .cache import length, make_room
from .calls import FOREIGN_ARGUMENTS, PER_TOKEN_ARGUMENTS, cache_of
from .frozen import run_frozen
from .instances import Selection
from .intercept import intercepted
from .layout import Layout, insert, insert_positions, take
from .masks import beyond_causal, check_not_packed, pad_to_static_cache, padding_mask, see_beyond_causal
from .place import Text, edges, place_slots
from .request import Request
from .scope import find_scope
from .stack import StackInfo, embed, embed_per_layer


def read_text(stack: nn.Module, call: Mapping[str, Any], request: Request) -> Text:
    """Find the tokens in a call of a stack.

    Raises:
        ValueError: The batch is empty, its rows hold several sequences, its mask has an unknown form, or its cache was filled
            without an adapter.
    """
    given = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]  # (B, S, ...)
    B, S = given.shape[:2]
    if B == 0 or S == 0:
        raise ValueError(f"The batch is empty: {B} row(s) of {S} token(s).")
    name, cache = cache_of(call)
    if cache is not None and length(cache) > 0:
        raise ValueError(
            f"`{name}` holds {length(cache)} tokens but no prompt slots: it was filled without an adapter. "
            "Start from an empty cache, or fill it with the adapter active."
        )
    check_not_packed(call)
    ids = request.input_ids if call.get("input_ids") is None else call["input_ids"]
    ids = ids if ids is not None and ids.shape == (B, S) else None
    embeds = embed(stack, given) if call.get("inputs_embeds") is None else given  # (B, S, e)
    static = cache is not None and cache.is_compileable
    mask = padding_mask(call.get("attention_mask"), B, S, static)  # (B, S)
    mask = None if mask is None else mask.to(embeds.device)
    tokens = torch.ones(B, S, dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()  # (B, S)
    return Text(ids, embeds, mask, tokens)


def open_slots(
    stack: nn.Module, info: StackInfo, groups: list[Group], request: Request, call: dict[str, Any]
) -> tuple[dict[str, Any], list[Group], Layout]:
    """Change the arguments of a stack from S tokens to N = S + L positions.

    Args:
        stack (`nn.Module`): The stack.
        info (`StackInfo`): Facts about it.
        groups (`list[Group]`): The rows that have an adapter.
        request (`Request`): What the caller said.
        call (`dict`): The arguments of the stack.

    Returns:
        The new call, the groups with their instances among the stack's positions, and the layout.
    """
    text = read_text(stack, call, request)
    name, cache = cache_of(call)
    if "position_ids" in info.forward_args and call.get("position_ids") is None:
        call = {**call, "position_ids": count_positions(text, groups, info)}  # (B, S)
    plain = {key: value for key, value in call.items() if key != name}
    plain.update(attention_mask=text.mask, use_cache=False)
    frozen_states = once(partial(run_frozen, stack, plain))

    scope = find_scopes(groups, text, request, info, stack.training)  # (B, S)
    selection = Selection.of_rows(scope, text.tokens)
    groups = [encode(group, text, selection, request, frozen_states) for group in groups]
    layout = place_slots(groups, text, selection, info)

    embeds = embed_slots(groups, text, selection, layout, info)  # (B, N, e)
    call = {**call, "input_ids": None, "inputs_embeds": embeds}
    call = widen(stack, info, call, text, selection, layout)
    selection = selection.within(layout)
    return call, [replace(group, selection=selection.pick(group.rows)) for group in groups], layout


def count_positions(text: Text, groups: list[Group], info: StackInfo) -> torch.Tensor:
    """Position ids (B, S) for a call that has none.

    Rows with an adapter count tokens and not columns, so that padding on the left moves nothing. Rows without one are counted as
    the bare model does: by columns, unless it counts tokens itself.
    """
    B, S = text.tokens.shape
    counted = (text.tokens.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
    if not info.counts_tokens and all(group.rows is not None for group in groups):
        bare = torch.ones(B, dtype=torch.bool, device=counted.device)  # (B,)
        bare[torch.cat([group.rows for group in groups]).to(counted.device)] = False
        counted = torch.where(bare[:, None], torch.arange(S, device=counted.device), counted)  # (B, S)
    return counted + info.position_offset


def find_scopes(groups: list[Group], text: Text, request: Request, info: StackInfo, training: bool) -> torch.Tensor:
    """Each row's instruction tokens (B, S), by the rules of its adapter."""
    scope = text.tokens  # (B, S)
    for group in groups:
        for generator, rows in group:
            own = find_scope(
                pick(text.tokens, rows),
                request.of_rows(len(text.tokens), rows),
                template=generator.config.response_template,
                missing_template=generator.config.missing_template,
                instruction_length=generator.config.instruction_length,
                special_ids=info.special_ids,
                input_ids=pick(text.ids, rows),
                causal_lm=info.causal_lm,
                pair_decoder=info.decoder_of_pair,
                training=training,
            )  # (G, S)
            scope = put(scope, rows, own)  # (B, S)
    return scope


def encode(
    group: Group, text: Text, selection: Selection, request: Request, frozen_states: Callable[[], torch.Tensor]
) -> Group:
    """The group with the output of `encode` of each of its adapters."""
    vectors: list[Any] = []  # a tensor of each, or None: the generators are of one class
    for generator, rows in group:
        own = selection.pick(rows)
        source = Source(
            token_ids=None if text.ids is None else own.take(text.ids),  # (G, n)
            embeds=own.take(text.embeds),  # (G, n, e)
            mask=own.mask,
            instance_embeds=request.of_rows(len(text.tokens), rows).instance_embeds,
            frozen_states=partial(_take_states, own, frozen_states),  # (G, n, d)
        )
        vectors.append(intercepted(generator.encode(source), depth=None, generators=[generator], rows=rows))
    return replace(group, vector=None if vectors[0] is None else torch.cat(vectors))  # (G, ...)


def _take_states(selection: Selection, states: Callable[[], torch.Tensor]) -> torch.Tensor:
    return selection.take(states())  # (G, n, d)


def embed_slots(
    groups: list[Group], text: Text, selection: Selection, layout: Layout, info: StackInfo
) -> torch.Tensor:
    """The input embeddings (B, N, e) with the slots in their places."""
    B, L = layout.before_token.shape
    # Slots that no generator writes to begin as copies of the first token, which disturbs the model least.
    vectors = selection.state_at(text.embeds, selection.first).expand(B, L, -1)  # (B, L, e)
    for group in groups:
        if INPUT in group.model.depths:
            own = group.run(text.embeds, INPUT, selection.pick(group.rows), layout)  # (G, l, e)
            vectors = put(vectors, group.rows, own)  # (B, L, e)
    embeds = insert(text.embeds, vectors, layout)  # (B, N, e)
    for group in groups:
        if group.rows is None:
            embeds = group.model.attach_choice_gradient(
                embeds, vectors, text.embeds, group.vector, layout, *edges(group, text, selection, info)
            )
    return embeds


def widen(
    stack: nn.Module, info: StackInfo, call: dict[str, Any], text: Text, selection: Selection, layout: Layout
) -> dict[str, Any]:
    """The call with a place for the slots in each argument that has a column per token."""
    (B, S), L = text.tokens.shape, layout.num_slots
    for name, value in call.items():
        unknown = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == (B, S)
        if unknown and name not in PER_TOKEN_ARGUMENTS + FOREIGN_ARGUMENTS:
            raise ValueError(f"Instance prompts do not know how to give slots a place in `{name}` {(B, S)}.")
    wide = dict(call)
    first = selection.first[:, None]  # (B, 1)
    per_layer = wide.pop("per_layer_inputs", None)
    per_layer = embed_per_layer(stack, text.ids, text.embeds) if per_layer is None else per_layer
    if per_layer is not None:  # (B, S, layers, width); the slots begin as copies of the first token, here too
        own = take(per_layer, first).expand(-1, L, -1, -1)  # (B, L, layers, width)
        wide["per_layer_inputs"] = insert(per_layer, own, layout)  # (B, N, layers, width)
    if call.get("token_type_ids") is not None:
        types = call["token_type_ids"].expand(B, S)  # (B, S)
        own = types.gather(1, layout.before_token.clamp(max=S - 1))  # (B, L)
        wide["token_type_ids"] = insert(types, own, layout)  # (B, N)
    if "position_ids" in info.forward_args:
        positions = call["position_ids"]
        positions = positions.expand(*positions.shape[:-2], B, S)  # (B, S) or (R, B, S)
        wide["position_ids"] = insert_positions(positions, first, layout)  # (B, N) or (R, B, N)
    check_fits(info, wide.get("position_ids"), S + L, L)
    wide["attention_mask"] = widen_mask(stack, info, call, text, layout, wide["inputs_embeds"])
    return wide


def widen_mask(
    stack: nn.Module, info: StackInfo, call: dict[str, Any], text: Text, layout: Layout, embeds: torch.Tensor
) -> Any:
    """The attention mask over N positions, in the form that the stack takes; room for them in a static cache."""
    (B, S), L = text.tokens.shape, layout.num_slots
    cache = cache_of(call)[1]
    mask = None
    # Without a mask, position ids that do not count on would be taken for those of several sequences in a row.
    if text.mask is not None or not layout.all_live or layout.table.late_layers:
        mask = insert(text.tokens if text.mask is None else text.mask, layout.live, layout)  # (B, N)
    if cache is not None and cache.is_compileable:
        make_room(cache, L, info.sliding_window)
    mask = pad_to_static_cache(mask, cache, B, S + L)
    later = beyond_causal(call.get("attention_mask"))  # (B, S, S)
    if later is None:
        return mask
    for _ in range(2):  # rows, then columns
        later = insert(later, later.new_zeros(B, L, later.shape[2]), layout).transpose(1, 2)
    return see_beyond_causal(stack.config, embeds, mask, cache, later)


def check_fits(info: StackInfo, position_ids: torch.Tensor | None, num_positions: int, num_slots: int) -> None:
    """Raise a ValueError if the stack has learned embeddings for fewer positions."""
    if info.max_positions is None or num_positions <= info.max_positions:
        return
    if position_ids is not None:
        num_positions = int(position_ids.max()) + 1 - info.position_offset
    if num_positions > info.max_positions:
        raise ValueError(
            f"The sequence does not fit: the model has {info.max_positions} positions, and {num_positions - num_slots} tokens "
            f"with {num_slots} prompt slots need {num_positions}. Truncate the text or use fewer `num_virtual_tokens`."
        )
