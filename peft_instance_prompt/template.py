# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What a config leaves to the tokenizer: the ids of a `response_template` that was given as text, or as `"chat"`; the separator."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import InstancePromptConfig


def tokenize_template(config: InstancePromptConfig, model: nn.Module) -> list[int]:
    """The ids of a `response_template` that was given as text, or as `"chat"`.

    Raises:
        ValueError: No tokenizer is known, the text has no tokens, or the chat template writes nothing before an answer.
    """
    name, tokenizer = load_tokenizer(
        config,
        model,
        "`response_template` is a text, and no tokenizer is known to turn it into token ids: give "
        "`tokenizer_name_or_path`, or the ids themselves.",
    )
    if config.response_template == "chat":
        return chat_template_ids(tokenizer, name)
    ids = tokenizer(config.response_template, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"`response_template` {config.response_template!r} has no tokens in the tokenizer {name!r}.")
    return list(ids)


def find_separator(config: InstancePromptConfig, model: nn.Module) -> int:
    """The token that the tokenizer writes between two sentences: its `sep_token`, or its `eos_token` if it has none (T5).

    Raises:
        ValueError: No tokenizer is known, or it has neither.
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


def load_tokenizer(config: InstancePromptConfig, model: nn.Module, complaint: str) -> tuple[str, Any]:
    """The tokenizer of a config or of its base model, with its name; a ValueError with the complaint if none is known."""
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError(complaint)
    return name, AutoTokenizer.from_pretrained(name)


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
