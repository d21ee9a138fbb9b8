# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A pass of the stack without prompts, for methods that read the frozen model's states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .passes import Pass, current_pass
from .stack import walk


def run_frozen(stack: PreTrainedModel, call: dict[str, Any], stretch: torch.Tensor | None = None) -> torch.Tensor:
    """The last hidden states (B, S, d) of the stack without prompts, gradient and dropout.

    Args:
        stack (`PreTrainedModel`): The stack.
        call (`dict`): Its arguments.
        stretch (`torch.LongTensor`, *optional*): Shape (B, S). As in [`Pass`].
    """
    token = current_pass.set(Pass(stack, attention=str(stack.config._attn_implementation), stretch=stretch))
    # Linear layers stay in training mode; they have no dropout. bitsandbytes repacks its linear layers when they run in
    # evaluation mode on a CPU, and then no gradient passes through them.
    training = [module for _, module in walk(stack) if module.training and not isinstance(module, nn.Linear)]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            return stack(**{**call, "return_dict": True}).last_hidden_state
    finally:
        current_pass.reset(token)
        for module in training:
            module.training = True


def is_frozen(stack: nn.Module) -> bool:
    """Whether this stack runs without prompts. Another model, called by a hook of this stack, still runs with its prompts."""
    running = current_pass.get()
    return running is not None and running.owner is None and running.stack is stack
