# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the plugin uses of the package. No other file of the plugin imports from outside the plugin."""

from ..adapter_files import check_tensors, digest, read_kind, read_weights
from ..attaching import (
    PREFIX,
    check_fits,
    check_task,
    embedding_names,
    expected_tensors,
    generator_path,
    make_generator,
)
from ..config import PAIR_POSITIONS, InstanceConfig
from ..engine.adapters import Group, at_separator
from ..engine.calls import SWITCH, forward_args
from ..engine.request import Request
from ..engine.scope import Rules, find_scope
from ..engine.slots import arrange, write
from ..engine.stack import StackInfo, describe
from ..engine.tokens import InstanceTokens
from ..generator import INPUT, InstanceGenerator, PromptGenerator, Source


__all__ = [
    "INPUT",
    "PAIR_POSITIONS",
    "PREFIX",
    "SWITCH",
    "Group",
    "InstanceConfig",
    "InstanceGenerator",
    "InstanceTokens",
    "PromptGenerator",
    "Request",
    "Rules",
    "Source",
    "StackInfo",
    "arrange",
    "at_separator",
    "check_fits",
    "check_task",
    "check_tensors",
    "describe",
    "digest",
    "embedding_names",
    "expected_tensors",
    "find_scope",
    "forward_args",
    "generator_path",
    "make_generator",
    "read_kind",
    "read_weights",
    "write",
]
