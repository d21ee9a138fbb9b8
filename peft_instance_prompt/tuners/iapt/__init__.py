# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .config import IAPTConfig
from .generator import IAPTGenerator
from .model import IAPTModel


__all__ = ["IAPTConfig", "IAPTGenerator", "IAPTModel"]

register_method("iapt", IAPTConfig, IAPTModel)
