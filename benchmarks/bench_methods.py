# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""What bench.py measures. A factory takes a base model of its own and returns the model to measure and what to pass to each call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model


BATCH = 8


def bare(base):
    # frozen as it is under an adapter: torch multiplies by a weight that wants a gradient in another way
    return base.requires_grad_(False), {}


def one_adapter(make_config: Callable) -> Callable:
    """One adapter for the whole batch."""
    return lambda base: (get_peft_model(base, make_config()), {})


def adapter_per_row(make_config: Callable) -> Callable:
    """One adapter for each row of the batch, as when several tenants share a backbone."""

    def factory(base):
        names = [f"tenant{i}" for i in range(BATCH)]
        model = get_peft_model(base, make_config(), adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, make_config())
        return model, {"adapter_names": names}

    return factory


def lora():
    return LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")


def iapt(**fields):
    def make_config():
        # imported here, so that the other candidates can be measured where the package cannot be imported
        from peft_instance_prompt import IAPTConfig

        return IAPTConfig(task_type="CAUSAL_LM", **fields)

    return make_config


def idpg(preset: str, **fields):
    def make_config():
        from peft_instance_prompt import IDPGConfig

        return IDPGConfig.preset(preset, task_type="CAUSAL_LM", **fields)

    return make_config


def stored_vectors(preset: str, width: int = 384) -> Callable:
    """IDPG with vectors that come with the batch."""

    def factory(base):
        model = get_peft_model(base, idpg(preset, instance_source="instance_embeds", instance_embeds_dim=width)())
        return model, {"instance_embeds": torch.randn(BATCH, width, generator=torch.Generator().manual_seed(0))}

    return factory


def prompt_tuning():
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)  # as many as IDPG has


def lpt():
    from peft_instance_prompt import LPTConfig

    return LPTConfig(task_type="CAUSAL_LM")


def idspam():
    from peft_instance_prompt import IDSPAMConfig

    return IDSPAMConfig(task_type="CAUSAL_LM")


def preft():
    from peft_instance_prompt import PreFTConfig

    return PreFTConfig(task_type="CAUSAL_LM")


def dynamic(position: str, length: str):
    """A prompt of 20 vectors, with choices from the mean of the input embeddings, so without a frozen pass."""

    def make_config():
        from peft_instance_prompt import DynamicPromptConfig

        return DynamicPromptConfig(
            task_type="CAUSAL_LM", position=position, length=length, instance_source="embeddings"
        )

    return make_config


def several_tasks(base):
    """The same prompt, positions and lengths as "dynamic-task", chosen by the task of each row: 8 tasks."""
    from peft_instance_prompt import DynamicPromptConfig

    fields = {"position": "task", "length": "task", "num_tasks": BATCH}
    return get_peft_model(base, DynamicPromptConfig(task_type="CAUSAL_LM", **fields)), {
        "task_ids": torch.arange(BATCH)
    }


METHODS = {
    "bare": bare,
    "lora": one_adapter(lora),
    "lora-mixed": adapter_per_row(lora),
    "iapt": one_adapter(iapt()),
    "iapt-mixed": adapter_per_row(iapt()),
    # about as many parameters as the LoRA above
    "iapt-128": one_adapter(iapt(bottleneck_dim=128)),
    "iapt-128-mixed": adapter_per_row(iapt(bottleneck_dim=128)),
    "prompt-tuning": one_adapter(prompt_tuning),
    "idpg": one_adapter(idpg("m-phm")),
    "s-idpg": one_adapter(idpg("s-phm")),
    "idpg-stored": stored_vectors("m-phm"),
    "s-idpg-stored": stored_vectors("s-phm"),
    "lpt": one_adapter(lpt),
    "lpt-mixed": adapter_per_row(lpt),
    "idspam": one_adapter(idspam),
    "idspam-mixed": adapter_per_row(idspam),
    "preft": one_adapter(preft),
    "preft-mixed": adapter_per_row(preft),
    "fixed-prompt": one_adapter(dynamic("off", "off")),
    "dynamic": one_adapter(dynamic("instance", "instance")),
    "dynamic-task": one_adapter(dynamic("task", "task")),
    "dynamic-tasks": several_tasks,  # to be compared with it: --train-reference dynamic-task
}
