# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which tokens of a chat lie in an answer, told from what stands before each only; and so, which positions the adapters edit.

A pass begins a text, or goes on from a cache. Shapes: B rows, S tokens of this pass, T tokens so far, N positions in the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import InstanceConfig
from .adapters import Group, pick, put
from .cache import SlotCache
from .calls import inputs_of
from .request import Request
from .slots import CachedText, Layout, insert
from .stack import StackInfo
from .tokens import Text


SHOWN = 6  # rows or token ids in a message, at most


def numbers(rows: torch.Tensor) -> str:
    """The numbers of the rows that are True among `rows` (B,)."""
    return clipped(rows.nonzero().flatten().tolist())


def clipped(values: list[int], end: bool = False) -> str:
    """Numbers for a message: the first few, or with `end` the last few."""
    if len(values) <= SHOWN:
        return str(values)
    shown = ", ".join(map(str, values[-SHOWN:] if end else values[:SHOWN]))
    return f"[..., {shown}]" if end else f"[{shown}, ...]"


def from_length(length: int, tokens: torch.Tensor) -> torch.Tensor:
    """Rule 2 for plain text: the first `length` tokens of each row, (B, S)."""
    return tokens & (tokens.cumsum(dim=1) <= length)  # (B, S)


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


def edit_groups(groups: list[Group], scope: torch.Tensor, layout: Layout | None) -> list[Group]:
    """The groups whose adapters edit states, with the positions that they edit.

    Args:
        groups (`list[Group]`): The groups, by rows of the batch.
        scope (`torch.BoolTensor`): Shape (B, S). The instruction tokens.
        layout (`Layout`, *optional*): Where slots of other rows and tokens stand, if there are slots.
    """
    own = [group for group in groups if group.model.edits]
    if own and layout is not None:
        scope = insert(scope, scope.new_zeros(len(scope), layout.num_slots), layout)  # (B, N)
    return [replace(group, edited=pick(scope, group.rows)) for group in own]


def begin_text(
    groups: list[Group], names: list[str | None], text: Text, request: Request, info: StackInfo
) -> CachedText | None:
    """What the cache that this pass fills is to keep of the text; None if no adapter edits states, or rows are packed."""
    if text.packing is not None or not any(group.model.edits for group in groups):
        return None
    if info.decoder_of_pair:  # its instruction is its start token
        return CachedText(names, request.generate_call, prompt_length=1, mask=text.mask)
    configs = [generator.config for group in groups for generator in group.generators]
    templates = any(config.response_template is not None for config in configs)
    by_role = templates or any(config.instruction_length is not None for config in configs)
    ids: list[torch.Tensor] | None = [] if templates else None
    kept = CachedText(names, request.generate_call, request.prompt_length, text.mask, by_role=by_role, parts=ids)
    kept.add(text.ids, text.tokens.shape[1])
    return kept


def resume_edits(
    groups_now: Callable[[Request, torch.Tensor], tuple[list[Group], list[str | None]]],
    request: Request,
    call: Mapping[str, Any],
    cache: SlotCache,
) -> list[Group]:
    """The groups that edit some of the S tokens of a pass that goes on from a cache; none in a step of decoding.

    Args:
        groups_now (`Callable`): Takes the request and the tokens; returns the groups of the adapters that are active now, and by row the
            names of these adapters.
        request (`Request`): The request.
        call (`Mapping`): The arguments of the stack.
        cache (`SlotCache`): The cache. What it keeps of the text grows by the tokens of this pass.

    Raises:
        ValueError: The cache was filled with a different adapter; or the tokens to edit cannot be told.
    """
    tokens, seen, text = inputs_of(call), cache.get_seq_length(), cache.table.text  # tokens (B, S, ...)
    assert text is not None  # the cache was filled by an adapter that edits
    B, S = tokens.shape[:2]
    ids = request.input_ids if call.get("input_ids") is None else call["input_ids"]
    text.add(ids if ids is None or ids.shape == (B, S) else None, S)
    inside = S  # how many of the new tokens `generate` has not sampled: it samples behind its prompt
    if request.generate_call is not None:
        goes_on = request.generate_call == text.generate_call
        bound = (text.prompt_length if goes_on else request.prompt_length) or 0
        inside = min(max(bound - seen, 0), S)
    elif request.instruction_mask is None and not text.by_role:
        inside = 0  # a plain call
    if inside == 0:
        return []
    groups, names = groups_now(request, tokens)
    groups = [group for group in groups if group.model.edits]
    request = request.of_rows(B, None)
    edited = torch.zeros(B, S, dtype=torch.bool, device=tokens.device)  # (B, S)
    real, given = edited.new_ones(B, seen + S), call.get("attention_mask")  # (B, T)
    if isinstance(given, torch.Tensor) and given.shape == real.shape:
        real = given.bool().to(real.device)
    for group in groups:
        for generator, rows in group:
            told = edited_tokens(generator.config, request, text, real, S)  # (B, S)
            told[:, inside:] = False
            edited = put(edited, rows, told if rows is None else told[rows.to(told.device)])  # (B, S)
    if not edited.any():
        return []
    if names != text.names:
        now, then = next((now, then) for now, then in zip(names, text.names) if now != then)
        raise ValueError(
            f"The cache was filled with the adapter {then!r}, and {now!r} is active: activate {then!r} to go on with the text, or start from "
            "an empty cache."
        )
    return [replace(group, edited=pick(edited, group.rows)) for group in groups]


def edited_tokens(
    config: InstanceConfig, request: Request, text: CachedText, real: torch.Tensor, num_new: int
) -> torch.Tensor:
    """Which of the S new tokens (B, S) of a text an adapter edits, by its config. `real` (B, T) is False where there is padding."""
    (B, T), S = real.shape, num_new
    new = real[:, T - S :].clone()  # (B, S)
    if request.instruction_mask is not None:
        return new & mask_of_new(request.instruction_mask, B, T - S, S).to(new.device)
    if config.instruction_length is not None:
        return from_length(config.instruction_length, real)[:, T - S :].clone()
    template, end = config.response_template, config.response_end
    if template is None:
        return new if request.generate_call is not None else torch.zeros_like(new)
    ids = text.ids  # (B, T)
    if ids is None or ids.shape != real.shape:
        raise ValueError(
            "Which of the new tokens lie in an answer is not known, since the cache was filled with `inputs_embeds`: pass "
            "`instruction_mask`."
        )
    assert not (isinstance(template, str) or isinstance(end, str))  # attaching the adapter turned them into ids
    return new & ~in_answers(template, end, ids.to(new.device), real)[:, T - S :]


def mask_of_new(instruction_mask: torch.Tensor, num_rows: int, seen: int, num_new: int) -> torch.Tensor:
    """The part (B, S) of an `instruction_mask` that is for the S new tokens, of a mask for these or for all tokens so far or later ones."""
    B, S, shape = num_rows, num_new, tuple(instruction_mask.shape)
    if shape != (B, S) and (len(shape) != 2 or shape[0] != B or shape[1] < seen + S):
        raise ValueError(
            f"`instruction_mask` must have the shape of the new tokens, {(B, S)}, or of all, {(B, seen + S)}; got {shape}."
        )
    return (
        instruction_mask.bool()[:, -S:] if shape == (B, S) else instruction_mask.bool()[:, seen : seen + S]
    )  # (B, S)
