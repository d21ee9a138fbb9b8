# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the tests of methods that begin at a middle layer share."""

from __future__ import annotations

import torch
from peft import PeftModel
from tiny import adapted, batch, causal_lm

from peft_instance_prompt import LPTConfig
from peft_instance_prompt.generator import PromptGenerator


def config(**fields) -> LPTConfig:
    return LPTConfig(**{"bottleneck_dim": 8, "dropout": 0.0, "num_virtual_tokens": 3, **fields})


def lpt(family: str = "llama", seed: int = 0, attn_implementation: str | None = None, **fields) -> PeftModel:
    changes = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    if family != "gemma3":
        del changes["layer_types"]
    base = causal_lm(family, attn_implementation=attn_implementation, **changes)
    return adapted(base, config(task_type="CAUSAL_LM", **fields), seed=seed)


def assert_all_learn_at_the_second_step(model: PeftModel, generator: PromptGenerator) -> None:
    """At the first step a fresh adapter's last layer is zero, and nothing before it has a gradient."""
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    ids = batch(8, 8)["input_ids"]
    labels = ids.clone()
    labels[:, :5] = -100
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in generator.parameters())
