# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Packed rows: several sequences in a row, each of which must be what it is in a batch of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import PeftModel
from tiny import DECODERS, VOCAB, adapted, assert_same, causal_lm, encoder, pair, perturb
from torch.nn.functional import cross_entropy

from peft_instance_prompt.engine.packing import find_packing


LENGTHS = (7, 4, 9)


def texts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """The ids (1, n) of a sequence of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (1, n), generator=generator) for n in lengths]


def labels_of(ids: torch.Tensor, instruction: int = 2) -> torch.Tensor:
    labels = ids.clone()
    labels[:, :instruction] = -100
    return labels


def packed(rows: list[list[torch.Tensor]], width: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of several sequences (1, n), with pads at position 0 up to the width of the longest, as TRL writes them."""
    width = max(sum(one.shape[1] for one in row) for row in rows) if width is None else width
    batch: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        pads = torch.zeros(1, width - sum(one.shape[1] for one in row), dtype=torch.long)
        batch["input_ids"].append(torch.cat([*row, pads], dim=1))
        batch["labels"].append(torch.cat([*map(labels_of, row), pads - 100], dim=1))
        batch["position_ids"].append(torch.cat([*(torch.arange(one.shape[1])[None] for one in row), pads], dim=1))
    return {name: torch.cat(values) for name, values in batch.items()}


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def total(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed loss of all labels."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def check(model: PeftModel, rows: list[list[torch.Tensor]], **changes: Any) -> torch.Tensor:
    """Logits, states, loss and gradients of packed rows are those of each sequence alone; the logits."""
    batch = {**packed(rows), **changes}
    torch.manual_seed(0)
    out = model(**batch, output_hidden_states=True)
    assert out.logits.shape[:2] == batch["input_ids"].shape and out.hidden_states[1].shape[:2] == out.logits.shape[:2]
    loss = total(out.logits, batch["labels"])
    loss.backward()
    found, whole = gradients(model), 0.0
    for number, row in enumerate(rows):
        column = 0
        for ids in row:
            alone = model(ids, labels=labels_of(ids), output_hidden_states=True)
            own = slice(column, column + ids.shape[1])
            assert_same(out.logits[number : number + 1, own], alone.logits)
            for together, states in zip(out.hidden_states, alone.hidden_states):
                assert_same(together[number : number + 1, own], states)
            one = total(alone.logits, labels_of(ids))
            one.backward()
            whole, column = whole + float(one), own.stop
    assert float(loss) == pytest.approx(whole, rel=1e-5)
    expected = gradients(model)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert_same(found[name], gradient, 1e-5)
    return out.logits.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_are_the_sequences_alone(method: str, attention: str) -> None:
    model = adapted(causal_lm(attn_implementation=attention), METHODS[method](task_type="CAUSAL_LM"))
    a, b, c, d = texts(*LENGTHS, 5)
    found = check(model, [[a, b, c]])
    with model.disable_adapter():
        bare = model(**packed([[a, b, c]]), use_cache=False).logits
    assert (found - bare).abs().max() > 1e-2, "the adapter does nothing"
    check(model, [[a, b], [c, d, a], [b]])
