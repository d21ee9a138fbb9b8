# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`module.forward(...)` does what `module(...)` does, above and beneath the wrappers of other libraries, and after copies."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import types
from collections.abc import Callable

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import extract_model_from_parallel
from methods import METHODS
from peft import get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, encoder, pair, perturb
from torch import nn

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.engine.forward import current_pass
from peft_instance_prompt.engine.request import Request, current_request


def direct(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return first(model.forward(**inputs))


def called(model: nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return first(model(**inputs))


def first(output) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


BASES: dict[str, Callable] = {
    "causal": causal_lm,
    "stack": lambda: causal_lm().model,  # base model and stack are one module
    "encoder": encoder,
    "pair": lambda: pair("bart"),
}


def on(base: str, method: str = "iapt"):
    """A base model with an adapter inside, its inputs, and what it gives without the adapter."""
    model, inputs = BASES[base](), batch(9, 6, side="right")
    if base == "pair":
        inputs["decoder_input_ids"] = torch.tensor([[1, 5], [1, 6]])
    bare = called(model, **inputs)
    peft_model = adapted(model, METHODS[method]())
    return peft_model.base_model.model, inputs, bare


@pytest.mark.parametrize("base", BASES)
def test_forward_does_what_a_call_does(base: str, method: str) -> None:
    model, inputs, bare = on(base, method)
    found = direct(model, **inputs)
    assert_same(found, called(model, **inputs))
    assert (found - bare).abs().max() > 1e-3, "the adapter has an effect"
    stack = model if base in ("stack", "encoder") else model.get_encoder() if base == "pair" else model.model
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert_same(direct(stack, **inputs), called(stack, **inputs))


@pytest.mark.parametrize("base", BASES)
def test_signature_name_and_class_stay(base: str) -> None:
    model, bare = on(base)[0], BASES[base]()
    assert inspect.signature(model.forward) == inspect.signature(bare.forward)
    assert model.forward.__name__ == "forward" and model.forward.__doc__ == bare.forward.__doc__
    assert type(model) is type(bare)


def test_labels_and_masks_of_a_direct_call() -> None:
    """The scope is found as in a call."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")).base_model.model
    inputs = batch(9, 9)
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    assert_same(direct(model, **inputs, labels=labels), called(model, **inputs, labels=labels))
    assert (direct(model, **inputs, labels=labels) - direct(model, **inputs)).abs().max() > 1e-3
    mask = labels == -100
    assert_same(direct(model, **inputs, instruction_mask=mask), called(model, **inputs, labels=labels))
    assert_same(direct(model, **inputs), called(model, **inputs)), "a noted mask is forgotten"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_run_their_own_adapter(base: str, how: str) -> None:
    model, inputs, _ = on(base)
    expected = direct(model, **inputs)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert_same(direct(twin, **inputs), expected)
    perturb(model, seed=7, adapter="default")
    assert_same(direct(twin, **inputs), expected)
    assert_same(called(twin, **inputs), expected)
    assert (direct(model, **inputs) - expected).abs().max() > 1e-3


def double(model: nn.Module) -> None:
    """What TRL does: a forward of its own in the place of the model's, which it calls."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        out = original(*args, **kwargs)
        out.last_hidden_state = 2 * out.last_hidden_state
        return out

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("order", ["above", "beneath"])
def test_another_wrapper(order: str) -> None:
    model, inputs, bare = on("stack")
    expected = 2 * called(model, **inputs)
    if order == "above":
        double(model)
    else:
        base = BASES["stack"]()
        double(base)
        peft_model = adapted(base, IAPTConfig(bottleneck_dim=8, activation="rational"))
        model = peft_model.base_model.model
        expected = 2 * called(on("stack")[0], **inputs)
    assert_same(direct(model, **inputs), expected)
    assert_same(called(model, **inputs), expected)


@pytest.mark.parametrize("order", ["hook first", "adapter first"])
@pytest.mark.parametrize("base", BASES)
def test_hooks_of_accelerate(base: str, order: str) -> None:
    model, inputs, bare = on(base)
    expected = called(model, **inputs)
    if order == "hook first":
        plain = BASES[base]()
        for module in list(plain.modules()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
        peft_model = adapted(plain, METHODS["iapt"]())
        model = peft_model.base_model.model
    else:
        for module in list(model.modules()):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert_same(direct(model, **inputs), expected)
    assert_same(called(model, **inputs), expected)
    for module in list(model.modules()):  # dispatched again, as `PeftModel.load_adapter` does
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert_same(direct(model, **inputs), expected)
    remove_hook_from_module(model, recurse=True)
    assert_same(direct(model, **inputs), expected)
    assert_same(called(model, **inputs), expected)


def test_mixed_precision_wrapper_of_accelerate_is_taken_off_again() -> None:
    model, inputs, _ = on("stack")
    expected = called(model, **inputs)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # what other tests of the process have left
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert (called(prepared, **inputs) - expected).abs().max() < 0.5
    plain = extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    assert_same(called(plain, **inputs), expected)


@pytest.mark.parametrize("base", BASES)
def test_unload_leaves_no_trace(base: str) -> None:
    bare = BASES[base]()
    own = {name: set(module.__dict__) for name, module in bare.named_modules()}
    hooks = hook_counts(bare)
    for _ in range(2):
        peft_model = get_peft_model(bare, METHODS["iapt"]())
        bare = peft_model.unload()
    assert {name: set(module.__dict__) - {"peft_config"} for name, module in bare.named_modules()} == own
    assert hook_counts(bare) == hooks


def hook_counts(model: nn.Module) -> dict[str, int]:
    return {
        f"{name}.{table}": len(entries)
        for name, module in model.named_modules()
        for table, entries in vars(module).items()
        if "hooks" in table and isinstance(entries, dict)
    }


def test_unload_beneath_another_wrapper() -> None:
    model, inputs = BASES["stack"](), batch(9, 6)
    bare = called(model, **inputs)
    peft_model = adapted(model, IAPTConfig(bottleneck_dim=8))
    double(model)
    peft_model.unload()
    assert_same(direct(model, **inputs), 2 * bare)
    assert_same(called(model, **inputs), 2 * bare)


def test_an_interrupt_in_a_direct_call_leaves_no_request() -> None:
    model, inputs, _ = on("causal")
    expected = direct(model, **inputs)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    for call in (model.forward, model):
        with pytest.raises(KeyboardInterrupt):
            call(**inputs, instruction_mask=torch.ones_like(inputs["input_ids"]))
        assert current_pass.get() is None and current_request() == Request()
    handle.remove()
    assert_same(direct(model, **inputs), expected)
