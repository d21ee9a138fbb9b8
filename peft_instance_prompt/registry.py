# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Make PEFT know the methods of this package."""

from __future__ import annotations

import warnings

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType


def add_peft_type(name: str) -> PeftType:
    """The member `name` of PEFT's enum of method names, which has no other way to be extended from outside."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)  # without this, Python >= 3.12 does not find PeftType.<name>
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member


def register_method(name: str, config_cls: type, model_cls: type) -> None:
    """Register a method with PEFT, once; stand aside with a warning if PEFT has one of that name itself.

    Args:
        name (`str`): The method's name in lower case, e.g. `"iapt"`.
        config_cls (`type`): Its config.
        model_cls (`type`): Its tuner.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(add_peft_type(name.upper()))
    if known is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    elif (known.__module__, known.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        warnings.warn(
            f"PEFT has a method named '{name}' of its own ({known.__module__}.{known.__qualname__}). "
            "peft_instance_prompt leaves it in place; adapters of that name are PEFT's."
        )
