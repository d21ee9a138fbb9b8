# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Tiny models with dynamic prompts."""

from __future__ import annotations

import torch
from peft import PeftModel
from tiny import adapted, causal_lm, generator_of

from peft_instance_prompt import DynamicPromptConfig, record_choices


L = 4  # prompt vectors
K = 3  # prompts in the pool
ORDERS = ("paper", "dpt")


def dynamic(family: str = "llama", seed: int = 0, base=None, **fields) -> PeftModel:
    base = causal_lm(family) if base is None else base
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": L, "num_pool": 3, **fields}
    return adapted(base, DynamicPromptConfig(**fields), seed=seed)


def choose(model: PeftModel, **numbers: int) -> PeftModel:
    """Make the choices per task fall on these numbers."""
    for name, number in numbers.items():
        with torch.no_grad():
            generator_of(model).logits[name].zero_()[number] = 9.0
    return model


def prompts_of(model: PeftModel) -> torch.Tensor:
    """The prompts (k, l, e) of the pool, a view."""
    return generator_of(model).prompts.detach().view(-1, generator_of(model).num_slots, 32)


def labels_for(ids: torch.Tensor, start: int) -> torch.Tensor:
    return ids.masked_fill(torch.arange(ids.shape[1]) < start, -100)


def positions(model: PeftModel, **inputs) -> list[int]:
    with record_choices() as record, torch.no_grad():
        model(**inputs)
    return record[0].positions.tolist()
