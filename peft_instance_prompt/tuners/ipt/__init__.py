# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .config import IPTConfig
from .encoders import ENCODERS, Table
from .generator import IPTGenerator
from .model import IPTModel


__all__ = ["ENCODERS", "IPTConfig", "IPTGenerator", "IPTModel", "Table"]

register_method("ipt", IPTConfig, IPTModel)
