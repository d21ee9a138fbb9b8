# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The token ids of a `response_template` or an `init_text` that was given as text, or as `"chat"`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import InstancePromptConfig


def tokenize_template(config: InstancePromptConfig, model: nn.Module) -> list[int]:
    """The ids of a `response_template` that was given as text, or as `"chat"`.

    Raises:
        ValueError: No tokenizer is known, the text has no tokens, or the chat template writes nothing before an answer.
    """
    tokenizer, name = tokenizer_of(config, model, "response_template")
    if config.response_template == "chat":
        return chat_template_ids(tokenizer, name)
    return text_ids(config, "response_template", tokenizer, name)


def tokenize_init_text(config: InstancePromptConfig, model: nn.Module, vocab_size: int) -> list[int]:
    """The ids of an `init_text`.

    Raises:
        ValueError: No tokenizer is known, the text has no tokens or more than there are slots, or the base model lacks an id.
    """
    if isinstance(config.init_text, str):
        ids = text_ids(config, "init_text", *tokenizer_of(config, model, "init_text"))
    else:
        ids = list(config.init_text or ())
    if len(ids) > config.num_virtual_tokens:
        raise ValueError(
            f"`init_text` must have at most `num_virtual_tokens` {config.num_virtual_tokens} tokens, got {len(ids)}: "
            f"{config.init_text!r}."
        )
    if outside := [number for number in ids if number >= vocab_size]:
        raise ValueError(f"`init_text` must have ids below {vocab_size}, the size of the vocabulary, got {outside}.")
    return ids


def tokenizer_of(config: InstancePromptConfig, model: nn.Module, field: str) -> tuple[Any, str]:
    """The tokenizer for a field that is a text, and its name."""
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError(
            f"`{field}` is a text, and no tokenizer is known to turn it into token ids: give "
            "`tokenizer_name_or_path`, or the ids themselves."
        )
    return AutoTokenizer.from_pretrained(name), name


def text_ids(config: InstancePromptConfig, field: str, tokenizer: Any, name: str) -> list[int]:
    """The ids of a field that is a text, without special tokens."""
    ids = tokenizer(getattr(config, field), add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"`{field}` {getattr(config, field)!r} has no tokens in the tokenizer {name!r}.")
    return list(ids)


def chat_template_ids(tokenizer: Any, name: str) -> list[int]:
    """The ids that a tokenizer's chat template writes between a user's turn and the assistant's answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"`response_template` is 'chat', but the tokenizer {name!r} has no chat template.")
    user = [{"role": "user", "content": "1"}]
    plain, prompted = (
        tokenizer.apply_chat_template(user, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        for prompt in (False, True)
    )
    ids = prompted[len(plain) :] if prompted[: len(plain)] == plain else []
    if not ids:
        raise ValueError(
            f"The chat template of the tokenizer {name!r} writes nothing between a user's turn and the answer that could be "
            "searched for (`add_generation_prompt` adds nothing at the end): give `response_template` as token ids."
        )
    both = tokenizer.apply_chat_template(
        [*user, {"role": "assistant", "content": "2"}], tokenize=True, return_dict=False
    )
    if not any(both[i : i + len(ids)] == ids for i in range(len(both))):
        raise ValueError(
            f"The chat template of the tokenizer {name!r} writes {ids} where an answer is to be generated, and something else before "
            f"an answer that is there: {both}. Give the ids that both have in common as `response_template`."
        )
    return list(ids)
