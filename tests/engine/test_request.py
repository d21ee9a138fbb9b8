# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What is said of a call: contexts that end in any order, threads, and adapters that come and go meanwhile."""

from __future__ import annotations

import itertools
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import torch
from methods import METHODS
from tiny import adapted, assert_same, batch, causal_lm, encoder, perturb
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import CausalLMOutput

from peft_instance_prompt import instruction_scope, to_prompt_embeds
from peft_instance_prompt.engine.request import Request, current_request, notes


GREEDY = {"max_new_tokens": 6, "do_sample": False}


def scope() -> torch.Tensor | None:
    return current_request().instruction_mask


OF_ANOTHER_KIND = [
    ("instruction_mask", [], "bools or 0/1 integers, got list"),
    ("instruction_mask", torch.ones(2, 9), r"bools or 0/1 integers, got torch.float32"),
    ("instance_embeds", [], "floats, got list"),
    ("instance_embeds", torch.ones(2, 8).long(), "floats, got torch.int64"),
    ("task_ids", [], "integers, got list"),
    ("task_ids", "ab", "integers, got str"),
    ("task_ids", torch.ones(2), "integers, got torch.float32"),
    ("task_ids", torch.ones(2).bool(), "integers, got torch.bool"),
]


@torch.no_grad()
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize(("name", "value", "says"), OF_ANOTHER_KIND)
def test_an_argument_of_another_kind(name: str, value: object, says: str, call: str, kind: str) -> None:
    """It is refused whether the method reads it or not, and what was said around the call still holds."""
    model, inputs = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")), batch(9, 9)
    run = model if call == "forward" else model.generate
    mask = (torch.arange(9) < 4).long().expand(2, -1)
    with instruction_scope(mask):
        expected = model(**inputs).logits
        with pytest.raises(TypeError, match=f"`{name}` must be a tensor of {says}"):
            run(**inputs, **{name: value})
        assert torch.equal(model(**inputs).logits, expected)


def test_contexts_that_take_turns() -> None:
    """Two generators whose contexts overlap: each takes back what it said, and nothing else."""
    masks = [torch.tensor([[i]]) for i in range(3)]

    def within(mask):
        with instruction_scope(mask):
            yield scope()
            yield scope()

    first, second = within(masks[0]), within(masks[1])
    assert next(first) is masks[0] and next(second) is masks[1]
    assert list(first) == [masks[1]], "the first ends while the second goes on"
    assert scope() is masks[1]
    assert list(second) == [masks[1]]
    assert scope() is None and current_request() == Request()
    with instruction_scope(masks[0]):
        with instruction_scope(masks[1]):
            assert scope() is masks[1]
        assert scope() is masks[0]
    assert scope() is None


def test_three_contexts_in_every_order() -> None:
    masks = [torch.tensor([[i]]) for i in range(3)]
    for order in itertools.permutations(range(3)):
        contexts = [instruction_scope(mask) for mask in masks]
        for context in contexts:
            context.__enter__()
        open_ones = [0, 1, 2]
        for number in order:
            contexts[number].__exit__(None, None, None)
            open_ones.remove(number)
            expected = masks[open_ones[-1]] if open_ones else None
            assert scope() is expected, (order, number)
    assert notes.get() == ()


def test_a_scope_holds_in_its_own_thread() -> None:
    """An executor's threads see it if the caller hands its context on."""
    mask = torch.tensor([[1]])
    with ThreadPoolExecutor(1) as pool, instruction_scope(mask):
        assert pool.submit(scope).result() is None
        assert pool.submit(copy_context().run, scope).result() is mask


