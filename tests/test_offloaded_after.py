# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Models that are offloaded when the adapters are attached already: every parameter lies on `meta` until its module is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from methods import METHODS
from tiny import adapted, assert_same, batch, causal_lm, encoder, pair, perturb
from torch import nn


def spread(model: nn.Module, folder: Path) -> nn.Module:
    places = {name: "cpu" for name, _ in model.named_modules() if name.rpartition(".")[2].isdigit()}
    parts = [name for name, parameter in model.named_parameters() if not name.startswith(tuple(places))]
    modules = {name.rpartition(".")[0] for name in parts}
    return dispatch_model(model, {**places, **dict.fromkeys(modules, "cpu")}, main_device="cpu", force_hooks=True)


WAYS: dict[str, Callable] = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device="cpu"),
    "dispatched": spread,
}
BASES: dict[str, tuple[Callable, str | None]] = {
    "causal": (causal_lm, "CAUSAL_LM"),
    "encoder": (lambda: encoder("modernbert"), None),
    "pair": (lambda: pair("t5"), "SEQ_2_SEQ_LM"),
}
INPUTS = batch(9, 6)
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def made(base: str, method: str, **fields):
    build, task = BASES[base]
    model = adapted(build(), METHODS[method](task_type=task, init_weights=False, **fields))
    return model, {**INPUTS, **({"decoder_input_ids": torch.tensor([[1, 5], [1, 6]])} if base == "pair" else {})}


def run(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("way", WAYS)
def test_forward_and_generate(method: str, way: str, tmp_path: Path) -> None:
    model, inputs = made("causal", method)
    expected, text = run(model, inputs), model.generate(**inputs, **GREEDY)
    offloaded = WAYS[way](copy.deepcopy(model), tmp_path)
    assert way == "dispatched" or all(parameter.is_meta for parameter in offloaded.parameters())
    assert_same(run(offloaded, inputs), expected)
    assert torch.equal(offloaded.generate(**inputs, **GREEDY), text)
    assert way == "dispatched" or all(parameter.is_meta for parameter in offloaded.parameters())


@pytest.mark.parametrize("base", BASES)
def test_families(base: str, kind: str, tmp_path: Path) -> None:
    model, inputs = made(base, kind)
    expected = run(model, inputs)
    assert_same(run(disk_offload(model, str(tmp_path), execution_device="cpu"), inputs), expected)


@pytest.mark.slots
def test_constant_condition(kind: str) -> None:
    model, inputs = made("causal", kind, condition="constant")
    expected = run(model, inputs)
    assert_same(run(cpu_offload(model, execution_device="cpu"), inputs), expected)


def test_several_adapters(method: str) -> None:
    model, inputs = made("causal", method)
    model.add_adapter("b", METHODS[method](task_type="CAUSAL_LM", init_weights=False))
    perturb(model, seed=1, adapter="b")
    inputs = {**batch(9, 6, 8, 9), "adapter_names": ["b", "default", "__base__", "b"]}
    expected = run(model, inputs)
    assert_same(run(cpu_offload(model, execution_device="cpu"), inputs), expected)
