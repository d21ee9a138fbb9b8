# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .choices import Choices, record_choices
from .config import DynamicPromptConfig
from .generator import DynamicPromptGenerator
from .model import DynamicPromptModel


__all__ = ["Choices", "DynamicPromptConfig", "DynamicPromptGenerator", "DynamicPromptModel", "record_choices"]

register_method("dynamic_prompt", DynamicPromptConfig, DynamicPromptModel)
