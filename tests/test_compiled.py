# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Compiled models: forward, backward, and `generate` with a static cache."""

from __future__ import annotations

import shutil

import pytest
import torch
from llama_calls import GREEDY, INPUTS, LABELS, logits
from methods import METHODS
from peft import PeftModel
from tiny import adapted, assert_same, batch, causal_lm, perturb

from peft_instance_prompt.engine.forward import current_pass
from peft_instance_prompt.engine.request import Request, current_request


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def small() -> PeftModel:
    # Of one method: all do their work in the hooks, which are not compiled.
    return adapted(causal_lm(num_hidden_layers=2), METHODS["iapt"](task_type="CAUSAL_LM"))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_forward_and_backward(backend: str, compiler: dict) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    model = small()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for inputs in (INPUTS, batch(11, 4)):  # another length, too
            live = inputs["attention_mask"].bool()
            assert_same(compiled(**inputs).logits[live], logits(model, inputs)[live])
    grads = []
    for call in (model.train(), compiled):
        model.zero_grad()
        call(**INPUTS, labels=LABELS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        assert_same(grads[1][name], grad, 1e-4)
    # The hooks part the graphs and have none themselves: of those there would be one per case that comes up.
    assert 0 < compiler["stats"]["unique_graphs"] < 25


def test_compiled_generation(compiler: dict) -> None:
    """`generate` with a static cache, whose forward is compiled."""
    model = small()
    expected = model.generate(**INPUTS, **GREEDY)
    base = model.get_base_model()
    plain = base.forward
    base.forward = torch.compile(plain, backend="eager")
    assert torch.equal(model.generate(**INPUTS, **GREEDY, cache_implementation="static"), expected)
    assert compiler["stats"]["unique_graphs"] > 0
    perturb(model, seed=4)  # the compiled model sees weights that are changed in place
    swapped = model.generate(**INPUTS, **GREEDY, cache_implementation="static")
    base.forward = plain
    assert torch.equal(swapped, model.generate(**INPUTS, **GREEDY)) and not torch.equal(swapped, expected)


@pytest.mark.parametrize("where", ["layer", "head", "scope"])
@torch.no_grad()
def test_error_in_a_compiled_model_leaves_nothing(where: str, compiler: dict) -> None:
    model = small()
    base, expected = model.get_base_model(), model(**INPUTS).logits
    compiled = torch.compile(model, backend="eager")

    def fail(*args) -> None:
        raise RuntimeError("broken")

    if where == "scope":
        with pytest.raises(ValueError, match="`instruction_mask` must have the shape of the tokens"):
            compiled(**INPUTS, instruction_mask=torch.ones(2, 3, dtype=torch.bool))
    else:
        handle = (base.model.layers[1] if where == "layer" else base.lm_head).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            compiled(**INPUTS)
        handle.remove()
    assert current_pass.get() is None and current_request() == Request()
    assert compiler["stats"]["unique_graphs"] > 0 or where == "scope"
    assert torch.equal(model(**INPUTS).logits, expected)
