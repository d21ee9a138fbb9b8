# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Greedy decoding by a loop that has no cache and feeds the whole text again for each token."""

from __future__ import annotations

import torch
from methods import METHODS
from peft import PeftModel
from tiny import adapted, causal_lm


NEW = 8
EOS = 2
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def prompted(method: str, family: str = "llama", **changes) -> PeftModel:
    return adapted(causal_lm(family, **changes), METHODS[method](task_type="CAUSAL_LM"))


@torch.no_grad()
def by_hand(model: PeftModel, inputs: dict[str, torch.Tensor], steps: int = NEW) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy text (B, S + steps) and the logits of its steps (B, steps, V)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    scope = inputs.get("instruction_mask", mask)
    logits = []
    for _ in range(steps):
        logits.append(model(ids, attention_mask=mask, instruction_mask=scope, use_cache=False).logits[:, -1])
        allowed = logits[-1].index_fill(1, torch.tensor(EOS), -torch.inf)  # as `min_new_tokens` has it
        ids = torch.cat([ids, allowed.argmax(dim=-1, keepdim=True)], dim=1)  # (B, S + 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        scope = torch.cat([scope, scope.new_zeros(len(scope), 1)], dim=1)
    return ids, torch.stack(logits, dim=1)
