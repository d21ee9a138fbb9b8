# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Messages for rows whose scope cannot be told: the cause first, then one cure."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch


CURE = (
    "Mark the instruction: by -100 in `labels`, by `instruction_mask`, or in the config by `response_template` (chats: 'chat') or, in "
    "plain text, `instruction_length`."
)
WRAPPED = (
    "Packing that cuts texts anywhere makes such rows of any data (TRL: `packing_strategy='wrapped'`): use 'bfd'."
)
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


def all_scored(rows: torch.Tensor, but: str, some: bool) -> str:
    """The message for rows (B,) without -100 in their labels, except on the tokens that `but` names; `some` rows of a batch, or all."""
    why = " (BOS is masked)" if but else ""
    cut = " (`packing_strategy='wrapped'` cuts texts.)" if some and not but else ""  # other rows have an instruction
    return f"All tokens of row(s) {numbers(rows)}{but} are scored{why}: a prompt would read what it is to predict. {CURE}{cut}"


def no_instruction(rows: torch.Tensor, but: str) -> str:
    """The message for rows (B,) that begin in a response, apart from the tokens that `but` names."""
    return (
        f"No token{but} is left for the prompt to be generated from in row(s) {numbers(rows)}: they begin in a response, since -100 "
        f"comes later in their `labels`. {WRAPPED}"
    )


def without_template(
    template: list[int], input_ids: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor, tokenizer: str | None
) -> str:
    """The message for rows (B,) in which the template does not occur: in text if the tokenizer is on this machine, else in token ids.

    Args:
        template (`list[int]`): The template.
        input_ids (`torch.LongTensor`): Shape (B, S).
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        rows (`torch.BoolTensor`): Shape (B,).
        tokenizer (`str`, *optional*): The tokenizer's name.
    """
    row = int(rows.nonzero()[0])
    ids = input_ids[row][tokens[row].to(input_ids.device)].tolist()
    known = find_tokenizer(tokenizer)
    if known is None:
        wanted, end = clipped(template), f"the tokens {clipped(ids, end=True)}"
    else:
        text = known.decode(template)
        wanted, end = repr(text[:30]), repr(known.decode(ids[-16:])[-30:])
        if (own := find_text(text.strip(), ids, known)) is not None:
            return (
                f"`response_template` {wanted} does not occur in row(s) {numbers(rows)} as the tokens {clipped(template)}: row "
                f"{row} has its text as {own}, since a space at its end, or what stands beside it, changes tokens. Give these ids."
            )
    return (
        f"`response_template` {wanted} does not occur in row(s) {numbers(rows)}: row {row} ends in {end}. Write it as the data do, "
        "spaces included; for rows that were cut off before the response, set `missing_template='all'`."
    )


# What transformers raises for a tokenizer that is not there or whose files it cannot read.
UNREADABLE = (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError)


def find_tokenizer(name: str | None) -> Any:
    """The tokenizer of that name; None if it is not on this machine."""
    if not name:
        return None
    from transformers import AutoTokenizer

    try:
        # Without an answer about remote code, transformers would ask for one at the keyboard.
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The complaint is about the template, and is made of ids then. `tokenizers` raises `Exception` itself.
        if type(error) is Exception or isinstance(error, UNREADABLE):
            return None
        raise


def find_text(text: str, ids: list[int], tokenizer: Any) -> list[int] | None:
    """The tokens of a row that spell a text, with nothing beside it but spaces; None if there are none."""
    if not text or text not in tokenizer.decode(ids):
        return None
    stop = bisect_left(range(len(ids)), True, key=lambda n: text in tokenizer.decode(ids[:n]))
    start = bisect_left(range(stop), True, key=lambda n: text not in tokenizer.decode(ids[n:stop])) - 1
    found = ids[start:stop]
    return found if tokenizer.decode(found).strip() == text else None
