# Copyright 2026-present the peft_instance_prompt authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Soft prompts that are generated from the input instance, as PEFT adapters. Importing the package registers them."""

from .bilevel import learn_activations
from .card import teach_peft
from .config import InstancePromptConfig
from .embeds import InstanceEmbedsCollator, add_instance_embeds
from .loading import guard_loading
from .report import instance_report
from .saving import guard_saving
from .scope import instruction_scope
from .serving import to_prompt_embeds
from .tuners import (
    Choices,
    DynamicPromptConfig,
    DynamicPromptModel,
    IAPTConfig,
    IAPTModel,
    IDPGConfig,
    IDPGModel,
    IPTConfig,
    IPTModel,
    LPTConfig,
    LPTModel,
    record_choices,
)


__version__ = "0.1.0"

teach_peft(InstancePromptConfig)
guard_loading(InstancePromptConfig)
guard_saving(InstancePromptConfig)

__all__ = [
    "Choices",
    "DynamicPromptConfig",
    "DynamicPromptModel",
    "IAPTConfig",
    "IAPTModel",
    "IDPGConfig",
    "IDPGModel",
    "IPTConfig",
    "IPTModel",
    "InstanceEmbedsCollator",
    "InstancePromptConfig",
    "LPTConfig",
    "LPTModel",
    "add_instance_embeds",
    "instance_report",
    "instruction_scope",
    "learn_activations",
    "record_choices",
    "to_prompt_embeds",
]