@torch.no_grad()
def test_a_forward_in_the_place_of_the_base_models(kind: str) -> None:
    """TRL's calls the stack and the head itself. The call is noted and forgotten all the same, also if it fails."""
    model, inputs = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")), batch(9, 9)
    inputs["instruction_mask"] = (torch.arange(9) < 4).expand(2, -1)
    expected, base, broken = model(**inputs).logits, model.get_base_model(), False

    def forward(self, input_ids, attention_mask, **kwargs):
        assert "instruction_mask" not in kwargs
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if broken:
            raise RuntimeError("broken")
        return CausalLMOutput(logits=self.lm_head(states))

    base.forward = types.MethodType(forward, base)
    for callee in (model, base):
        broken = False
        assert torch.equal(callee(**inputs).logits, expected) and notes.get() == ()
        broken = True
        with pytest.raises(RuntimeError, match="broken"):
            callee(**inputs)
        assert notes.get() == ()


def test_threads_ask_for_prompt_embeds(kind: str) -> None:
    """Each request gets its own embeddings, and forward passes beside them are not disturbed."""
    if kind not in ("dynamic_prompt", "ipt", "idpg_single"):
        pytest.skip("does not enter at the input alone")
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
    inputs = [batch(9, seed=seed) for seed in range(8)]
    with torch.no_grad():
        embeds = [to_prompt_embeds(model, **one)[0] for one in inputs]
        logits = [model(**one).logits for one in inputs]

    @torch.no_grad()
    def work(number: int) -> None:
        for _ in range(5):
            assert torch.equal(to_prompt_embeds(model, **inputs[number])[0], embeds[number])
            assert torch.equal(model(**inputs[number]).logits, logits[number])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_threads_with_heads_of_their_own(kind: str) -> None:
    """`modules_to_save` in a batch of several adapters: which row is whose is part of the request."""
    base = encoder(auto=AutoModelForSequenceClassification)
    model = adapted(base, METHODS[kind](task_type="SEQ_CLS"), name="a")
    model.add_adapter("b", METHODS[kind](task_type="SEQ_CLS"))
    perturb(model, seed=5, adapter="b")
    model.eval()
    inputs = batch(9, 6, side="right")
    names = [["a", "b"], ["b", "a"], ["a", "a"], ["b", "__base__"]]
    with torch.no_grad():
        expected = [model(**inputs, adapter_names=each).logits for each in names]
    assert (expected[0] - expected[1]).abs().max() > 1e-3

    @torch.no_grad()
    def work(number: int) -> None:
        for _ in range(10):
            assert_same(model(**inputs, adapter_names=names[number % 4]).logits, expected[number % 4])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert not any(
        len(module._forward_pre_hooks) > 1 for name, module in model.named_modules() if name.endswith("classifier")
    ), "no hook per call"


def test_adapters_come_and_go_beside_generation(kind: str) -> None:
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"), name="a")
    model.add_adapter("b", METHODS[kind](task_type="CAUSAL_LM"))
    perturb(model, seed=5, adapter="b")
    model.eval()
    inputs = batch(9, 6)
    with torch.no_grad():
        expected = model.generate(**inputs, **GREEDY, adapter_names=["a", "b"])
    done = threading.Event()

    def come_and_go() -> int:
        count = 0
        while not done.is_set():
            model.add_adapter("passing", METHODS[kind](task_type="CAUSAL_LM"))
            model.delete_adapter("passing")
            count += 1
        return count

    @torch.no_grad()
    def work(_: int) -> None:
        for _ in range(4):
            assert torch.equal(model.generate(**inputs, **GREEDY, adapter_names=["a", "b"]), expected)

    with ThreadPoolExecutor(5) as pool:
        going = pool.submit(come_and_go)
        try:
            list(pool.map(work, range(8)))
        finally:
            done.set()
        assert going.result() > 0


def test_a_deleted_adapter_is_refused_and_never_taken_for_the_base_model(kind: str) -> None:
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"), name="a")
    model.add_adapter("b", METHODS[kind](task_type="CAUSAL_LM"))
    model.eval()
    model.delete_adapter("b")
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(**batch(9, 6), adapter_names=["a", "b"])
