# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .config import LPTConfig
from .generator import LPTGenerator
from .model import LPTModel


__all__ = ["LPTConfig", "LPTGenerator", "LPTModel"]

register_method("lpt", LPTConfig, LPTModel)
