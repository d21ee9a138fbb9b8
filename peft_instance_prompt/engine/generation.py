# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Wrappers of a base model's `generate`: note the prompt, since later passes see longer rows, and refuse what cannot work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count
from typing import Any

import torch
from torch import nn

from .cache import SlotCache
from .calls import cache_of, declared, named
from .request import OWN_ARGUMENTS, Adapters, GrowingText, adapters_of, check_kinds, known_of, note
from .wrap import MethodWrapper


NUMBERS = count()  # of the calls of `generate` in this process


class Generate(MethodWrapper):
    """The base model's `generate`.

    Args:
        instruction_mask (`torch.Tensor`, *optional*): Shape (B, S), bool or 0/1. True for the tokens that the prompt is generated from.
            Default: by the adapter's `response_template` or `instruction_length`, else all tokens but padding.
        instance_embeds (`torch.Tensor`, *optional*): Shape (B, k). Instance vectors, for methods that take them. Default: none.
        task_ids (`torch.LongTensor`, *optional*): Shape (B,). The task of each row, for adapters over several tasks. Default: none.
        *args, **kwargs: As for the base model.

    Raises:
        ValueError: An argument and the input differ in their number of rows, or `prefill_chunk_size` is set and an adapter has slots.
    """

    method = "generate"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        model = self.module
        given = {name: kwargs.pop(name, None) for name in OWN_ARGUMENTS}
        call, adapters = named(model, self.method, args, kwargs), adapters_of(model)
        chunk = setting(model, call, "prefill_chunk_size")
        if chunk is not None and has_slots(adapters, known_of(model).adapter_names):
            raise ValueError(
                "Instance prompts cannot be used with `prefill_chunk_size`: they are generated from the whole instruction, "
                f"of which a chunk shows only a part. Set it to None, got {chunk!r}."
            )
        kwargs = declared(kwargs, model)
        name, cache = cache_of(kwargs)
        if name is not None and (cache := SlotCache.find(cache)) is not None:
            kwargs[name] = cache
        inputs, ids = prompt_of(call)
        # A call inside a call of `generate`, such as an assistant's, may continue the same prompt.
        known = known_of(model) if inputs is None else known_of(model).of_tokens(ids, inputs)
        fields = {name: getattr(known, name) if value is None else value for name, value in given.items()}
        if inputs is not None:
            check_rows(fields, known.adapter_names, inputs.shape[0])
        check_kinds(fields)
        texts = growing_texts(model, call, known.prompt_length if given["instruction_mask"] is None else None)
        with note(
            model,
            prompt_length=texts[0].shape[1] if texts else None,
            texts=texts,
            prompt_mask=fields["instruction_mask"],
            adapters=adapters,
            generate_call=next(NUMBERS),
            **fields,
        ):
            return self.call_wrapped(*args, **kwargs)


def has_slots(adapters: Adapters, names: Collection[str] | None) -> bool:
    """Whether one of the adapters that a call is for has slots: those with these `names`; None: those that are active."""
    used = [
        own[name] for active, own in adapters.values() for name in (active if names is None else names) if name in own
    ]
    return any(generator.num_slots for generator in used)


def setting(model: nn.Module, call: Mapping[str, Any], name: str) -> Any:
    """The value of a setting in a call of `generate`: the argument, even if None, else the caller's config, else the model's."""
    configs = (call.get("generation_config"), getattr(model, "generation_config", None))
    said = (value for config in configs if (value := getattr(config, name, None)) is not None)
    return call[name] if name in call else next(said, None)


def prompt_of(call: Mapping[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The prompt of a call of `generate`: token ids (B, P) or embeddings (B, P, e); and its ids, or None if they are not known."""
    ids = call.get("input_ids") if call.get("inputs") is None else call["inputs"]
    inputs = ids if call.get("inputs_embeds") is None else call["inputs_embeds"]
    if not isinstance(inputs, torch.Tensor) or inputs.dim() < 2:
        return None, None
    told = isinstance(ids, torch.Tensor) and not ids.is_floating_point() and ids.shape[:2] == inputs.shape[:2]
    return inputs, ids if told else None


def growing_texts(model: nn.Module, call: Mapping[str, Any], bound: int | None) -> tuple[GrowingText, ...]:
    """The texts that a call of `generate` extends, its prompt first; none if the prompt is not known.

    Args:
        model (`nn.Module`): The model.
        call (`Mapping`): The arguments by name.
        bound (`int`, *optional*): The prompt length of the `generate` around this call: later columns were generated there. Default: P.
    """
    inputs, ids = prompt_of(call)
    if inputs is None:
        start = setting(model, call, "bos_token_id")
        if call.get(getattr(model, "main_input_name", "")) is not None or not isinstance(start, int):
            return ()
        inputs = ids = torch.tensor([[start]])  # (1, 1), whatever the number of rows
    B, P = inputs.shape[:2]
    length = P if bound is None else bound
    in_parts = setting(model, call, "prefill_chunk_size") is not None
    texts = [GrowingText((B, length), None if ids is None else ids[:, :length], P, in_parts)]
    unlike = call.get("negative_prompt_ids")  # (B, Q)
    if unlike is None and ids is not None and setting(model, call, "guidance_scale") not in (None, 1):
        unlike = ids[:, -1:]  # (B, 1)
    if isinstance(unlike, torch.Tensor) and unlike.dim() > 1:
        texts.append(GrowingText((unlike.shape[0], unlike.shape[1]), unlike, unlike.shape[1]))
    return tuple(texts)


def check_rows(fields: Mapping[str, Any], adapter_names: tuple[str, ...] | None, num_rows: int) -> None:
    """Raise a ValueError for a wrong number of rows: later, a row may be several beams, and a value with fewer rows would look right."""
    for name, value in fields.items():
        if isinstance(value, torch.Tensor) and value.shape[:1] != (num_rows,):
            raise ValueError(f"`{name}` must have {num_rows} row(s), as the input has; got {tuple(value.shape)}.")
    if adapter_names is not None and len(adapter_names) != num_rows:
        raise ValueError(
            f"`adapter_names` must name an adapter for each of the {num_rows} rows, got {len(adapter_names)}."
        )


class GenerateBatch(MethodWrapper):
    """Continuous batching, which is refused."""

    method = "generate_batch"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "Instance prompts cannot be used with continuous batching (`generate_batch`): it cuts prompts to fill its steps, and a "
            "prompt vector is generated from the whole instruction. Call `generate` with a padded batch, or serve with vLLM."
        )


class InitContinuousBatching(GenerateBatch):
    """The entry to continuous batching that `generate_batch`, its context manager and transformers' server share."""

    method = "init_continuous_batching"
