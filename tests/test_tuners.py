# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The import paths of 0.2.0 go on working."""

from __future__ import annotations

import importlib
import pickle

import pytest

import peft_instance_prompt


@pytest.mark.parametrize("method", ["dynamic_prompt", "iapt", "idpg", "idspam", "ipt", "lpt"])
def test_module_of_a_method_has_its_old_name(method: str):
    old = importlib.import_module(f"peft_instance_prompt.tuners.{method}")
    assert old is importlib.import_module(f"peft_instance_prompt.methods.{method}")


def test_public_names_are_the_same_objects():
    from peft_instance_prompt.tuners import IAPTConfig, IPTModel
    from peft_instance_prompt.tuners.iapt import IAPTGenerator, IAPTModel

    assert IAPTConfig is peft_instance_prompt.IAPTConfig and IPTModel is peft_instance_prompt.IPTModel
    assert IAPTModel.generator_cls is IAPTGenerator


def test_pickle_that_names_the_old_module_loads():
    new = pickle.dumps(peft_instance_prompt.IAPTModel, protocol=0)
    assert pickle.loads(new.replace(b"methods.iapt", b"tuners.iapt")) is peft_instance_prompt.IAPTModel


def test_tuner_class_says_how_it_is_used():
    doc = peft_instance_prompt.IAPTModel.__doc__
    assert doc.startswith("Instruction-aware prompt tuning") and "get_peft_model(model, IAPTConfig(" in doc
