# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The hooks: nothing is left behind by a call that failed or was interrupted."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from decoder_calls import GREEDY, INPUTS, nothing_is_left, prompted  # noqa: F401 (runs for each test)
from tiny import causal_lm

from peft_instance_prompt.engine import request as requests
from peft_instance_prompt.engine.calls import cache_of
from peft_instance_prompt.engine.forward import current_pass
from peft_instance_prompt.engine.request import Request, current_request


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("where", ["layer", "head", "stack_input"])
@torch.no_grad()
def test_exception_inside_forward_leaves_nothing(method: str, where: str) -> None:
    model = prompted(method)
    base = model.get_base_model()
    expected, text = model(**INPUTS).logits, model.generate(**INPUTS, **GREEDY)

    def fail(*args) -> None:
        raise Broken

    module = {"layer": base.model.layers[1], "head": base.lm_head, "stack_input": base.model}[where]
    handle = module.register_forward_pre_hook(fail)
    for call in (lambda: model(**INPUTS), lambda: model.generate(**INPUTS, **GREEDY)):
        with pytest.raises(Broken):
            call()
    handle.remove()
    assert current_request() == Request()
    with model.disable_adapter():
        assert torch.equal(model(**INPUTS).logits, causal_lm()(**INPUTS).logits)
    assert torch.equal(model(**INPUTS).logits, expected)
    assert torch.equal(model.generate(**INPUTS, **GREEDY), text)


def test_interrupted_step_of_a_cached_generation(kind: str) -> None:
    model = prompted(kind)
    layer, calls = model.get_base_model().model.layers[1], []

    def fail(*args) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Broken

    text = model.generate(**INPUTS, **GREEDY)
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        model.generate(**INPUTS, **GREEDY)
    handle.remove()
    assert torch.equal(model.generate(**INPUTS, **GREEDY), text)


@pytest.mark.parametrize("where", ["layer", "head"])
@torch.no_grad()
def test_interrupt_by_the_user(method: str, where: str) -> None:
    """Torch runs no hook after a KeyboardInterrupt, as when a cell of a notebook is stopped."""
    model = prompted(method)
    base = model.get_base_model()
    expected, text = model(**INPUTS).logits, model.generate(**INPUTS, **GREEDY)
    plain = causal_lm()(**INPUTS).logits

    def stop(*args) -> None:
        raise KeyboardInterrupt

    def interrupt(call) -> None:
        handle = (base.model.layers[1] if where == "layer" else base.lm_head).register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            call()
        handle.remove()

    mask = INPUTS["attention_mask"] * (torch.arange(9) < 6)
    token = current_pass.set(None)
    known = requests.notes.set(())
    try:
        interrupt(lambda: model(**INPUTS, instruction_mask=mask))
        with model.disable_adapter():
            assert torch.equal(model(**INPUTS).logits, plain)
        assert torch.equal(model(**INPUTS).logits, expected)
        interrupt(lambda: model.generate(**INPUTS, **GREEDY, instruction_mask=mask))
        assert torch.equal(model(**INPUTS).logits, expected)
        interrupt(lambda: model(**INPUTS, instruction_mask=mask))
        assert torch.equal(model.generate(**INPUTS, **GREEDY), text)
    finally:
        requests.notes.reset(known)
        current_pass.reset(token)


@torch.no_grad()
def test_interrupts_keep_nothing_alive(kind: str) -> None:
    model, caches = prompted(kind), []

    def interrupted() -> None:
        def stop(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            cache = cache_of(kwargs)[1]  # None in a frozen pass
            if cache is not None and cache.get_seq_length() > 0:
                caches.append(weakref.ref(cache))
                raise KeyboardInterrupt

        attention = model.get_base_model().model.layers[1].self_attn
        handle = attention.register_forward_pre_hook(stop, with_kwargs=True)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**INPUTS, **GREEDY)
        handle.remove()

    for _ in range(3):
        interrupted()
    assert current_pass.get() is None and current_request() == Request()
    gc.collect()
    assert [cache() for cache in caches] == [None] * 3
