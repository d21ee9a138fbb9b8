# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Replicas of `DataParallel`, in which Trainer wraps a model on a machine with two GPUs: each runs the weights that it got.

They are wired here by hand as `torch.nn.parallel.replicate` does it, which needs GPUs.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from methods import METHODS
from tiny import adapted, assert_same, batch, causal_lm, encoder, pair
from torch import nn

from peft_instance_prompt import instruction_scope
from peft_instance_prompt.engine.layer import InstancePromptLayer


BASES: dict[str, Callable] = {
    "llama": causal_lm,
    "opt": lambda: causal_lm("opt"),
    "stack": lambda: causal_lm().model,  # base model and stack are one module
    "albert": lambda: encoder("albert"),
    "bart": lambda: pair("bart"),
}
PARTS: dict[str, Callable[[str], bool]] = {
    "adapter": lambda name: "generator" in name,
    "base": lambda name: "generator" not in name and ("layers" in name or "albert_layer" in name),
}


def replicate(model: nn.Module, weight: Callable[[str, torch.Tensor], torch.Tensor]) -> nn.Module:
    """A replica of all modules, whose tensors are what `weight` makes of the model's."""
    twins = {}
    for module in model.modules():
        twins[module] = module._replicate_for_data_parallel()
        twins[module]._former_parameters = {}
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(twin, name, twins[child])
        for name, tensor in module._parameters.items():
            if tensor is None:
                twin._parameters[name] = None
            else:  # no leaf any more, and so a plain attribute
                twin._former_parameters[name] = weight(names[id(tensor)], tensor).clone()
                setattr(twin, name, twin._former_parameters[name])
        for name, tensor in module._buffers.items():
            if tensor is not None:
                setattr(twin, name, weight(names[id(tensor)], tensor).clone())
    return twins[model]


def run(model: nn.Module, inputs: dict, how: str = "call") -> torch.Tensor:
    """In a thread of its own, as `DataParallel` does."""
    found: list = []

    def target() -> None:
        try:
            with torch.no_grad():
                found.append(model(**inputs) if how == "call" else model.forward(**inputs))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0].logits if "logits" in found[0] else found[0].last_hidden_state


def on(base: str, method: str):
    model, inputs = BASES[base](), batch(9, 6, side="right")
    if base == "bart":
        inputs["decoder_input_ids"] = torch.tensor([[1, 5], [1, 6]])
    return adapted(model, METHODS[method](init_weights=False)), inputs


def zeroed(model: nn.Module, part: str, inputs: dict) -> torch.Tensor:
    """What a deep copy gives with the weights of a part at zero."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if PARTS[part](name):
                parameter.zero_()
    return run(twin, inputs)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("base", BASES)
def test_a_replica_runs_its_own_weights(base: str, part: str, kind: str) -> None:
    model, inputs = on(base, kind)
    before = run(model, inputs)
    expected = zeroed(model, part, inputs)
    assert (expected - before).abs().max() > 1e-3
    replica = replicate(model, lambda name, tensor: tensor * 0 if PARTS[part](name) else tensor)
    for one in (replica, replicate(model, lambda name, tensor: tensor)):  # the first is not changed by the second
        assert_same(run(one, inputs, "call"), expected if one is replica else before)
        inner = one.base_model.model
        assert_same(run(inner, inputs, "forward"), expected if one is replica else before)
    assert_same(run(replica, inputs), expected)
    assert torch.equal(run(model, inputs), before)


def test_every_method(method: str) -> None:
    model, inputs = on("llama", method)
    expected = zeroed(model, "base", inputs)
    replica = replicate(model, lambda name, tensor: tensor * 0 if PARTS["base"](name) else tensor)
    assert_same(run(replica, inputs), expected)


def test_gradients_reach_the_original() -> None:
    """A replica's weights come from the original's by an operation that autograd knows."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    inputs = batch(9, 9)
    labels = inputs["input_ids"].masked_fill(torch.arange(9) < 5, -100)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(model(**inputs, labels=labels).loss, own)
    loss = replicate(model, lambda name, tensor: tensor)(**inputs, labels=labels).loss
    for one, other in zip(torch.autograd.grad(loss, own), expected):
        assert_same(one, other)


def test_several_adapters_in_a_replica(kind: str) -> None:
    model, inputs = on("llama", kind)
    model.add_adapter("b", METHODS[kind](init_weights=False))
    expected = run(model, {**inputs, "adapter_names": ["b", "default"]})
    replica = replicate(model, lambda name, tensor: tensor)
    assert_same(run(replica, {**inputs, "adapter_names": ["b", "default"]}), expected)


def test_a_mask_said_around_the_call_is_refused() -> None:
    """The threads of `DataParallel` do not see it, and would read the response."""
    model, inputs = on("llama", "iapt")
    with instruction_scope(inputs["attention_mask"]):
        with pytest.raises(ValueError, match="`instruction_mask`.*DataParallel.*pass `instruction_mask` to the model"):
            replicate(model, lambda name, tensor: tensor)
    replicate(model, lambda name, tensor: tensor)


def test_copies_of_a_model_that_was_replicated() -> None:
    model, inputs = on("llama", "iapt")
    before = run(model, inputs)
    replica = replicate(model, lambda name, tensor: tensor * 0 if PARTS["adapter"](name) else tensor)
    twin = copy.deepcopy(model)
    assert_same(run(twin, inputs), before)
    assert_same(run(replicate(twin, lambda name, tensor: tensor), inputs), before)
    layers = [module for module in replica.modules() if isinstance(module, InstancePromptLayer)]
    assert len(layers) == 1 and layers[0] is not model.base_model.model.model.iapt


def test_unload_takes_it_off() -> None:
    model = on("stack", "iapt")[0]
    bare = model.unload()
    assert not [name for module in bare.modules() for name in vars(module) if "instance_prompt" in name]
    assert not [module for module in bare.modules() if "_replicate_for_data_parallel" in vars(module)]
