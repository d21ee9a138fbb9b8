# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The hooks: gradients, copies, threads, and nothing left behind by a call that failed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from methods import METHODS
from peft import PeftModel
from tiny import adapted, assert_same, batch, causal_lm, encoder, perturb

from peft_instance_prompt.engine import request as requests
from peft_instance_prompt.engine.calls import cache_of
from peft_instance_prompt.engine.layer import InstancePromptLayer
from peft_instance_prompt.engine.passes import current_pass
from peft_instance_prompt.engine.request import Request, current_request


INPUTS = batch(9, 6)
LABELS = INPUTS["input_ids"].where(torch.arange(9) > 5, -100)  # row 1 is padded on the left: 3 tokens of instruction
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def prompted(method: str, family: str = "llama", seed: int = 0, **fields) -> PeftModel:
    return adapted(causal_lm(family), METHODS[method](task_type="CAUSAL_LM", **fields), seed=seed)


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)  # for methods that sample or drop out in training
    model.train()(**INPUTS, labels=LABELS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert current_pass.get() is None
    assert current_request() == Request()


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


def test_threads(method: str) -> None:
    """Eight threads on one model, each with a batch and a way of its own, twice."""
    model = prompted(method)
    ways = [GREEDY, {**GREEDY, "use_cache": False}, {**GREEDY, "num_beams": 2}, {**GREEDY, "num_return_sequences": 1}]
    jobs = [({**batch(5 + i, 4 + i // 2, seed=i)}, ways[i % 4]) for i in range(8)]

    def run(job: tuple[dict, dict], barrier: threading.Barrier | None = None) -> list[torch.Tensor]:
        if barrier is not None:
            barrier.wait()
        return [model.generate(**job[0], **job[1]) for _ in range(2)]

    alone = [run(job) for job in jobs]
    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: run(job, barrier), jobs))
    for one, other in zip(alone, together):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_threads_with_adapters_of_their_own(kind: str) -> None:
    """Eight threads on one model, each with its own text and its own adapter for each row."""
    model = prompted(kind)
    names = ["default", "__base__", "two", "three"]
    for seed, name in enumerate(names[2:], 2):
        model.add_adapter(name, METHODS[kind](task_type="CAUSAL_LM"))
        perturb(model, seed, adapter=name)
    jobs = [{**batch(5 + i, 4 + i // 2, seed=i), "adapter_names": [names[i % 4], names[i // 3]]} for i in range(8)]
    barrier = threading.Barrier(8)

    def run(job: dict, wait: bool = True) -> list[torch.Tensor]:
        if wait:
            barrier.wait()
        return [model.generate(**job, **GREEDY) for _ in range(2)]

    alone = [run(job, wait=False) for job in jobs]
    for one, job in zip(alone, jobs):
        changed = {**job, "adapter_names": job["adapter_names"][::-1]}
        same = job["adapter_names"][0] == job["adapter_names"][1]
        assert same or not torch.equal(run(changed, wait=False)[0], one[0]), "the adapters write the same text"
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, jobs))
    for one, other in zip(alone, together):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_deep_copy_is_independent(method: str) -> None:
    model = prompted(method)
    with torch.no_grad():
        before = model(**INPUTS).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**INPUTS).logits, before)
        perturb(twin, seed=7)
        changed = twin(**INPUTS).logits
        assert torch.equal(model(**INPUTS).logits, before), "the copy's weights are used by the original"
        assert (changed - before).abs().max() > 1e-2, "the copy uses the original's weights"
        perturb(model, seed=8)
        assert torch.equal(twin(**INPUTS).logits, changed)
        base = twin.unload()
        assert torch.equal(base(**INPUTS).logits, causal_lm()(**INPUTS).logits)
        assert not torch.equal(model(**INPUTS).logits, base(**INPUTS).logits), (
            "unloading the copy unloads the original"
        )


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickle(method: str, how: str) -> None:
    model = prompted(method)
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(**INPUTS).logits, model(**INPUTS).logits)
    assert torch.equal(again.generate(**INPUTS, **GREEDY), model.generate(**INPUTS, **GREEDY))


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
    known = requests.latest_request.set(Request())
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
        requests.latest_request.reset(known)
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


@torch.no_grad()
def test_a_model_called_inside_another(method: str) -> None:
    outer, inner = prompted(method), prompted(method, "gpt2", seed=5)
    expected_outer, expected_inner = outer(**INPUTS).logits, inner(**batch(7)).logits
    seen = []

    def call_inner(*args) -> None:
        seen.append(inner(**batch(7)).logits)

    handle = outer.get_base_model().model.layers[1].register_forward_pre_hook(call_inner)
    assert torch.equal(outer(**INPUTS).logits, expected_outer)
    handle.remove()
    assert torch.equal(seen[0], expected_inner)
    # One that has nothing to do, or that fails, leaves the outer one at work all the same.
    for bad in (False, True):

        def call_inner_otherwise(*args, bad: bool = bad) -> None:
            if bad:
                with pytest.raises(ValueError, match="empty"):
                    inner(torch.zeros(0, 3, dtype=torch.long))
            else:
                with inner.disable_adapter():
                    inner(**batch(7))

        handle = outer.get_base_model().model.layers[1].register_forward_pre_hook(call_inner_otherwise)
        assert torch.equal(outer(**INPUTS).logits, expected_outer)
        handle.remove()
    assert torch.equal(outer(**INPUTS).logits, expected_outer)
    assert torch.equal(inner(**batch(7)).logits, expected_inner)


@torch.no_grad()
def test_same_model_called_inside_itself(kind: str) -> None:
    model = prompted(kind)
    expected, other = model(**INPUTS).logits, model(**batch(5)).logits
    seen = []

    def call_again(*args) -> None:
        if not seen:
            seen.append(None)
            seen[0] = model(**batch(5)).logits

    handle = model.get_base_model().lm_head.register_forward_pre_hook(call_again)
    assert torch.equal(model(**INPUTS).logits, expected)
    handle.remove()
    assert torch.equal(seen[0], other)


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
        rest = 1 - maps.sum(dim=-1)[0]
        assert (rest > 1e-6).any(), "no attention goes to the prompt"
    assert [maps.shape for maps in step.attentions] == [(2, 4, 1, 10)] * 3


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
