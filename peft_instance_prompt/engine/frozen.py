# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A pass of the stack without prompts, for methods that read what the frozen model makes of the instance."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .passes import Pass, current_pass
from .stack import walk


def run_frozen(stack: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """The last hidden states (B, S, d) of the stack without prompts, gradient and dropout."""
    token = current_pass.set(Pass(stack))
    # Not the linear layers, which drop nothing: bitsandbytes repacks its own when it sees them in evaluation on a CPU, and no
    # gradient passes through them any more.
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
    """Whether this stack runs without prompts. A model that a hook of such a stack calls still has its own."""
    running = current_pass.get()
    return running is not None and running.owner is None and running.stack is stack
