# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The text in a call of a stack: its tokens, their positions, and which of them are the instruction.

Shapes: B rows, S tokens, G sequences of up to n tokens in a packed batch, e the width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from .batch import Group, pick, put
from .cache import length
from .calls import cache_of
from .masks import beyond_causal, full_mask, padding_mask, prefix_of
from .packing import Packing, find_packing
from .request import Request
from .scope import Rules, find_scope
from .stack import StackInfo, check_packable, embed


@dataclass(frozen=True)
class Text:
    """The tokens in a call of a stack.

    Attributes:
        ids (`torch.LongTensor`, *optional*): Shape (B, S). None if they are not known.
        embeds (`torch.Tensor`): Shape (B, S, e), the input embeddings. Without slots nobody reads them, and it is what the stack was called
            with, ids (B, S) or embeddings.
        mask (`torch.Tensor`, *optional*): Shape (B, S). The caller's padding mask. None if there is none, or if rows are packed.
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        packing (`Packing`, *optional*): The sequences in the rows, if the rows are packed.
        prefix (`torch.BoolTensor`, *optional*): Shape (B, S). The prefix of each row, if the caller's mask gives one to a prefix-LM.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor
    mask: torch.Tensor | None
    tokens: torch.Tensor
    packing: Packing | None = None
    prefix: torch.Tensor | None = None


def read_text(
    stack: PreTrainedModel, info: StackInfo, groups: list[Group], call: Mapping[str, Any], request: Request
) -> Text:
    """Find the tokens in a call of a stack.

    Raises:
        ValueError: The batch is empty, its mask has an unknown form, its cache was filled without an adapter, or its rows are packed
            and get slots, and the stack does not keep their sequences apart; or they are padded on the left and get slots, and the stack
            tells padding by its id.
    """
    given = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]  # (B, S, ...)
    B, S = given.shape[:2]
    if B == 0 or S == 0:
        raise ValueError(f"The batch is empty: {B} row(s) of {S} token(s).")
    name, cache = cache_of(call)
    if cache is not None and length(cache) > 0:
        raise ValueError(
            f"`{name}` holds {length(cache)} tokens and was filled without an adapter. "
            "Start from an empty cache, or fill it with the adapter active."
        )
    told = {**request.packed, **{name: value for name, value in call.items() if value is not None}}
    slots = any(group.model.num_slots for group in groups)
    # All tokens of an encoder are edited, whatever sequences they belong to.
    packing = find_packing(told, B, S, given.device, info.position_offset) if slots or info.causal else None
    if packing is not None and slots:
        check_packable(stack, info, late=any(group.model.first_visible_layer > 0 for group in groups))
        if request.prompt_length is not None or cache is not None:
            raise ValueError(
                "Packed rows, which hold several sequences, cannot be continued: call the model without a cache, and `generate` with one "
                "sequence per row."
            )
    ids = request.input_ids if call.get("input_ids") is None else call["input_ids"]
    ids = ids if ids is not None and ids.shape == (B, S) else None
    embeds = embed(stack, given) if slots and call.get("inputs_embeds") is None else given  # (B, S, e)
    static = cache is not None and cache.is_compileable
    given_mask = None if packing is not None else call.get("attention_mask")
    mask = padding_mask(given_mask, B, S, static)  # (B, S)
    mask = None if mask is None else mask.to(embeds.device)
    tokens = torch.ones(B, S, dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()  # (B, S)
    tokens = tokens if packing is None else packing.sequence >= 0  # (B, S)
    if slots and info.padding_by_id and bool((tokens.any(dim=1) & ~tokens[:, 0]).any()):
        raise ValueError(
            f"{info.name!r} counts its positions from the first id that is no padding, and a prompt comes with embeddings, which show "
            "none: pad on the right (`tokenizer.padding_side = 'right'`), not on the left."
        )
    prefix = prefix_of(given_mask, tokens) if info.prefix_lm else None  # (B, S)
    return Text(ids, embeds, mask, tokens, packing, prefix)


def count_positions(text: Text, groups: list[Group], info: StackInfo) -> torch.Tensor:
    """Position ids (B, S) for a call that has none.

    Rows with an adapter count tokens, not columns, so that left padding moves nothing. Rows without one count as the bare model does: by
    columns, unless its positions come from the mask.
    """
    B, S = text.tokens.shape
    counted = (text.tokens.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
    rows = [group.rows for group in groups if group.rows is not None]
    if not info.positions_from_mask and len(rows) == len(groups):
        bare = torch.ones(B, dtype=torch.bool, device=counted.device)  # (B,)
        bare[torch.cat(rows).to(counted.device)] = False
        counted = torch.where(bare[:, None], torch.arange(S, device=counted.device), counted)  # (B, S)
    return counted + info.position_offset


def find_scopes(groups: list[Group], text: Text, request: Request, info: StackInfo, training: bool) -> torch.Tensor:
    """The instruction tokens (B, S) of each row, or of each sequence of packed rows, by the rules of its adapter.

    Raises:
        ValueError: A scope cannot be told, or mask, template or labels do not fit.
        TypeError: `instruction_mask` is not a tensor of bools or whole numbers.
    """
    packing, tokens, ids = text.packing, text.tokens, text.ids
    if packing is not None:
        ids = None if ids is None else packing.unpack(ids, -1)  # (G, n)
        tokens, request = packing.mask, unpack(request, packing)  # (G, n)
    scope = tokens  # (B, S) or (G, n)
    for group in groups:
        for generator, rows in group:
            try:
                own = find_scope(
                    pick(tokens, rows),
                    request.of_rows(len(tokens), rows),
                    Rules.of(generator.config, info, generator.edits),
                    input_ids=pick(ids, rows),
                    prefix=pick(text.prefix, rows),
                    training=training,
                    packed=packing is not None,
                )  # (rows, S)
            except ValueError as error:
                if packing is None or "row(s)" not in str(error):
                    raise
                raise ValueError(f"{error} Rows: the sequences of a packed batch.") from error
            scope = put(scope, rows, own)  # (B, S) or (G, n)
    return scope if packing is None else packing.pack(scope)  # (B, S)


def shown_response(
    stack: PreTrainedModel,
    info: StackInfo,
    call: Mapping[str, Any],
    text: Text,
    scope: torch.Tensor,
    request: Request,
) -> torch.Tensor | None:
    """The tokens (B, S) behind each row's last instruction token, where the model may show them to the instruction; None where it
    hides all later tokens, or where there are none.

    Args:
        scope (`torch.BoolTensor`): Shape (B, S). The instruction tokens.

    Raises:
        ValueError: A prefix-LM is called with a response and nothing that hides it.
    """
    mask = call.get("attention_mask")
    if text.packing is not None or not info.causal or not (info.prefix_lm or beyond_causal(mask) is not None):
        return None
    response = text.tokens & (scope.flip(1).cumsum(dim=1).flip(1) == 0)  # (B, S)
    if not response.any():
        return None
    kernel = str(stack.config._attn_implementation)
    bare = full_mask(mask)
    if info.prefix_lm and kernel not in ("eager", "flex_attention") and request.prompt_length is None:
        if bare is None or (bare.dim() == 2 and bool(bare.all())):
            raise ValueError(
                f"Without a prefix, {type(stack).__name__} shows its instruction the response under {kernel!r} attention, with an adapter "
                "as without. Pass `token_type_ids`, 0 for the prefix and 1 for the response."
            )
    return response


def unpack(request: Request, packing: Packing) -> Request:
    """The request for a batch with a row per sequence.

    `instance_embeds` and `task_ids` stay as they are: the caller gives one entry per sequence.
    """
    shape, labels, mask = tuple(packing.segment_ids.shape), request.labels, request.instruction_mask
    if labels is not None and tuple(labels.shape) == shape:
        labels = packing.unpack(labels, -100)  # (G, n)
        if request.shifted:  # the label at the last token belongs to the next sequence's first token
            last = packing.mask.sum(dim=1, keepdim=True).to(labels.device) - 1  # (G, 1)
            labels = labels.scatter(1, last, -100)
    if isinstance(mask, torch.Tensor) and not mask.is_floating_point():  # else `find_scope` complains
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"`instruction_mask` must have the shape of the tokens, {shape}, got {tuple(mask.shape)}."
            )
        mask = packing.unpack(mask, 0)  # (G, n)
    return replace(request, labels=labels, instruction_mask=mask)
