# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Refuse trainers' options that sample without the adapter, when the trainer is made.

TRL's online trainers (GRPO, RLOO and others) can sample with vLLM. They send it the base model's weights with the adapter merged into
them, and would fail only in the first step, when vLLM has started: our adapters cannot be merged. A callback sees the options before.
"""

from __future__ import annotations

from typing import Any

# This file is imported only when the Trainer's module is loaded: that takes long, and itself imports PEFT.
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.trainer_callback import TrainerCallback

from .engine.layer import InstancePromptLayer


REASONS = {
    "use_vllm": (
        "TRL sends vLLM the base model's weights with the adapter merged into them, and prompts that are generated from the "
        "instance cannot be merged"
    ),
    "use_transformers_continuous_batching": (
        "it cuts prompts to fill its steps, and a prompt vector is generated from the whole instruction"
    ),
}


class SamplingGuard(TrainerCallback):
    """Refuse samplers that bypass the adapter."""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raise a ValueError if `args` choose such a sampler and `model` has an instance-prompt adapter."""
        wanted = [option for option in REASONS if getattr(args, option, False)]
        if wanted and any(isinstance(module, InstancePromptLayer) for module in model.modules()):
            raise ValueError(
                f"Instance prompts cannot be used with `{wanted[0]}`: {REASONS[wanted[0]]}. Set `{wanted[0]}=False`: the trainer "
                "then samples with `generate` and the adapter."
            )


def guard_trainers() -> None:
    """Add a [`SamplingGuard`] to every Trainer that is made from now on."""
    if SamplingGuard not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(SamplingGuard)
