# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""TRL's SFTTrainer on packed rows, against the rows with padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods import METHODS
from tiny import adapted, assert_same, causal_lm, tokenizer
from trainers import (
    COMPLETION,
    little_garbage,  # noqa: F401, around all tests of a file
    loss_by_hand,
    losses,
    per_token_loss,
    sft,
    sft_batch,
    trainable,
)


PACKED = {
    "packing": {"packing": True, "packing_strategy": "bfd"},
    "packing_split": {"packing": True, "packing_strategy": "bfd_split"},
    "padding_free": {"padding_free": True, "max_length": None},
    "padding_free_multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("changes", PACKED.values(), ids=PACKED)
def test_sft_of_packed_rows(kind: str, changes: dict, tmp_path: Path) -> None:
    """The loss and the gradients of packed rows are those of the rows with padding."""
    runs = []
    for name, how in (("plain", {}), ("packed", changes)):
        model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
        if kind == "dynamic_prompt":  # without random choices
            model.get_base_model().model.dynamic_prompt.generators["default"].sampling.p = 0.0
        trainer = sft(tmp_path / name, COMPLETION, model, per_device_train_batch_size=8, **how)
        model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["input_ids"].shape[0] == 1) == (name == "packed")
        trainer.compute_loss(model, batch).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        runs.append((trainer.evaluate()["eval_loss"], gradients))
        trainer.train()
        assert len(losses(trainer)) == 3
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    assert runs[0][0] == pytest.approx(
        loss_by_hand(adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")), sft_batch(COMPLETION)), rel=1e-5
    )
    assert runs[0][1].keys() == runs[1][1].keys() and runs[0][1]
    for name, gradient in runs[0][1].items():
        assert_same(runs[1][1][name], gradient, 1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_sft_of_packed_rows_with_gradient_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    how = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    runs = []
    for on in (False, True):
        trainer = sft(tmp_path, COMPLETION, packing=True, gradient_checkpointing=on, **(how if on else {}))
        trainer.train()
        runs.append((losses(trainer), trainable(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    for name, value in runs[0][1].items():
        assert_same(runs[1][1][name], value, 1e-4)


def test_sft_of_texts_that_are_split(tmp_path: Path) -> None:
    """Of a text that `bfd_split` cuts, the second part has no instruction, and its prompt is made from its first token."""
    words = [f"w{10 + i}" for i in range(20)]
    data = [{"prompt": "w1 w2 w3", "completion": " " + " ".join(words)}, *COMPLETION[:3]]
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    trainer = sft(tmp_path, data, model, packing=True, packing_strategy="bfd_split", max_length=16)
    (ids,) = tokenizer()("w1 w2 w3 " + " ".join(words) + " </s>", return_tensors="pt")["input_ids"].split(1)
    parts = [(ids[:, :16], 3), (ids[:, 16:], 1)]
    parts += [(batch["input_ids"], 3) for batch in (sft_batch([row]) for row in COMPLETION[:3])]
    loss, asked = 0.0, 0
    with torch.no_grad():
        for part, instruction in parts:
            labels = part.clone()
            labels[:, :instruction] = -100
            one, which = per_token_loss(
                model, {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": labels}
            )
            loss, asked = loss + float(one.sum()), asked + int(which.sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss / asked, rel=1e-5)
    trainer.train()


@pytest.mark.parametrize("template", [None, [3]])
def test_wrapped_packing_is_refused(template: list[int] | None, tmp_path: Path) -> None:
    """It cuts texts anywhere and does not say where they begin, so a row begins with what is to be predicted."""
    config = METHODS["iapt"](task_type="CAUSAL_LM", response_template=template, missing_template="all")
    model = adapted(causal_lm(), config)
    data = [{**row, "prompt": row["prompt"] + " <unk>"} for row in COMPLETION]
    with pytest.raises(ValueError, match="packing_strategy='wrapped'"):
        sft(tmp_path, data, model, packing=True, packing_strategy="wrapped", max_length=9).train()
