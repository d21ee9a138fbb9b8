# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which positions of a pass the adapters edit, in a pass that begins a text and in one that goes on from a cache.

Shapes: B rows, S tokens of this pass, T tokens so far, N positions in the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from .answers import in_answers
from .batch import Group, pick, put
from .layout import CachedText, Layout, insert
from .request import Request
from .scope import Rules, from_length
from .stack import StackInfo
from .text import Text


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
    kept = CachedText(names, request.generate_call, request.prompt_length, text.mask, by_role, ids)
    kept.add(text.ids)
    return kept


def resume_edits(
    find_groups: Callable[[], tuple[list[Group], list[str | None]]],
    request: Request,
    call: Mapping[str, Any],
    seen: int,
    text: CachedText,
) -> list[Group]:
    """The groups that edit some of the S tokens of a pass that goes on from a cache of `seen` tokens; none in a step of decoding.

    Args:
        find_groups (`Callable`): Returns the groups of the adapters that are active now, and by row the names of these adapters.
        request (`Request`): The request.
        call (`Mapping`): The arguments of the stack.
        seen (`int`): The number of tokens in the cache.
        text (`CachedText`): What the cache keeps of them. This pass's tokens are in it already.

    Raises:
        ValueError: The cache was filled with a different adapter; or the tokens to edit cannot be told.
    """
    tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]  # (B, S, ...)
    B, S = tokens.shape[:2]
    inside = S  # how many of the new tokens `generate` has not sampled: it samples behind its prompt
    if request.generate_call is not None:
        goes_on = request.generate_call == text.generate_call
        bound = (text.prompt_length if goes_on else request.prompt_length) or 0
        inside = min(max(bound - seen, 0), S)
    elif request.instruction_mask is None and not text.by_role:
        inside = 0  # a plain call
    if inside == 0:
        return []
    request = request.of_rows(B, None)
    groups, names = find_groups()
    groups = [group for group in groups if group.model.edits]
    edited = torch.zeros(B, S, dtype=torch.bool, device=tokens.device)  # (B, S)
    real, given = edited.new_ones(B, seen + S), call.get("attention_mask")  # (B, T)
    if isinstance(given, torch.Tensor) and given.shape == real.shape:
        real = given.bool().to(real.device)
    for group in groups:
        for generator, rows in group:
            told = edited_tokens(Rules.of(generator.config, edits=True), request, text, real, S)  # (B, S)
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


def edited_tokens(rules: Rules, request: Request, text: CachedText, real: torch.Tensor, num_new: int) -> torch.Tensor:
    """Which of the S new tokens (B, S) of a text an adapter edits, by its rules. `real` (B, T) is False where there is padding."""
    (B, T), S = real.shape, num_new
    new = real[:, T - S :].clone()  # (B, S)
    if request.instruction_mask is not None:
        return new & mask_of_new(request.instruction_mask, B, T - S, S).to(new.device)
    if rules.instruction_length is not None:
        return from_length(rules.instruction_length, real)[:, T - S :].clone()
    if rules.template is None:
        return new if request.generate_call is not None else torch.zeros_like(new)
    ids = text.ids  # (B, T)
    if ids is None or ids.shape != real.shape:
        raise ValueError(
            "Which of the new tokens lie in an answer is not known, since the cache was filled with `inputs_embeds`: pass "
            "`instruction_mask`."
        )
    return new & ~in_answers(rules.template, rules.end, ids.to(new.device), real)[:, T - S :]


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
