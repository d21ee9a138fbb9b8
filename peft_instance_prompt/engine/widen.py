# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The arguments of a stack, widened from S tokens to N = S + L positions.

Shapes: B rows, S tokens, L slots, N = S + L positions in the stack, e the width of the embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import Cache, PreTrainedModel

from .cache import make_room
from .calls import FOREIGN_ARGUMENTS, LENGTH_ARGUMENTS, PER_QUERY_ARGUMENTS, PER_TOKEN_ARGUMENTS, cache_of
from .layout import Layout, insert, insert_positions, take
from .masks import beyond_causal, pad_to_static_cache, see_beyond_causal
from .stack import StackInfo, embed_per_layer
from .text import Text


def widen(
    stack: PreTrainedModel, info: StackInfo, call: dict[str, Any], text: Text, layout: Layout, num_slots: int
) -> dict[str, Any]:
    """The call with room for the slots in each argument that has a column per token.

    Args:
        stack (`PreTrainedModel`): The stack.
        info (`StackInfo`): Facts about it.
        call (`dict`): Its arguments, with `inputs_embeds` over N positions and the others over S tokens.
        text (`Text`): The tokens.
        layout (`Layout`): Where slots and tokens stand.
        num_slots (`int`): The largest number of slots that an instance has, for the message of `check_fits`.

    Raises:
        ValueError: An argument has a column per token and is not known, or the sequence does not fit the model.
    """
    (B, S), L = text.tokens.shape, layout.num_slots
    check_arguments(call, B, S)
    wide = dict(call)
    for name in PER_QUERY_ARGUMENTS:
        if (rows := call.get(name)) is not None:  # (B, 1, S, keys)
            rows = rows.transpose(1, 2).expand(B, S, 1, -1)  # (B, S, 1, keys)
            # A slot sees what the token before it sees, as in generation, where no token stands behind it yet.
            own = take(rows, torch.maximum(layout.before_token - 1, layout.first))  # (B, L, 1, keys)
            wide[name] = insert(rows, own, layout).transpose(1, 2)  # (B, 1, N, keys)
    per_layer = wide.pop("per_layer_inputs", None)
    per_layer = embed_per_layer(stack, text.ids, text.embeds) if per_layer is None else per_layer
    if per_layer is not None:  # (B, S, layers, width); slots begin as copies of the first token here, too
        own = take(per_layer, layout.first)  # (B, L, layers, width)
        wide["per_layer_inputs"] = insert(per_layer, own, layout)  # (B, N, layers, width)
    if call.get("token_type_ids") is not None:
        types = call["token_type_ids"].expand(B, S)  # (B, S)
        own = types.gather(1, layout.before_token.clamp(max=S - 1))  # (B, L)
        wide["token_type_ids"] = insert(types, own, layout)  # (B, N)
    if "position_ids" in info.forward_args:
        positions = call["position_ids"]
        positions = positions.expand(*positions.shape[:-2], B, S)  # (B, S) or (R, B, S)
        segment_ids = None if text.packing is None else text.packing.segment_ids
        wide["position_ids"] = insert_positions(
            positions, layout.first, layout, segment_ids, info.rotates_by_length
        )  # (B, N) or (R, B, N)
    check_fits(info, wide.get("position_ids"), S + L, num_slots)
    if layout.segment_ids is not None:
        wide["attention_mask"] = no_padding(stack, layout.segment_ids)
        return {**wide, **lengths_of(stack, layout.segment_ids, call)}
    wide["attention_mask"] = widen_mask(stack, info, call, text, layout, wide["inputs_embeds"])
    return wide


def check_arguments(call: dict[str, Any], num_rows: int, num_tokens: int) -> None:
    """Refuse an unknown argument that seems to have a column for each of S tokens.

    Raises:
        ValueError: There is such an argument.
    """
    B, S = num_rows, num_tokens
    for name, value in call.items():
        if name in PER_TOKEN_ARGUMENTS + FOREIGN_ARGUMENTS or isinstance(value, Cache):
            continue
        for one in tree_leaves(value):
            shape = tuple(one.shape) if isinstance(one, torch.Tensor) else ()
            if name in PER_QUERY_ARGUMENTS and len(shape) == 4 and shape[0] in (1, B) and shape[1:3] == (1, S):
                continue
            if len(shape) > 1 and (
                (shape[0] in (1, B) and S in shape[1:]) or shape[:2] == (S, B) or shape[0] == B * S
            ):
                raise ValueError(
                    f"Instance prompts do not know how to give slots a place in `{name}` {shape}, which seems to have a place for each of "
                    f"{S} tokens. Call the model without it."
                )


def no_padding(stack: PreTrainedModel, segment_ids: torch.Tensor) -> torch.Tensor | None:
    """A padding mask of ones, (B, N) like `segment_ids`, for a packed call; `fill.py` changes each layer's mask to keep sequences apart.

    Without a mask, transformers would split the rows by position ids, where late slots look like boundaries. Flash attention gets None
    and goes by the lengths.
    """
    return None if is_flash(stack) else torch.ones_like(segment_ids)


def lengths_of(stack: PreTrainedModel, segment_ids: torch.Tensor, call: dict[str, Any]) -> dict[str, Any]:
    """The length arguments for the sequences of `segment_ids` (B, N): those that the call has; for flash attention, all."""
    begins = torch.nn.functional.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(begins, (0, 1), value=segment_ids.numel()).to(torch.int32)  # (segments + 1,)
    names = [name for name in LENGTH_ARGUMENTS if is_flash(stack) or call.get(name) is not None]
    return {name: ends if name.startswith("cu_") else int(ends.diff().max()) for name in names}


def is_flash(stack: PreTrainedModel) -> bool:
    return str(stack.config._attn_implementation).startswith("flash_attention")


def widen_mask(
    stack: PreTrainedModel, info: StackInfo, call: dict[str, Any], text: Text, layout: Layout, embeds: torch.Tensor
) -> Any:
    """The attention mask over N positions, in the form that the stack takes. Makes room for the slots in a static cache."""
    (B, S), L = text.tokens.shape, layout.num_slots
    cache = cache_of(call)[1]
    mask = None
    # Without a mask, transformers would take position ids that do not increase by 1 for boundaries of packed sequences.
    if text.mask is not None or not layout.all_used or layout.table.late_layers:
        mask = insert(text.tokens if text.mask is None else text.mask, layout.used, layout)  # (B, N)
    if cache is not None and cache.is_compileable:
        make_room(cache, L, info.sliding_window, info.image_layers)
    mask = pad_to_static_cache(mask, cache, B, S + L)
    # The kernel of a prefix-LM is not causal without a mask.
    later = beyond_causal(call.get("attention_mask"), if_none=info.prefix_lm)  # (B, S, S)
    if later is None:
        return mask
    for _ in range(2):  # rows, then columns
        later = insert(later, later.new_zeros(B, L, later.shape[2]), layout).transpose(1, 2)
    return see_beyond_causal(stack.config, embeds, mask, cache, later)


def check_fits(info: StackInfo, position_ids: torch.Tensor | None, num_positions: int, num_slots: int) -> None:
    """Raise a ValueError if the sequence needs more positions than the stack has learned embeddings for."""
    if info.max_positions is None or num_positions <= info.max_positions:
        return
    if position_ids is not None:
        num_positions = int(position_ids.max()) + 1 - info.position_offset
    if num_positions > info.max_positions:
        raise ValueError(
            f"The sequence does not fit: the model has {info.max_positions} positions, and {num_positions - num_slots} tokens "
            f"with {num_slots} prompt slots need {num_positions}. Truncate the text or use fewer `num_virtual_tokens`."
        )
