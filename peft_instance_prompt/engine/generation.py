# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`generate` of a base model that has adapters: it notes its prompt, since later passes see longer rows."""

from __future__ import annotations

from typing import Any

import torch

from .cache import SlotCache
from .calls import cache_of, declared
from .request import OWN_ARGUMENTS, adapters_of, known_of, note
from .stand_in import StandIn


class Generate(StandIn):
    """The base model's `generate`.

    Args:
        instruction_mask (`torch.Tensor`, *optional*): Shape (B, S), bool or 0/1: the tokens that the prompt is generated from.
            Defaults to what `response_template` says, else to all tokens but padding.
        instance_embeds (`torch.Tensor`, *optional*): Shape (B, k): instance vectors for methods that take them.
        task_ids (`torch.LongTensor`, *optional*): Shape (B,): the task of each row, for adapters over several tasks.
        *args, **kwargs: As for the base model.

    Raises:
        ValueError: An argument has another number of rows than the input, or prompts cannot be generated as asked.
    """

    method = "generate"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        model = self.module
        fields = {name: kwargs.pop(name, None) for name in OWN_ARGUMENTS}
        config = kwargs.get("generation_config")
        chunk = kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        if chunk or getattr(getattr(model, "generation_config", None), "prefill_chunk_size", None):
            raise ValueError(
                "Instance prompts cannot be used with `prefill_chunk_size`: they are generated from the whole instruction, "
                "of which a chunk shows only a part."
            )
        kwargs = declared(kwargs, model)
        name, cache = cache_of(kwargs)
        if name is not None and (cache := SlotCache.find(cache)) is not None:
            kwargs[name] = cache
        given = (kwargs.get("inputs_embeds"), *args, kwargs.get("inputs"), kwargs.get("input_ids"))
        inputs: Any = next((x for x in given if x is not None), None)
        length = inputs.shape[1] if isinstance(inputs, torch.Tensor) and inputs.dim() > 1 else None
        known = known_of(model)
        for name, value in fields.items():
            value = getattr(known, name) if value is None else value  # `instruction_scope` can say it, too
            # Later, a row may be several beams, and a value with too few rows would look right.
            if length is not None and isinstance(value, torch.Tensor) and value.shape[:1] != inputs.shape[:1]:
                raise ValueError(
                    f"`{name}` must have {inputs.shape[0]} row(s), as the input has; got {tuple(value.shape)}."
                )
        names = known.adapter_names
        if length is not None and names is not None and len(names) != inputs.shape[0]:
            raise ValueError(
                f"`adapter_names` must name an adapter for each of the {inputs.shape[0]} rows, got {len(names)}."
            )
        fields = {name: value for name, value in fields.items() if value is not None}
        ids = inputs if length is not None and not inputs.is_floating_point() else None
        with note(model, prompt_length=length, prompt_ids=ids, adapters=adapters_of(model), **fields):
            return self.call_wrapped(*args, **kwargs)


class GenerateBatch(StandIn):
    """Continuous batching, which is refused."""

    method = "generate_batch"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "Instance prompts cannot be used with continuous batching (`generate_batch`): it cuts prompts to fill its steps, and a "
            "prompt vector is generated from the whole instruction. Call `generate` with a padded batch, or serve with vLLM."
        )


class InitContinuousBatching(GenerateBatch):
    """The way to continuous batching that `generate_batch`, its context manager and transformers' server take."""

    method = "init_continuous_batching"
