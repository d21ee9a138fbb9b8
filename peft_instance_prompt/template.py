# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The token ids of a `response_template` that was given as text, or as `"chat"`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .config import InstancePromptConfig


def tokenize_template(config: InstancePromptConfig, model: nn.Module) -> list[int]:
    """The ids of a `response_template` that was given as text, or as `"chat"`.

    Raises:
        ValueError: No tokenizer is known, the text has no tokens, or the chat template writes nothing before an answer.
    """
    from transformers import AutoTokenizer

    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError(
            "`response_template` is a text, and no tokenizer is known to turn it into token ids: give "
            "`tokenizer_name_or_path`, or the ids themselves."
        )
    tokenizer = AutoTokenizer.from_pretrained(name)
    if config.response_template == "chat":
        return chat_template_ids(tokenizer, name)
    ids = tokenizer(config.response_template, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"`response_template` {config.response_template!r} has no tokens in the tokenizer {name!r}.")
    return list(ids)


def chat_template_ids(tokenizer: Any, name: str) -> list[int]:
    """The ids that a tokenizer's chat template writes between a user's turn and the assistant's answer."""
    from jinja2 import TemplateError  # with transformers' chat templates, or there is none

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
    if not any(both[i : i + len(ids)] == ids for i in range(len(both))):
        raise ValueError(
            f"The chat template of the tokenizer {name!r} writes {ids} where an answer is to be generated, and something else before "
            f"an answer that is there: {both}. Give the ids that both have in common as `response_template`."
        )
    return list(ids)
