# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Models with several adapters, and what each of them gives alone."""

from __future__ import annotations

import torch
from methods import METHODS
from peft import PeftModel
from tiny import adapted, perturb

from peft_instance_prompt.engine.layer import InstancePromptLayer


NEW = 5
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def accepted(method: str, **fields) -> dict:
    """Those of the fields, in any combination, that a method takes as they are."""
    kept = {}
    for name, value in fields.items():
        try:
            METHODS[method](**{name: value})
            kept[name] = value
        except (TypeError, ValueError):
            continue
    return kept


def several(base: torch.nn.Module, method: str, task_type: str, **fields) -> PeftModel:
    """`a` and `b` differ in their weights only, `c` and `d` in their numbers of slots, their place and their bottleneck."""
    make = METHODS[method]
    model = adapted(base, make(task_type=task_type, **fields), name="a")
    model.add_adapter("b", make(task_type=task_type, **fields))
    # Late slots among the tokens are refused where distances are those of columns.
    layer = next(module for module in model.modules() if isinstance(module, InstancePromptLayer))
    before = layer.info.distance_by_column and layer.generators["a"].first_visible_layer > 0
    other = accepted(method, prompt_position="before" if before else "after_first")
    model.add_adapter("c", make(task_type=task_type, **fields, num_virtual_tokens=2, **other))
    other = accepted(method, bottleneck_dim=4, prompt_position="before" if before else "end")
    model.add_adapter("d", make(task_type=task_type, **fields, num_virtual_tokens=3, **other))
    for seed, name in enumerate("bcd", start=1):
        perturb(model, seed=seed, adapter=name)
    return model.eval()
