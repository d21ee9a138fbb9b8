# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A tiny Llama with a method's adapter, its inputs and logits, and one step of training."""

from __future__ import annotations

from typing import Any

import torch
from methods import METHODS
from peft import PeftModel
from tiny import adapted, batch, causal_lm


INPUTS = batch(9, 6)
LIVE = INPUTS["attention_mask"].bool()
LABELS = INPUTS["input_ids"].where(torch.arange(9) > 5, -100)
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def prompted(kind: str, seed: int = 6, **fields: Any) -> PeftModel:
    return adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", **fields), seed=seed)


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict = INPUTS) -> torch.Tensor:
    return model.eval()(**inputs).logits


def train_step(model: PeftModel) -> float:
    """One step, after which all that is trained has moved and is finite."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(3)
    loss = model.train()(**INPUTS, labels=LABELS).loss
    loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if n in before and not p.equal(before[n])}
    assert moved and all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
    return float(loss)
