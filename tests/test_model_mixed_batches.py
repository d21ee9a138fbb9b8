# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Batches whose rows have adapters of their own (`adapter_names`): each row as it is alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from prompted_model import GREEDY, INPUTS, LABELS, config, logits, prompted
from tiny import assert_same, batch, causal_lm, perturb


MIX = batch(9, 6, 8, 5, 7, 9)
NAMES = ["b", "default", "__base__", "c", "default", "b"]


def of_several(method: str) -> PeftModel:
    model = prompted(method)
    model.add_adapter("b", config(method))
    model.add_adapter("c", config(method, num_virtual_tokens=2))
    perturb(model, seed=1, adapter="b")
    perturb(model, seed=2, adapter="c")
    return model


def alone(model: PeftModel, row: int, call):
    n = int(MIX["attention_mask"][row].sum())
    inputs = {"input_ids": MIX["input_ids"][row : row + 1, -n:]}
    if NAMES[row] == "__base__":
        with model.disable_adapter():
            return call(**inputs)
    model.set_adapter(NAMES[row])
    out = call(**inputs)
    model.set_adapter("default")
    return out


def test_mixed_batch_forward(method: str) -> None:
    model = of_several(method)
    with torch.no_grad():
        mixed = model(**MIX, adapter_names=NAMES, output_hidden_states=True)
        for row in range(6):
            own = alone(model, row, lambda **kw: model(**kw, output_hidden_states=True))
            n = own.logits.shape[1]
            assert_same(mixed.logits[row, -n:], own.logits[0])
            for together, states in zip(mixed.hidden_states, own.hidden_states):
                assert_same(together[row, -n:], states[0])
        same = model(**MIX, adapter_names=["b"] * 6).logits
        model.set_adapter("b")
        real = MIX["attention_mask"].bool()
        assert_same(same[real], model(**MIX).logits[real])
        bare = model(**MIX, adapter_names=["__base__"] * 6).logits
        assert torch.equal(bare, causal_lm()(**MIX).logits)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_mixed_batch_generate(method: str, how: dict) -> None:
    model = of_several(method)
    mixed = model.generate(**MIX, **GREEDY, **how, adapter_names=NAMES)
    copies = how.get("num_return_sequences", 1)
    for row in range(6):
        own = alone(model, row, lambda **kw: model.generate(**kw, **GREEDY, **how))
        assert torch.equal(mixed[row * copies : (row + 1) * copies, 9:], own[:, -6:]), NAMES[row]


def test_mixed_batch_with_instruction_mask(method: str) -> None:
    model = of_several(method)
    mask = MIX["attention_mask"].clone()
    mask[:, -2:] = 0
    mixed = model.generate(**MIX, **GREEDY, instruction_mask=mask, adapter_names=NAMES)
    with torch.no_grad():
        out = model(**MIX, instruction_mask=mask, adapter_names=NAMES).logits
    for row in range(6):
        own = mask[row, MIX["attention_mask"][row].bool()][None]
        text = alone(model, row, lambda **kw: model.generate(**kw, **GREEDY, instruction_mask=own))
        assert torch.equal(mixed[row, 9:], text[0, -6:])
        with torch.no_grad():
            expected = alone(model, row, lambda **kw: model(**kw, instruction_mask=own).logits[0])
        assert_same(out[row, -len(expected) :], expected)


def test_mixed_batch_with_templates_of_their_own(kind: str) -> None:
    model = prompted(kind, response_template=[90])
    model.add_adapter("b", config(kind, response_template=[91, 92]))
    perturb(model, seed=1, adapter="b")
    ids = torch.tensor([[5, 6, 90, 8, 9, 10], [5, 6, 7, 91, 92, 10]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        by_template = model(ids, adapter_names=["default", "b"]).logits
        assert_same(by_template, model(ids, adapter_names=["default", "b"], instruction_mask=mask).logits)
        with pytest.raises(ValueError, match=r"\[91, 92\] does not occur"):
            model(ids, adapter_names=["b", "b"])


def test_mixed_batch_of_different_sizes(kind: str) -> None:
    """Bottlenecks and layers of their own: adapters that cannot be stacked."""
    model = of_several(kind)
    fields = {n: v for n, v in (("bottleneck_dim", 4), ("num_virtual_tokens", 3)) if hasattr(config(kind), n)}
    model.add_adapter("small", config(kind, **fields))
    perturb(model, seed=5, adapter="small")
    names = ["small", "default", "b", "small", "__base__", "c"]
    with torch.no_grad():
        mixed = model(**MIX, adapter_names=names).logits
        for row in (0, 3):
            n = int(MIX["attention_mask"][row].sum())
            model.set_adapter("small")
            assert_same(mixed[row, -n:], model(MIX["input_ids"][row : row + 1, -n:]).logits[0])


def test_bad_adapter_names(kind: str) -> None:
    model = of_several(kind)
    expected = logits(model)
    with pytest.raises(ValueError, match="non-existing adapter.*: nobody, someone"):
        logits(model, adapter_names=["someone", "nobody"])
    with pytest.raises(ValueError, match="each of the 2 rows, got 3|rows, got 3|length of `adapter_names`"):
        logits(model, adapter_names=["b", "b", "c"])
    with pytest.raises(TypeError, match="expected a list"):
        logits(model, adapter_names="b")
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**INPUTS, labels=LABELS, adapter_names=["b", "c"])
    assert torch.equal(logits(model.eval()), expected)
