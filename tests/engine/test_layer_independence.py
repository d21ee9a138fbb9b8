# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The hooks: threads, copies, and models that are called inside another do not disturb each other."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoder_calls import GREEDY, INPUTS, nothing_is_left, prompted  # noqa: F401 (runs for each test)
from methods import METHODS
from tiny import batch, causal_lm, perturb


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


# --------------------------------------------------------------------------------------------------------------- copies


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


# ------------------------------------------------------------------------------------------------- a call within a call


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
