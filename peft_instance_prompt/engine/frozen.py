# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A pass of the stack without prompts, for methods that read the frozen model's states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..generator import INPUT
from .passes import Pass, current_pass
from .stack import embed_ids, walk


def run_frozen(stack: nn.Module, call: dict[str, Any]) -> torch.Tensor:
    """The last hidden states (B, S, d) of the stack without prompts, gradient and dropout."""
    token = current_pass.set(Pass(stack))
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


def states_of_text(stack: PreTrainedModel, layers: nn.ModuleList, ids: Sequence[int]) -> dict[int, torch.Tensor]:
    """The states (n, w) of the n tokens of a text, by depth: the input embeddings, and the input of each layer.

    Args:
        stack (`nn.Module`): The stack, which runs without prompts.
        layers (`nn.ModuleList`): Its layers. One that is run several times counts as often.
        ids (`Sequence[int]`): The text's token ids.
    """
    states: list[torch.Tensor] = []

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])  # (1, n, d)

    tokens = torch.tensor([list(ids)], device=stack.get_input_embeddings().weight.device)  # (1, n)
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        run_frozen(stack, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    return {
        INPUT: embed_ids(stack, tokens[0]),
        **{depth: state[0] for depth, state in enumerate(states)},
    }  # (n, w) each


def is_frozen(stack: nn.Module) -> bool:
    """Whether this stack runs without prompts. Another model, called by a hook of this stack, still runs with its prompts."""
    running = current_pass.get()
    return running is not None and running.owner is None and running.stack is stack
