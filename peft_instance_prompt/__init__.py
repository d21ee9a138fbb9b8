# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters that read the instruction once, at prefill, for PEFT: soft prompts that are generated from it, and edits of its states.

Importing the package registers them.
"""

from importlib import import_module
from typing import Any

from .adapter_files import guard_loading, guard_saving
from .config import InstanceConfig, InstancePromptConfig
from .engine.calls import warn_of_untested_release
from .engine.request import instruction_scope
from .guards import guard_attaching
from .methods import (
    Choices,
    DynamicPromptConfig,
    DynamicPromptModel,
    IAPTConfig,
    IAPTModel,
    IDPGConfig,
    IDPGModel,
    IDSPAMConfig,
    IDSPAMModel,
    IPTConfig,
    IPTModel,
    LPTConfig,
    LPTModel,
    PreFTConfig,
    PreFTModel,
)
from .model_card import teach_peft
from .registry import register_method
from .task_ids import carry_task_ids


__version__ = "0.3.0"

# Tools are imported when they are asked for: they need the Trainer's module, which takes long and itself imports PEFT.
_TOOLS = {
    "InstanceEmbedsCollator": ".tools.embeds",
    "add_instance_embeds": ".tools.embeds",
    "encode_prompt_embeds": ".tools.prompt_embeds",
    "instance_report": ".tools.report",
    "learn_activations": ".tools.bilevel",
    "learned_position": ".tools.choices",
    "record_choices": ".tools.choices",
    "to_prompt_embeds": ".tools.prompt_embeds",
}


def __getattr__(name: str) -> Any:
    if name not in _TOOLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_TOOLS[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


warn_of_untested_release()
teach_peft(InstanceConfig)
guard_attaching()
guard_loading()
guard_saving()
carry_task_ids()

__all__ = [
    "Choices",
    "DynamicPromptConfig",
    "DynamicPromptModel",
    "IAPTConfig",
    "IAPTModel",
    "IDPGConfig",
    "IDPGModel",
    "IDSPAMConfig",
    "IDSPAMModel",
    "IPTConfig",
    "IPTModel",
    "InstanceConfig",
    "InstanceEmbedsCollator",
    "InstancePromptConfig",
    "LPTConfig",
    "LPTModel",
    "PreFTConfig",
    "PreFTModel",
    "add_instance_embeds",
    "encode_prompt_embeds",
    "instance_report",
    "instruction_scope",
    "learn_activations",
    "learned_position",
    "record_choices",
    "register_method",
    "to_prompt_embeds",
]
