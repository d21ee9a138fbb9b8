# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A tiny model with a method's adapter, its inputs and logits, and all that an adapter could leave behind."""

from __future__ import annotations

import torch
from methods import METHODS
from peft import PeftModel
from tiny import adapted, batch, causal_lm


INPUTS = batch(9, 6)
LABELS = INPUTS["input_ids"].where(torch.arange(9) > 5, -100)
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def config(method: str, **fields):
    return METHODS[method](**{"task_type": "CAUSAL_LM", **fields})


def prompted(method: str, family: str = "llama", seed: int = 0, **fields) -> PeftModel:
    return adapted(causal_lm(family), config(method, **fields), seed=seed)


@torch.no_grad()
def logits(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    return model(**INPUTS, **kwargs).logits


def traces(model: torch.nn.Module) -> tuple:
    """All that an adapter could leave behind."""
    hooks = [
        (name, kind, len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks")
    ]
    attributes = {name: sorted(module.__dict__) for name, module in model.named_modules()}
    return hooks, attributes, sorted(model.config.to_dict()), sorted(model.state_dict())
