# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Two rows with an instruction and a response, told in each way, and the prompts that a model makes of rows."""

from __future__ import annotations

import torch
from methods import METHODS
from peft import PeftModel
from tiny import adapted, causal_lm

from peft_instance_prompt.engine.forward import current_pass


TEMPLATE = [90, 91]
# Three tokens of instruction and the template, then six of response.
IDS = torch.tensor(
    [[5, 6, 7, *TEMPLATE, 20, 21, 22, 23, 24, 25], [15, 16, 17, *TEMPLATE, 30, 31, 32, 33, 34, 35]]
)  # (2, 11)
SPLIT = 5
MASK = torch.zeros_like(IDS).index_fill(1, torch.arange(SPLIT), 1)  # (2, 11)
LABELS = IDS.where(MASK == 0, -100)
TOKENS = torch.ones(2, 11, dtype=torch.bool)


def prompted(method: str, **fields) -> PeftModel:
    return adapted(causal_lm(), METHODS[method](task_type="CAUSAL_LM", **fields))


@torch.no_grad()
def prompts(model: PeftModel, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """What stands in the slots at the input of each layer: (layers, B, L, d)."""
    seen = []

    def look(layer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if (step := current_pass.get()).layout is None:  # the pass without prompts
            return
        states = args[0] if args else kwargs["hidden_states"]
        index = step.layout.slot_index[:, :, None].expand(-1, -1, states.shape[-1])  # (B, L, d)
        seen.append(states.gather(1, index))

    layers = model.get_base_model().model.layers
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        model(ids, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen[: len(layers)])


def changed(column: int, by: int = 3) -> torch.Tensor:
    ids = IDS.clone()
    ids[:, column] += by
    return ids
