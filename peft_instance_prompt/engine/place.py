# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Where each row's slots stand among its tokens.

Shapes: B rows, S tokens, L slots, G instances: rows, or the sequences of packed rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from ..config import PAIR_POSITIONS, PLAIN_POSITIONS, InstancePromptConfig
from ..nn.pooling import last_index
from .batch import Group, pick, put
from .instances import InstanceTokens
from .layout import Layout, Seats, arrange
from .stack import StackInfo
from .text import Text


class Places(NamedTuple):
    """Where the slots of a group's instances stand among the tokens of their rows.

    Attributes:
        start (`torch.LongTensor`): Shape (G,). The token before which the slots before the instruction stand.
        stop (`torch.LongTensor`): Shape (G,). The token before which the slots behind it stand; S puts them behind the last token.
        before_token (`torch.LongTensor`): Shape (G, l). The token before which each slot stands, one of the two.
    """

    start: torch.Tensor
    stop: torch.Tensor
    before_token: torch.Tensor


def place_slots(
    groups: list[Group], text: Text, selection: InstanceTokens, info: StackInfo
) -> tuple[Layout, list[Places]]:
    """Ask the adapters where their slots stand, and lay out the rows.

    Args:
        groups (`list[Group]`): The groups, with the output of `encode`.
        text (`Text`): The tokens.
        selection (`InstanceTokens`): All instances of the batch, by the columns of the text.
        info (`StackInfo`): Facts about the stack.

    Returns:
        The layout of the batch, and the places of each group.

    Raises:
        ValueError: Rows have different numbers of slots in a stack with learned absolute positions by column, or a config asks for a
            separator that a row lacks.
    """
    B, S, packing = *text.tokens.shape, text.packing
    L = max(group.model.num_slots for group in groups)
    everywhere = all(group.rows is None for group in groups)
    # A row per instance: G rows.
    front = selection.first[:, None].expand(-1, L)  # (G, L)
    before_token, since = front, torch.zeros_like(front)  # (G, L) each
    used, known = torch.full_like(front, everywhere, dtype=torch.bool), everywhere  # (G, L); are all known to be used
    each: list[Places] = []
    for group in groups:
        model, own = group.model, selection.pick(group.rows)
        behind, own_used = model.place(own.mask, group.vector)  # (G, l) each
        behind, known = behind.to(front.device), known and own_used is None
        start, stop = edges(group, text, selection, info)  # (G,) each
        if info.absolute_column_positions and not info.causal and model.first_visible_layer > 0:
            # Late slots have no position of their own. Where positions go by column, they stand behind the last token, where they
            # move no token.
            start = stop = torch.full_like(start, S)  # (G,)
        each.append(Places(start, stop, torch.where(behind, stop[:, None], start[:, None])))
        before_token = put(before_token, group.rows, each[-1].before_token)
        used = put(used, group.rows, torch.ones_like(behind) if own_used is None else own_used.to(front.device))
        since = put(since, group.rows, torch.full(behind.shape, model.first_visible_layer, device=front.device))
    if info.causal and info.absolute_column_positions and not everywhere:
        check_equal_numbers(groups, L, B, info)
    predicts = before_token == selection.last[:, None] + 1  # (G, L), whether `start` or `stop` put them there
    late = tuple(sorted({group.model.first_visible_layer for group in groups} - {0}))
    seats = None
    if packing is not None:
        seats = Seats.of_used(used, packing.rows, B)
        empty = front.new_zeros(B, seats.num_slots)  # (B, L)
        tables = (before_token, since, front, used, predicts)
        before_token, since, front, used, predicts = (
            seats.put(empty.to(table.dtype), None, table) for table in tables
        )
    answers = predicts if info.causal else None
    told = None if known and packing is None else used
    layout = arrange(before_token, S, told, answers, since, late, not info.causal, front, seats)  # B rows
    return layout if packing is None else replace(layout, segment_ids=packing.widen(layout)), each


def check_equal_numbers(groups: list[Group], num_slots: int, num_rows: int, info: StackInfo) -> None:
    """Raise a ValueError if not all rows have the same number of slots, where learned positions go by column."""
    full = sum(len(group.rows) for group in groups if group.rows is not None and group.model.num_slots == num_slots)
    if full < num_rows:
        raise ValueError(
            f"The rows of a batch cannot have different numbers of prompt slots in {info.name!r}, whose learned positions go by "
            "column: give all of them adapters with the same `num_virtual_tokens`."
        )


def edges(group: Group, text: Text, selection: InstanceTokens, info: StackInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (G,) before which slots stand: those before the instruction, and those behind it."""
    position = group.model.config.prompt_position
    start = pick(selection.first + (position == "after_first"), group.rows)  # (G,)
    end = selection.last + 1 if info.causal else last_index(text.tokens)  # (B,); in an encoder, before its end token
    if position in PAIR_POSITIONS:
        own = selection.pick(group.rows)
        tokens = pick(text.tokens, own.rows)  # (G, S); a packed row has several instances
        start = at_separator(
            group.model.config, pick(text.ids, own.rows), tokens, own.first, own.last, own.rows
        )  # (G,)
    return start, torch.maximum(start, pick(end, group.rows))


def at_separator(
    config: InstancePromptConfig,
    ids: torch.Tensor | None,
    tokens: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The column (G,) of each instance's first separator, or of the first token of its second sentence.

    Args:
        config (`InstancePromptConfig`): The adapter's config, with the position and the separator.
        ids (`torch.LongTensor`, *optional*): Shape (G, S). The token ids of each instance's row.
        tokens (`torch.BoolTensor`): Shape (G, S). False where there is padding.
        first, last (`torch.LongTensor`): Shape (G,) each. The first token, and the last instruction token.
        rows (`torch.LongTensor`, *optional*): Shape (G,). The numbers of the rows, for messages. Default: 0, 1, ...

    Raises:
        ValueError: A row has no separator behind its first token, or nothing behind it.
    """
    position, separator = config.prompt_position, config.separator_id
    if ids is None:
        raise ValueError(
            f"`prompt_position={position!r}` looks for the separator in `input_ids`, but the model got `inputs_embeds`: pass "
            f"`input_ids`, or choose one of {list(PLAIN_POSITIONS)}."
        )
    ids = ids.to(tokens.device)
    columns = torch.arange(tokens.shape[1], device=tokens.device)  # (S,)
    # Not the first token, since some tokenizers begin a text with the separator. Not the response, which the prompt must not read.
    inside = tokens & (columns > first[:, None]) & (columns <= last[:, None])  # (G, S)
    found = inside & (ids == separator)  # (G, S)
    if position == "after_separator":  # RoBERTa writes two in a row
        found = inside & ~found & (found.cumsum(dim=1) > 0)  # (G, S)
    if (missing := ~found.any(dim=1) & tokens.any(dim=1)).any():
        bad = missing.nonzero().flatten()  # (rows,)
        bad = bad if rows is None else rows.to(bad.device)[bad]  # (rows,)
        raise ValueError(
            f"`prompt_position={position!r}` needs rows of two sentences with the separator {separator} (`separator_id`) between "
            f"them, and row(s) {bad.tolist()} have none{' with text behind it' if position == 'after_separator' else ''}. For "
            f"single sentences choose one of {list(PLAIN_POSITIONS)}."
        )
    return found.int().argmax(dim=1)  # (G,)
