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
from pathlib import Path

import pytest
import torch
from methods import METHODS
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType as TheSame

from peft_instance_prompt import InstancePromptConfig
from peft_instance_prompt.files import RENAMED
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
        tuner = register_method("lora", AnotherConfig, AnotherGenerator)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is lora
    assert PEFT_TYPE_TO_TUNER_MAPPING["INSTANCE_LORA"] is tuner
    del RENAMED["LORA", "test_registry"]
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del mapping["INSTANCE_LORA"]  # the doctor's tests run over all methods


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


# A PEFT that has a method of the name `iapt`: LoRA under that name.
PEFT_WITH_IAPT = """
from dataclasses import dataclass
from peft import LoraConfig, LoraModel, PeftType
from peft.utils import register_peft_method
member = str.__new__(PeftType, "IAPT")
member._name_ = member._value_ = "IAPT"
type.__setattr__(PeftType, "IAPT", member)
PeftType._member_map_["IAPT"] = PeftType._value2member_map_["IAPT"] = member
PeftType._member_names_.append("IAPT")
@dataclass
class TheirConfig(LoraConfig):
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.IAPT
register_peft_method(name="iapt", config_cls=TheirConfig, model_cls=LoraModel, prefix="lora_")
"""
# What stays as it was when this package is imported after that.
STANDS_ASIDE = """
import warnings
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_instance_prompt
assert any("'iapt' of its own" in str(one.message) for one in caught), caught
assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is TheirConfig
assert list(PeftType).count("IAPT") == 1
"""
# Both methods in one process: folders of 0.2.0, those that are saved now, and PEFT's own.
BOTH = """
import sys
from pathlib import Path
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import peft_instance_prompt
from peft_instance_prompt import IAPTConfig, IAPTModel
from peft_instance_prompt.__main__ import main
from peft_instance_prompt.vllm.registration import is_own_folder
saved, base, out = map(Path, sys.argv[1:])
call = load_file(saved / "expected.safetensors")
expected = call.pop("logits")

def fresh():
    return AutoModelForCausalLM.from_pretrained(base).eval()

def check(model, name="default"):
    model.set_adapter(name)
    assert type(model.peft_config[name]) is IAPTConfig and type(model.base_model) is IAPTModel, model.peft_config
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**call).logits, expected, atol=1e-5, rtol=0)

assert PEFT_TYPE_TO_CONFIG_MAPPING["IAPT"] is TheirConfig
assert type(PeftConfig.from_pretrained(saved)) is IAPTConfig
model = PeftModel.from_pretrained(fresh(), saved)
model.load_adapter(saved, adapter_name="two")
check(model)
check(model, "two")
model.save_pretrained(out / "again")
check(PeftModel.from_pretrained(fresh(), out / "again"))
assert main(["inspect", str(saved)]) == 0
assert is_own_folder(saved) and is_own_folder(out / "again")
native = fresh()
native.load_adapter(str(saved))
with torch.no_grad():
    torch.testing.assert_close(native(**call).logits, expected, atol=1e-5, rtol=0)

theirs = get_peft_model(fresh(), TheirConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
theirs.save_pretrained(out / "theirs")
assert type(PeftModel.from_pretrained(fresh(), out / "theirs").peft_config["default"]) is TheirConfig
assert not is_own_folder(out / "theirs")
new = get_peft_model(fresh(), IAPTConfig(task_type="CAUSAL_LM"))
assert type(new.base_model) is IAPTModel and new.peft_type == "INSTANCE_IAPT"
"""
SAVED = Path(__file__).parent / "saved_by_0_2_0"


def run(code: str, *args: Path) -> str:
    """What code that has to succeed in a process of its own writes to stderr."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_peft_that_knows_the_name_already() -> None:
    """In a process of its own, where the enum has the name before this package is imported."""
    run(PEFT_WITH_IAPT + STANDS_ASIDE)


def test_the_day_peft_has_a_method_of_our_name(tmp_path: Path) -> None:
    """PEFT's is PEFT's; ours goes on under another name, and folders that were saved before that day load as before."""
    said = run(PEFT_WITH_IAPT + BOTH, SAVED / "llama/iapt", SAVED / "base/llama", tmp_path)
    assert "PEFT has a method named 'iapt' of its own (__main__.TheirConfig), which stays in place" in said


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
    run(code)
