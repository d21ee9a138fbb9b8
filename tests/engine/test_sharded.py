# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters on a model that ZeRO-3 has taken apart: its parameters are empty. DeepSpeed itself runs in test_machines.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import adapted, causal_lm

from peft_instance_prompt import IAPTConfig, IPTConfig
from peft_instance_prompt.engine.probe import num_elements, whole
from peft_instance_prompt.engine.stack import find_stacks, tree_of


def take_apart(model: torch.nn.Module) -> torch.nn.Module:
    """As ZeRO-3 leaves parameters: without elements, with `ds_numel`, and (here) with what is to be put together again."""
    for parameter in model.parameters():
        parameter.ds_numel, parameter.parts = parameter.numel(), parameter.data
        parameter.data = parameter.data.new_empty(0)
    return model


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A DeepSpeed that gathers and releases, and the number of parameters that it gathered each time."""
    counts: list[int] = []

    @contextmanager
    def gather(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        counts.append(len(parameters))
        for parameter in parameters:
            parameter.data = parameter.parts
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.data = parameter.data.new_empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather)))
    return counts


def test_stacks_are_found() -> None:
    assert (
        find_stacks(tree_of(take_apart(causal_lm()))) == find_stacks(tree_of(causal_lm())) == {"model.layers": "model"}
    )


@pytest.mark.parametrize(
    "family", ["bloom", "mpt", "opt"]
)  # of the first two, only their mask tells that they are causal
def test_the_generator_is_made_as_for_a_whole_model(family: str, gathered: list[int]) -> None:
    model = get_peft_model(take_apart(causal_lm(family)), IPTConfig(task_type="CAUSAL_LM", init="embeddings"))
    table = next(p for name, p in model.named_parameters() if name.endswith("table.weight"))
    assert table.equal(causal_lm(family).get_input_embeddings().weight)
    apart = [p for p in model.parameters() if hasattr(p, "ds_numel")]
    assert gathered and apart and all(p.numel() == 0 for p in apart), "what was gathered was not released"


def test_an_adapter_is_loaded(tmp_path: Path, gathered: list[int]) -> None:
    model = adapted(causal_lm(), IAPTConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(take_apart(causal_lm()), tmp_path)
    weights = {name: value for name, value in model.named_parameters() if "generator" in name}
    assert weights and all(again.get_parameter(name).equal(value) for name, value in weights.items())


def test_parameters_that_are_whole_need_no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # the import fails
    model = get_peft_model(causal_lm(), IAPTConfig(task_type="CAUSAL_LM"))
    weight = model.get_input_embeddings().weight
    with whole(model.parameters()):
        assert num_elements(weight) == weight.numel() > 0
    weight.ds_numel = weight.numel()
    with pytest.raises(ImportError), whole([weight]):
        pass
