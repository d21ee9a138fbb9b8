# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The hooks: gradients, and the outputs that the caller gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoder_calls import INPUTS, nothing_is_left, prompted  # noqa: F401 (runs for each test)
from methods import METHODS
from peft import PeftModel
from tiny import adapted, assert_same, batch, causal_lm, encoder

from peft_instance_prompt.engine.layer import InstancePromptLayer


LABELS = INPUTS["input_ids"].where(torch.arange(9) > 5, -100)  # row 1 is padded on the left: 3 tokens of instruction


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)  # for methods that sample or drop out in training
    model.train()(**INPUTS, labels=LABELS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing(method: str, family: str, use_reentrant: bool) -> None:
    model = prompted(method, family)
    expected = gradients(model)
    assert expected and all(grad.isfinite().all() for grad in expected.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same(actual[name], expected[name], 2e-5)
    # The backward pass of another thread sees no context of this one.
    thread_result = ThreadPoolExecutor(1).submit(gradients, model).result()
    for name in expected:
        assert_same(thread_result[name], expected[name], 2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unload_restores_the_checkpoint_functions(family: str) -> None:
    """Of the stack, too, which has one where it has a switch."""
    model = prompted("iapt", family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {name: vars(m).get("_gradient_checkpointing_func") for name, m in model.get_base_model().named_modules()}
    gradients(model)
    base = model.unload()
    kept = {name: function for name, function in own.items() if function is not None}
    assert kept and all(vars(base.get_submodule(n))["_gradient_checkpointing_func"] is f for n, f in kept.items())


def test_two_losses_before_one_backward(method: str) -> None:
    model = prompted(method)
    other = batch(7, 7, seed=2)
    other_labels = other["input_ids"].where(torch.arange(7) > 3, -100)

    def loss(inputs: dict, labels: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return model.train()(**inputs, labels=labels).loss

    grads = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        first, second = loss(INPUTS, LABELS), loss(other, other_labels)
        (first + 2 * second).backward()
        grads[checkpointing] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, grad in grads[False].items():
        assert_same(grads[True][name], grad, 2e-5)


# -------------------------------------------------------------------------------------------------------------- outputs


def test_outputs_as_a_tuple(kind: str) -> None:
    model = prompted(kind)
    with torch.no_grad():
        out = model(**INPUTS, output_hidden_states=True)
        plain = model(**INPUTS, output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], out.logits)
    assert all(torch.equal(a, b) for a, b in zip(plain[-1], out.hidden_states))


def test_outputs_as_a_tuple_by_the_config(kind: str) -> None:
    model = adapted(encoder("bert"), METHODS[kind]()).eval()
    with torch.no_grad():
        states = model(**batch(9, 6)).last_hidden_state
        model.get_base_model().config.return_dict = False
        out = model(**batch(9, 6))
    assert isinstance(out, tuple) and torch.equal(out[0], states)


@pytest.mark.slots
def test_attentions_are_those_among_tokens(kind: str) -> None:
    model = adapted(causal_lm(attn_implementation="eager"), METHODS[kind](task_type="CAUSAL_LM"))
    with torch.no_grad():
        first = model(**INPUTS, output_attentions=True, use_cache=True)
        mask = torch.cat([INPUTS["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        step = model(
            torch.tensor([[4], [5]]),
            attention_mask=mask,
            past_key_values=first.past_key_values,
            output_attentions=True,
        )
    for maps in first.attentions:
        assert maps.shape == (2, 4, 9, 9)
        assert (maps[0].triu(1) == 0).all() and (maps[1, :, 3:, :3] == 0).all()
    assert [maps.shape for maps in step.attentions] == [(2, 4, 1, 10)] * 3
    for maps in step.attentions:
        assert (1 - maps.sum(dim=-1) > 1e-6).any(), "no attention goes to the prompt"


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.slots
def test_model_with_positions_for_no_slots(kind: str) -> None:
    model = adapted(causal_lm("gpt2", n_positions=12), METHODS[kind](task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert model(**batch(8, 5)).logits.shape[1] == 8
        with pytest.raises(ValueError, match="the model has 12 positions, and 12 tokens with"):
            model(**batch(12, 6))
        with pytest.raises(ValueError, match="the model has 12 positions"):
            model.generate(**batch(7), max_new_tokens=8, min_new_tokens=8)


def test_only_one_adapter_of_a_layer_is_active(kind: str) -> None:
    model = prompted(kind)
    model.add_adapter("other", METHODS[kind](task_type="CAUSAL_LM"))
    (layer,) = (module for module in model.modules() if isinstance(module, InstancePromptLayer))
    with pytest.raises(ValueError, match=r"Only one .*\['default', 'other'\]"):
        layer.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="cannot be merged"):
        layer.merge()
