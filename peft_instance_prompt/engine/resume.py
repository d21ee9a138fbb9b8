# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Before a stack continues from a slot cache: no slot is opened, but mask and positions must count the cached slots.

Shapes: B rows, S new tokens, L slots in the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from .cache import SlotCache
from .masks import pad_to_static_cache, padding_mask
from .stack import StackInfo
from .widen import check_fits


def resume(info: StackInfo, call: dict[str, Any], cache: SlotCache, counts_slots: bool) -> dict[str, Any]:
    """The call of a stack that continues from a slot cache.

    Args:
        info (`StackInfo`): Facts about the stack.
        call (`dict`): The arguments of the stack.
        cache (`SlotCache`): Its cache.
        counts_slots (`bool`): Whether the caller passed the inner cache, whose length counts slots, too.

    Raises:
        ValueError: The text does not continue the tokens in the cache, or the sequence does not fit the model.
    """
    tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]  # (B, S, ...)
    (B, S), table, seen = tokens.shape[:2], cache.table, cache.get_seq_length()
    positions = call.get("position_ids")
    told = positions is not None or "position_ids" not in info.forward_args
    if table.num_slots == 0 and (told or table.text is None or not table.text.padded):
        return call  # nothing has moved
    if counts_slots and table.num_slots and not _goes_on(info, positions, call.get("attention_mask"), seen, S):
        raise ValueError(
            f"The cache holds {seen} tokens and {table.num_slots} prompt slots, but the text does not go on from these "
            f"{seen} tokens. Pass the cache that the model returned, which counts tokens only, and not the cache that went in "
            "first."
        )
    mask = padding_mask(call.get("attention_mask"), B, seen + S, cache.is_compileable)  # (B, seen + S)
    num_positions = seen + table.num_slots + S
    if table.num_slots:
        wide = table.widen_mask(mask, seen + S)  # (B, seen + L + S)
        call = {**call, "attention_mask": pad_to_static_cache(wide, cache.inner, B, num_positions)}
    if "position_ids" in info.forward_args:
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, seen:] + info.position_offset  # (B, S)
        elif positions is None:
            positions = torch.arange(seen, seen + S, device=tokens.device) + info.position_offset  # (S,)
        if not info.rotates_by_length:  # there, slots have positions before those of the tokens
            positions = positions + table.num_counted.to(positions.device)  # (B, S) or (R, B, S)
        call = {**call, "position_ids": positions}
    check_fits(info, call.get("position_ids"), num_positions, table.num_slots)
    return call


def _goes_on(info: StackInfo, positions: Any, mask: Any, seen: int, num_new: int) -> bool:
    """False if the caller counted slots as tokens, taking the text's length from a cache that counts both.

    Positions (B, S) or the mask (B, seen + S) show it.
    """
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or (mask is not None and mask.dim() != 2):
        return True
    if mask is not None and mask.shape[1] != seen + num_new:
        return False
    before = seen if mask is None else mask[:, :seen].sum(dim=1).to(positions.device)  # (B,)
    return bool((positions[:, 0] == before + info.position_offset).all())
