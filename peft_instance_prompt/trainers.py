# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Options of trainers under which an adapter would have no effect: refused when the trainer is made.

TRL's online trainers (GRPO, RLOO and others) can sample with vLLM. They send it the weights with the adapter merged into them,
and learn in the first step, when vLLM has been started, that this adapter cannot be merged. A callback hears of the options
before that.
"""

from __future__ import annotations

from typing import Any

# Only imported where the Trainer's module is in memory: it takes long, and itself imports PEFT.
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
    """Refuses to sample by a way that an instance-prompt adapter cannot go."""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Raise a ValueError if the trainer's `args` ask for such a way and `model` has such an adapter."""
        wanted = [option for option in REASONS if getattr(args, option, False)]
        if wanted and any(isinstance(module, InstancePromptLayer) for module in model.modules()):
            raise ValueError(
                f"Instance prompts cannot be used with `{wanted[0]}`: {REASONS[wanted[0]]}. Set `{wanted[0]}=False`: the trainer "
                "then samples with `generate` and the adapter."
            )


def guard_trainers() -> None:
    """Give every Trainer that is made from now on a [`SamplingGuard`]."""
    if SamplingGuard not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(SamplingGuard)
