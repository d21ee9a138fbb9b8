# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .config import IDPGConfig
from .generator import IDPGGenerator
from .model import IDPGModel


__all__ = ["IDPGConfig", "IDPGGenerator", "IDPGModel"]

register_method("idpg", IDPGConfig, IDPGModel)
