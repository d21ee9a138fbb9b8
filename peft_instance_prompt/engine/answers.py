# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which tokens of a chat lie in an answer, told from what stands before each of them only.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from .complaints import numbers


def ends_of(wanted: list[int], input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Where the token ids `wanted` end in `input_ids` (B, S): a bool (B, S), without those that begin in padding of `tokens` (B, S)."""
    k, hit = len(wanted), torch.zeros_like(tokens)  # (B, S)
    if tokens.shape[1] >= k:
        same = input_ids.unfold(1, k, 1) == torch.tensor(wanted, device=input_ids.device)  # (B, S - k + 1, k)
        hit[:, k - 1 :] = same.all(dim=-1).to(tokens.device) & tokens[:, : tokens.shape[1] - k + 1]
    return hit


def in_answers(
    template: list[int], end: list[int] | None, input_ids: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The tokens (B, S) that lie in an answer: those behind `template` up to the last token of `end`, or of the row if `end` is None.

    Args:
        template, end (`list[int]`): The adapter's `response_template` and `response_end`.
        input_ids (`torch.LongTensor`): Shape (B, S).
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.

    Raises:
        ValueError: A row has several answers, and where one ends is not known.
    """
    opens = ends_of(template, input_ids, tokens)  # (B, S)
    if end is None:
        if (rows := opens.sum(dim=1) > 1).any():
            raise ValueError(
                f"Where an answer ends is not known, and row(s) {numbers(rows)} have several: set `response_end`, the token ids that end an "
                "answer (`response_template='chat'` finds them)."
            )
        return opens.cumsum(dim=1) - opens.long() > 0  # (B, S)
    closes = ends_of(end, input_ids, tokens) & ~opens  # (B, S)
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)  # (S,)
    opened, closed = (torch.where(one, place, 0).cummax(dim=1).values for one in (opens, closes))  # (B, S) each
    return nn.functional.pad(opened > closed, (1, -1))  # (B, S), from behind the token that opens or closes


def outside_answers(
    template: list[int],
    end: list[int] | None,
    input_ids: torch.Tensor,
    tokens: torch.Tensor,
    without_template: torch.Tensor,
    asked: torch.Tensor | None,
    special_ids: tuple[int, ...],
) -> torch.Tensor:
    """The tokens (B, S) that lie in no answer.

    Args:
        template, end, input_ids, tokens: As in [`in_answers`].
        without_template (`torch.BoolTensor`): Shape (B, S). What holds for a row in which the template does not occur.
        asked (`torch.BoolTensor`, *optional*): Shape (B, S). The tokens that have a label.
        special_ids (`tuple[int]`): The ids of the model's special tokens.

    Raises:
        ValueError: As in [`in_answers`]; or labels begin in the midst of what lies in no answer.
    """
    found = ends_of(template, input_ids, tokens).any(dim=1, keepdim=True)  # (B, 1)
    outside = torch.where(found, tokens & ~in_answers(template, end, input_ids, tokens), without_template)  # (B, S)
    if asked is not None:
        special = torch.isin(input_ids, torch.tensor(special_ids, device=input_ids.device)).to(tokens.device)  # (B, S)
        unlabelled = nn.functional.pad(outside & ~asked & ~special, (1, -1))  # (B, S), of the token before
        if (rows := (outside & asked & unlabelled & found).any(dim=1)).any():
            raise ValueError(
                f"`labels` contradict `response_template` in row(s) {numbers(rows)}: they begin at a token that lies in no answer. Set -100 "
                "for all tokens up to the end of the template, or give the template that ends where answers begin."
            )
    return outside
