# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which positions of a pass the adapters edit, in a pass that begins a text and in one that goes on from a cache.

Shapes: B rows, S tokens of this pass, T tokens so far, N positions in the stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .answers import in_answers
from .batch import Group, pick, put
from .layout import CachedText, Layout, insert
from .request import Request
from .scope import Rules
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


def begin_text(groups: list[Group], names: list[str | None], text: Text, request: Request) -> CachedText | None:
    """What the cache that this pass fills is to keep of the text; None if no adapter edits states, or rows are packed."""
    own = [group.model for group in groups if group.model.edits]
    if not own or text.packing is not None:
        return None
    needs_ids = any(
        generator.config.response_template is not None for group in groups for generator in group.generators
    )
    kept = CachedText(names, request.generate_call, request.prompt_length, [] if needs_ids else None)
    kept.add(text.ids)
    return kept


def resume_edits(
    groups: list[Group],
    names: list[str | None],
    request: Request,
    call: Mapping[str, Any],
    seen: int,
    text: CachedText,
) -> list[Group]:
    """The groups that edit some of the S tokens of a pass that goes on from a cache of `seen` tokens; none in a step of decoding.

    Args:
        groups (`list[Group]`): The groups of the adapters that are active now.
        names (`list[str]`): By row: the name of the adapter that is active now.
        request (`Request`): The request.
        call (`Mapping`): The arguments of the stack.
        seen (`int`): The number of tokens in the cache.
        text (`CachedText`): What the cache keeps of them. This pass's tokens are in it already.

    Raises:
        ValueError: The cache was filled with a different adapter; or the tokens to edit cannot be told.
    """
    tokens = call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]  # (B, S, ...)
    B, S = tokens.shape[:2]
    shown = request.instruction_mask
    # What `generate` samples stands behind its prompt.
    inside = S
    if request.generate_call is not None:
        goes_on = request.generate_call == text.generate_call
        bound = (text.prompt_length if goes_on else request.prompt_length) or 0
        inside = min(max(bound - seen, 0), S)
    own = [group for group in groups if group.model.edits]
    if inside == 0 or not own:
        return []
    plain = request.generate_call is None and shown is None
    if plain and all(generator.config.response_template is None for group in own for generator in group.generators):
        return []
    edited = torch.zeros(B, S, dtype=torch.bool, device=tokens.device)  # (B, S)
    mask, real = edited.new_ones(B, seen + S), call.get("attention_mask")  # (B, T)
    if isinstance(real, torch.Tensor) and real.shape == mask.shape:
        mask = real.bool().to(mask.device)
    for group in own:
        for generator, rows in group:
            rules = Rules.of(generator.config, edits=True)
            if shown is not None:
                told = mask_of_new(shown, B, seen, S).to(edited.device)  # (B, S)
            elif rules.template is not None:
                ids = text.ids
                if ids is None or ids.shape != (B, seen + S):
                    raise ValueError(
                        "Which of the new tokens lie in an answer is not known, since the cache was filled with `inputs_embeds`: pass "
                        "`instruction_mask`."
                    )
                told = ~in_answers(rules.template, rules.end, ids.to(edited.device), mask)[:, seen:]  # (B, S)
            else:
                told = edited.new_full((B, S), not plain)  # (B, S)
            told = told & (torch.arange(S, device=edited.device) < inside) & mask[:, seen:]  # (B, S)
            edited = put(edited, rows, told if rows is None else told[rows.to(told.device)])  # (B, S)
    if not edited.any():
        return []
    if names != text.names:
        now, then = next((now, then) for now, then in zip(names, text.names) if now != then)
        raise ValueError(
            f"The cache was filled with the adapter {then!r}, and {now!r} is active: activate {then!r} to go on with the text, or start from "
            "an empty cache."
        )
    return [replace(group, edited=pick(edited, group.rows)) for group in own]


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
