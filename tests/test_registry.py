# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Registration with PEFT: once, and never against PEFT itself."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from dataclasses import dataclass

import pytest
import torch
from methods import METHODS
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType as TheSame

from peft_instance_prompt import InstancePromptConfig
from peft_instance_prompt.generator import PromptGenerator
from peft_instance_prompt.model import InstancePromptModel
from peft_instance_prompt.registry import add_peft_type, register_method


def test_members_are_like_those_of_peft(kind: str) -> None:
    config = METHODS[kind]()
    member = config.peft_type
    name = member.name
    assert isinstance(member, PeftType) and member in list(PeftType) and TheSame is PeftType
    assert member is getattr(PeftType, name) is PeftType[name] is PeftType(name)
    assert member == name and member.value == name and json.dumps(member) == f'"{name}"'
    assert copy.deepcopy(member) is member is pickle.loads(pickle.dumps(member))
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is type(config)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[member]
    assert issubclass(tuner, InstancePromptModel)
    assert tuner.prefix == name.lower() + "_", "transformers derives the prefix itself"


def test_registering_twice_changes_nothing(kind: str) -> None:
    config = type(METHODS[kind]())
    member = METHODS[kind]().peft_type
    tuner, before = PEFT_TYPE_TO_TUNER_MAPPING[member], list(PeftType)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert register_method(member.name.lower(), config, tuner.generator_cls) is tuner
    assert add_peft_type(member.name) is member
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is tuner


@dataclass
class AnotherConfig(InstancePromptConfig):
    pass


class AnotherGenerator(PromptGenerator):
    def generate(self, instances, depth, weights):
        return instances.base_state


def test_stands_aside_for_peft() -> None:
    lora = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA]
    with pytest.warns(UserWarning, match="PEFT has a method named 'lora' of its own .*LoraConfig"):
        register_method("lora", AnotherConfig, AnotherGenerator)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is lora


def test_a_name_that_is_taken() -> None:
    with pytest.raises(
        ValueError, match="The method 'iapt' is registered already, with the config .*IAPTConfig: choose another"
    ):
        register_method("iapt", AnotherConfig, AnotherGenerator)


class NoDataclassConfig(InstancePromptConfig):
    pass


class EmptyGenerator(PromptGenerator):
    pass


@pytest.mark.parametrize(
    ("name", "config", "generator", "error", "says"),
    [
        (
            "new",
            dict,
            AnotherGenerator,
            TypeError,
            "derived from `InstanceConfig`, got .*write `class NewConfig",
        ),
        (
            "new",
            AnotherConfig,
            torch.nn.Linear,
            TypeError,
            "derived from `InstanceGenerator`, got .*write `class NewGenerator",
        ),
        ("new", NoDataclassConfig, AnotherGenerator, TypeError, "must be a dataclass: put `@dataclass` above it"),
        ("new", AnotherConfig, EmptyGenerator, TypeError, r"defines no `generate\(instances, depth, weights\)`"),
        ("New-One", AnotherConfig, AnotherGenerator, ValueError, "an identifier in lower case"),
    ],
)
def test_a_method_without_its_parts(name, config, generator, error, says) -> None:
    before = list(PeftType)
    with pytest.raises(error, match=says):
        register_method(name, config, generator)
    assert list(PeftType) == before


def test_a_config_that_nobody_registered() -> None:
    with pytest.raises(
        TypeError, match=r"UnregisteredConfig is the config of no method: register it with `register_method\("
    ):

        @dataclass
        class UnregisteredConfig(InstancePromptConfig):
            pass

        UnregisteredConfig()


def test_a_peft_that_knows_the_name_already() -> None:
    """In a process of its own, where the enum has the name before this package is imported."""
    code = """
import warnings
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
member = str.__new__(PeftType, "IAPT")
member._name_ = member._value_ = "IAPT"
type.__setattr__(PeftType, "IAPT", member)
PeftType._member_map_["IAPT"] = PeftType._value2member_map_["IAPT"] = member
PeftType._member_names_.append("IAPT")
class Theirs: pass
PEFT_TYPE_TO_CONFIG_MAPPING[member] = Theirs
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_instance_prompt
assert any("'iapt' of its own" in str(one.message) for one in caught), caught
assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is Theirs
assert list(PeftType).count("IAPT") == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_registration_while_peft_is_being_imported() -> None:
    """As from an import hook: PEFT is not whole yet. And registration is light, it brings no Trainer."""
    code = """
import sys

class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "peft.helpers" and "peft_instance_prompt" not in sys.modules:
            import peft_instance_prompt
            assert not hasattr(sys.modules["peft"], "PeftModel")

sys.meta_path.insert(0, Hook())
import peft
assert "peft_instance_prompt" in sys.modules and "IAPT" in peft.PeftType.__members__
assert "transformers.trainer" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
