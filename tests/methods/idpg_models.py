# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the tests of IDPG share: configs, a batch, and vectors that come with it."""

from __future__ import annotations

import torch
from peft import PeftModel
from tiny import batch
from torch import nn

from peft_instance_prompt import IDPGConfig


INPUTS = batch(9, 6)
LABELS = INPUTS["input_ids"].where(torch.arange(9) > 5, -100)
VECTORS = torch.randn(2, 12, generator=torch.Generator().manual_seed(5))
d, L = 32, 3


def config(**fields) -> IDPGConfig:
    return IDPGConfig(**{"task_type": "CAUSAL_LM", "phm_n": 4, "num_virtual_tokens": 4, "dropout": 0.0, **fields})


def given(**fields) -> IDPGConfig:
    return config(instance_source="instance_embeds", instance_embeds_dim=12, **fields)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def logits(model: PeftModel, **kwargs) -> torch.Tensor:
    return model(**INPUTS, **kwargs).logits
