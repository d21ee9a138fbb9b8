# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""After a stack ran: take the slots out of its output. The caller gets the shapes of a model without slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .cache import SlotCache
from .calls import by_name, cache_of
from .layout import SlotTable, take
from .masks import padding_mask
from .passes import Pass, current_pass
from .request import current_request, note_encoder_slots
from .stack import StackInfo


def close_slots(running: Pass, info: StackInfo, output: Any) -> Any:
    """The stack's output without slots.

    Args:
        running (`Pass`): The pass.
        info (`StackInfo`): Facts about the stack.
        output (`ModelOutput`): What the stack returned, with a state for each of N positions.
    """
    if running.table is None:  # no adapter, and no slots in the cache
        return output
    cache, (name, filled) = running.cache, cache_of(output)
    if (layout := running.layout) is not None:
        if (
            output.last_hidden_state.shape[1] != layout.order.shape[1]
        ):  # Git puts an image's states before those of the tokens
            raise ValueError(
                f"Instance prompts cannot be used in {type(running.stack).__name__}, which returns {output.last_hidden_state.shape[1]} "
                f"states for {layout.order.shape[1]} positions: it adds tokens of its own, and where the slots stand is not known."
            )
        last = take(output.last_hidden_state, layout.output_index)  # (B, S, d)
        if output.get("hidden_states") is not None:
            inner = tuple(take(states, layout.token_index) for states in output.hidden_states[:-1])
            output.hidden_states = (*inner, last)  # each (B, S, d)
        if output.get("pooler_output") is not None:
            output.pooler_output = _pool(running.stack, last)  # (B, d)
        if filled is not None:
            cache = SlotCache(filled, running.table)
        if info.encoder_of_pair:  # the decoder attends to the slots, so they stay
            output["slot_order"], output["slot_live"] = layout.order, layout.live
            note_encoder_slots(layout.order, layout.live)
        else:
            output.last_hidden_state = last
    if output.get("attentions") is not None:
        output.attentions = tuple(_strip(maps, running) for maps in output.attentions)
    if filled is not None:
        output[name] = cache
    return output.to_tuple() if running.as_tuple else output


def _strip(attention: torch.Tensor | None, running: Pass) -> torch.Tensor | None:
    """Attention maps (B, heads, queries, keys) without the slots among queries and keys."""
    if attention is None:
        return None
    if running.layout is not None:
        attention = take(attention, running.layout.token_index, dim=2)  # (B, heads, S, keys)
    table = running.table
    assert table is not None  # a pass without slots is not changed
    keys = table.token_positions(max(attention.shape[-1], table.order.shape[1]))  # (B, keys - L)
    if attention.shape[-1] < table.order.shape[1]:
        raise ValueError(
            "`output_attentions` cannot be given for a sliding-window cache that has dropped prompt slots: which of its keys are "
            "slots is not known any more. Use a cache without a window, or generate without `output_attentions`."
        )
    return take(attention, keys, dim=3)  # (B, heads, S, keys - L)


def _pool(stack: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Run the stack's pooler again, on `states` (B, S, d), to (B, d): its first run saw the slots."""
    if isinstance(stack.pooler, nn.Linear):  # ALBERT
        return stack.pooler_activation(stack.pooler(states[:, 0]))
    return stack.pooler(states)


@torch.compiler.disable
def attend_to_slots(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before the decoder of a pair runs: widen its mask over the encoder's output, which kept its slots."""
    running = current_pass.get()
    if running is not None and running.owner is None:  # a pass without prompts has the widened mask already
        return None
    if (found := current_request().encoder_slots) is None:
        return None
    kwargs = by_name(decoder, args, kwargs)
    states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    if states is not None:
        num_tokens = states.shape[1] - found[1].shape[1]
        mask = padding_mask(mask, states.shape[0], num_tokens, from_static_cache=False)  # (B, S)
        kwargs["encoder_attention_mask"] = SlotTable(*found).widen_mask(mask, num_tokens)  # (B, N)
    return (), kwargs
