# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Where the slots of each row stand among its tokens.

Shapes: B rows, S tokens, L slots, G rows of one group of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import PAIR_POSITIONS, PLAIN_POSITIONS
from ..nn.pooling import last_index
from .batch import Group, pick, put
from .instances import Selection
from .layout import Layout, arrange
from .stack import StackInfo


@dataclass(frozen=True)
class Text:
    """The tokens that a stack is called with.

    Attributes:
        ids (`torch.LongTensor`, *optional*): Shape (B, S). None if they are not known.
        embeds (`torch.Tensor`): Shape (B, S, e).
        mask (`torch.Tensor`, *optional*): Shape (B, S). As the caller gave it, or None.
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor
    mask: torch.Tensor | None
    tokens: torch.Tensor


def place_slots(groups: list[Group], text: Text, selection: Selection, info: StackInfo) -> Layout:
    """Ask the adapters where their slots stand, and lay out the rows.

    Raises:
        ValueError: Rows have different numbers of slots in a stack that counts its positions itself.
    """
    B, S = text.tokens.shape
    L = max(group.model.num_slots for group in groups)
    everywhere = all(group.rows is None for group in groups)
    front = selection.first[:, None].expand(B, L)  # (B, L)
    before_token, since = front, torch.zeros_like(front)  # (B, L) each
    live = torch.full_like(text.tokens[:, :1], everywhere).expand(B, L)  # (B, L)
    predicts = torch.zeros_like(live)  # (B, L)
    for group in groups:
        model, own = group.model, selection.pick(group.rows)
        behind, used = model.place(own.mask, group.vector)  # (G, l) each
        behind = behind.to(front.device)
        start, stop = edges(group, text, selection, info)  # (G,) each
        if info.numbers_columns and not info.causal and model.first_visible_layer > 0:
            # Where only learned positions tell the columns apart, late vectors, which have none, may stand in any of them: behind
            # the last token they move no other.
            start = stop = torch.full_like(start, S)  # (G,)
        before_token = put(before_token, group.rows, torch.where(behind, stop[:, None], start[:, None]))
        live = put(live, group.rows, torch.ones_like(behind) if used is None else used.to(front.device))
        predicts = put(predicts, group.rows, behind)
        since = put(since, group.rows, torch.full(behind.shape, model.first_visible_layer, device=front.device))
    full = sum(len(group.rows) for group in groups if group.rows is not None and group.model.num_slots == L)
    if info.causal and info.numbers_columns and not everywhere and full < B:
        raise ValueError(
            f"The rows of a batch cannot have different numbers of prompt slots in {info.name!r}, which counts its positions "
            "itself: give all of them adapters with the same `num_virtual_tokens`."
        )
    late = tuple(sorted({group.model.first_visible_layer for group in groups} - {0}))
    return arrange(before_token, S, live, predicts if info.causal else None, since, late, dead_at_end=not info.causal)


def edges(group: Group, text: Text, selection: Selection, info: StackInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens before which the slots of each instance (G,) stand: those before the instruction, and those behind it."""
    position = group.model.config.prompt_position
    start = pick(selection.first + (position == "after_first"), group.rows)  # (G,)
    end = selection.last + 1 if info.causal else last_index(text.tokens)  # (B,); an encoder's end token stays the last
    if position in PAIR_POSITIONS:
        start = at_separator(group, text, selection.pick(group.rows))  # (G,)
    return start, torch.maximum(start, pick(end, group.rows))


def at_separator(group: Group, text: Text, selection: Selection) -> torch.Tensor:
    """The first separator (G,) of each of a group's rows that hold two sentences, or the first token of the second sentence.

    Raises:
        ValueError: A row has no separator behind its first token, or nothing behind it.
    """
    position, separator = group.model.config.prompt_position, group.model.config.separator_id
    if text.ids is None:
        raise ValueError(
            f"`prompt_position={position!r}` looks for the separator in `input_ids`, but the model got `inputs_embeds`: pass "
            f"`input_ids`, or choose one of {list(PLAIN_POSITIONS)}."
        )
    tokens, ids = pick(text.tokens, group.rows), pick(text.ids, group.rows).to(text.tokens.device)  # (G, S) each
    columns = torch.arange(tokens.shape[1], device=tokens.device)  # (S,)
    # Not the first token: some tokenizers begin a text with what ends it. Nor the response, which the prompt must not depend on.
    inside = tokens & (columns > selection.first[:, None]) & (columns <= selection.last[:, None])  # (G, S)
    found = inside & (ids == separator)  # (G, S)
    if position == "after_separator":  # RoBERTa writes two in a row
        found = inside & ~found & (found.cumsum(dim=1) > 0)  # (G, S)
    if (missing := ~found.any(dim=1) & tokens.any(dim=1)).any():
        rows = missing.nonzero().flatten()  # (rows,)
        rows = rows if group.rows is None else group.rows.to(rows.device)[rows]
        raise ValueError(
            f"`prompt_position={position!r}` needs rows of two sentences with the separator {separator} (`separator_id`) between "
            f"them, and row(s) {rows.tolist()} have none{' with text behind it' if position == 'after_separator' else ''}. For "
            f"single sentences choose one of {list(PLAIN_POSITIONS)}."
        )
    return found.int().argmax(dim=1)  # (G,)
