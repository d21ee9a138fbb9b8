# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The methods, one file each: config, generator and registration."""

from .dynamic_prompt import Choices, DynamicPromptConfig, DynamicPromptModel
from .iapt import IAPTConfig, IAPTModel
from .idpg import IDPGConfig, IDPGModel
from .idspam import IDSPAMConfig, IDSPAMModel
from .ipt import IPTConfig, IPTModel
from .lpt import LPTConfig, LPTModel
from .preft import PreFTConfig, PreFTModel


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
    "LPTConfig",
    "LPTModel",
    "PreFTConfig",
    "PreFTModel",
]
