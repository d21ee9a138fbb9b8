# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Watching and replacing what is generated."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch
from methods import METHODS
from peft import get_peft_model

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.engine.intercept import intercept


def adapted(kind: str = "iapt", **fields):
    config = METHODS[kind](task_type="CAUSAL_LM", init_weights=False, **fields)
    return get_peft_model(tiny.causal_lm(), config).eval()


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, tiny.VOCAB, (3, 7), generator=torch.Generator().manual_seed(seed))


def test_what_is_seen_is_what_the_layers_get():
    """Against a hook that reads the slots, here the first positions, from a layer's input."""
    model, seen, read = adapted("iapt_after_first", prompt_position="before"), {}, {}
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, n=number: read.__setitem__(
                n, (args[0] if args else kwargs["hidden_states"])[:, :4]
            ),
            with_kwargs=True,
        )
    with intercept(lambda made: seen.__setitem__(made.depth, made)):
        model(batch())
    assert list(seen) == [0, 1, 2]
    for depth, made in seen.items():
        assert torch.equal(made.values, read[depth]) and made.layout.num_slots == 4
        assert made.generators == [model.base_model.model.model.iapt.generators["default"]]


@pytest.mark.slots
def test_watching_changes_nothing_and_ends_with_the_context(kind):
    model, calls = adapted(kind), []
    before = model(batch()).logits
    with intercept(calls.append):
        assert torch.equal(model(batch()).logits, before)
    assert calls
    calls.clear()
    assert torch.equal(model(batch()).logits, before) and not calls


@pytest.mark.slots
def test_replacing(kind):
    """What is put in place of the vectors is what the model works with: each row's with another's."""
    model = adapted(kind)
    own, recorded = model(batch()).logits, {}
    with intercept(lambda made: recorded.__setitem__(made.depth, made.values)):
        model(batch())
    with intercept(lambda made: recorded[made.depth]):
        assert torch.equal(model(batch()).logits, own)
    with intercept(lambda made: recorded[made.depth].roll(1, 0)):
        other = model(batch()).logits
    assert ((other - own).abs().amax(dim=(1, 2)) > 1e-4).all()


def test_mixed_batch():
    """Rows with adapters of one signature are generated together and seen together; rows without are not seen."""
    model = adapted()
    model.add_adapter(
        "other", IAPTConfig(task_type="CAUSAL_LM", bottleneck_dim=8, activation="rational", init_weights=False)
    )
    seen = []
    with intercept(seen.append):
        model(batch(), adapter_names=["other", "__base__", "default"])
    assert [len(made.values) for made in seen] == [2, 2, 2] and len(seen[0].generators) == 2


def test_other_threads_are_not_seen():
    model, seen, inside, done = adapted(), [], threading.Event(), threading.Event()

    def other_thread():
        inside.wait(20)
        model(batch(1))
        done.set()

    thread = threading.Thread(target=other_thread)
    thread.start()
    with intercept(seen.append):
        inside.set()
        assert done.wait(20) and not seen
        model(batch())
        assert len(seen) == 3
    thread.join()
