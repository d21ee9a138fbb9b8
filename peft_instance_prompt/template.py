# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Fields of a config that need a tokenizer: `response_template`, `response_end` and `init_text` given as text, and the separator of
two sentences."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from torch import nn
from transformers import AutoTokenizer


UNKNOWN = "`{}` is a text, and no tokenizer is known to turn it into token ids: give `tokenizer_name_or_path`, or the ids themselves."


def tokenize_template(config: Any, model: nn.Module) -> tuple[list[int], list[int] | None]:
    """The ids of a `response_template` that is a text, or `"chat"`; and with `"chat"` those that end an answer, if they can be told.

    Raises:
        ValueError: No tokenizer is known, the text has no tokens, or the chat template writes no fixed ids before an answer.
    """
    if config.response_template != "chat":
        return tokenize_text(config, model, "response_template"), None
    name, tokenizer = load_tokenizer(config, model, UNKNOWN.format("response_template"))
    return chat_template_ids(tokenizer, name)


def tokenize_text(config: Any, model: nn.Module, field: str) -> list[int]:
    """The ids of a text in a field of the config, without special tokens.

    Raises:
        ValueError: No tokenizer is known, or the text has no tokens.
    """
    name, tokenizer = load_tokenizer(config, model, UNKNOWN.format(field))
    ids = tokenizer(getattr(config, field), add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"`{field}` {getattr(config, field)!r} has no tokens in the tokenizer {name!r}.")
    return list(ids)


def find_separator(config: Any, model: nn.Module) -> int:
    """The token that the tokenizer writes between two sentences: its `sep_token`, or its `eos_token` if it has none (T5).

    Raises:
        ValueError: No tokenizer is known, or it has neither token.
    """
    name, tokenizer = load_tokenizer(
        config,
        model,
        f"`prompt_position={config.prompt_position!r}` needs the separator, and no tokenizer is known that has one: give "
        "`tokenizer_name_or_path`, or the token's id as `separator_id`.",
    )
    found = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    if found is None:
        raise ValueError(
            f"`prompt_position={config.prompt_position!r}` needs the separator, and the tokenizer {name!r} has neither a "
            "`sep_token` nor an `eos_token`: give the token's id as `separator_id`."
        )
    return found


def load_tokenizer(config: Any, model: nn.Module, complaint: str) -> tuple[str, Any]:
    """Name and tokenizer: the config's, or else the base model's. Raises a ValueError with the complaint if both are unknown."""
    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError(complaint)
    return name, AutoTokenizer.from_pretrained(name)


def chat_template_ids(tokenizer: Any, name: str) -> tuple[list[int], list[int] | None]:
    """The ids that a tokenizer's chat template writes between a user's turn and the assistant's answer; and those that end an answer.

    An answer ends with the first special token in or behind it, with which generation stops; what the template writes behind that token
    is no part of the answer. None if there is no such token.
    """
    from jinja2 import TemplateError  # not above: only chat templates need jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"`response_template` is 'chat', but the tokenizer {name!r} has no chat template.")
    user, assistant = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
    try:
        plain, prompted, both = (
            tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=True, return_dict=False)
            for turns, prompt in (([user], False), ([user], True), ([user, assistant], False))
        )
    except TemplateError as error:
        raise ValueError(
            f"The chat template of the tokenizer {name!r} refuses a user's turn and an assistant's answer ({error}): give "
            "`response_template` as token ids."
        ) from error
    ids = prompted[len(plain) :] if prompted[: len(plain)] == plain else []
    if not ids:
        raise ValueError(
            f"The chat template of the tokenizer {name!r} writes nothing between a user's turn and the answer that could be "
            "searched for (`add_generation_prompt` adds nothing at the end): give `response_template` as token ids."
        )
    start = next((i for i in range(len(both)) if both[i : i + len(ids)] == ids), None)
    if start is None:
        raise ValueError(
            f"The chat template of the tokenizer {name!r} writes {ids} where an answer is to be generated, and something else before "
            f"an answer that is there: {both}. Give the ids that both have in common as `response_template`."
        )
    special = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
    return list(ids), next(([token] for token in both[start + len(ids) :] if token in special), None)


def tokenize_init_text(config: Any, model: nn.Module, vocab_size: int) -> list[int]:
    """The ids of an `init_text`, without special tokens.

    Raises:
        ValueError: No tokenizer is known, the text has no tokens or more than there are slots, or an id is outside the base
            model's vocabulary.
    """
    ids = config.init_text
    if isinstance(ids, str):
        ids = tokenize_text(config, model, "init_text")
    ids = list(ids or ())
    if len(ids) > config.num_virtual_tokens:
        raise ValueError(
            f"`init_text` must have at most `num_virtual_tokens` {config.num_virtual_tokens} tokens, got {len(ids)}: "
            f"{config.init_text!r}."
        )
    if outside := [number for number in ids if number >= vocab_size]:
        raise ValueError(f"`init_text` must have ids below {vocab_size}, the size of the vocabulary, got {outside}.")
    return ids


# What transformers raises for a tokenizer that is not there or whose files it cannot read.
UNREADABLE = (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError)


def find_tokenizer(name: str | None) -> Any:
    """The tokenizer of that name; None if it is not on this machine."""
    if not name:
        return None
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
