# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""TRL's SFTTrainer on prompts with completions and on plain text: a few real steps, against losses computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods import METHODS
from peft import PeftModel
from tiny import VOCAB, adapted, assert_same, causal_lm, tokenizer
from torch.nn.functional import cross_entropy
from trainers import (
    CHAT,
    COMPLETION,
    changed,
    little_garbage,  # noqa: F401, around all tests of a file
    loss_by_hand,
    losses,
    per_token_loss,
    sft,
    sft_batch,
    trainable,
)


@pytest.mark.parametrize("data", [COMPLETION, CHAT], ids=["prompt_completion", "conversational"])
def test_sft(kind: str, data: list[dict], tmp_path: Path, loss_type: str = "nll") -> None:
    """`nll` is the fused loss that calls the backbone itself and makes no logits."""
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
    trainer = sft(tmp_path, data, model, loss_type=loss_type)
    before = trainable(model)
    trainer.train()
    assert changed(before, model) == set(before)
    with torch.no_grad():
        loss, asked = per_token_loss(model.eval(), sft_batch(data))
        loss = loss * (-loss).exp() if loss_type == "dft" else loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss.sum() / asked.sum()), rel=1e-5)


def test_sft_with_another_loss(tmp_path: Path) -> None:
    test_sft("iapt", COMPLETION, tmp_path, "dft")


def test_sft_makes_the_adapter_itself(tmp_path: Path) -> None:
    base = causal_lm()
    trainer = sft(tmp_path, COMPLETION, base, peft_config=METHODS["iapt"](task_type="CAUSAL_LM"))
    assert isinstance(trainer.model, PeftModel)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(causal_lm(), tmp_path / "adapter")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_by_hand(again, sft_batch(COMPLETION)), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] < start


def test_sft_of_assistant_turns(tmp_path: Path) -> None:
    data = [{"messages": row["prompt"] + row["completion"]} for row in CHAT]
    trainer = sft(tmp_path, data, assistant_only_loss=True)
    trainer.train()
    batch = sft_batch(CHAT)
    # The template marks what lies between {% generation %} and {% endgeneration %}: the words and the end token.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_by_hand(trainer.model, batch), rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_sft_with_gradient_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        how = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}} if on else {}
        trainer = sft(tmp_path, COMPLETION, gradient_checkpointing=on, **how)
        trainer.train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()) == on
        runs.append((losses(trainer), trainable(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    for name, value in runs[0][1].items():
        assert_same(runs[1][1][name], value, 1e-4)


TEXT = [{"text": " ".join(f"w{5 + 3 * i + j}" for j in range(6 + i))} for i in range(8)]


@pytest.mark.parametrize("changes", [{}, {"packing": True}], ids=["padded", "packed"])
def test_sft_of_plain_text(changes: dict, tmp_path: Path) -> None:
    """The first three tokens are the instruction, and no prompt and no logit at or before a token depends on later ones."""
    config = METHODS["iapt"](task_type="CAUSAL_LM", instruction_length=3, prompt_position="end")
    model = adapted(causal_lm(), config)
    trainer = sft(tmp_path, TEXT, model, **changes)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in TEXT:
            ids = torch.tensor([tokenizer()(row["text"] + " </s>", add_special_tokens=False)["input_ids"]])
            logits = model(ids, instruction_mask=torch.arange(ids.shape[1])[None] < 3).logits[:, :-1]
            total += float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids.shape[1] - 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    batch["use_cache"] = False
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        for column in range(1, batch["input_ids"].shape[1]):
            other = {**batch, "input_ids": batch["input_ids"].clone()}
            other["input_ids"][:, column:] = (other["input_ids"][:, column:] + 7) % VOCAB
            found = model(**other).logits
            assert_same(found[:, :column], expected[:, :column])
            assert (found[:, column:] - expected[:, column:]).abs().max() > 1e-3


def test_sft_refuses_plain_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^All tokens of row.* are scored.*in plain text, `instruction_length`"):
        sft(tmp_path, [{"text": row["prompt"] + row["completion"]} for row in COMPLETION]).train()


def test_sft_of_plain_text_with_a_template(tmp_path: Path) -> None:
    """All tokens are learned, and the prompt is generated from what stands up to the template."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM", response_template=[4]))  # w0
    trainer = sft(tmp_path, [{"text": f"w{5 + i} w{6 + i} w0 w{8 + i} w{9 + i}"} for i in range(8)], model)
    trainer.train()
    ids = torch.tensor([[9 + i, 10 + i, 4, 12 + i, 13 + i, 2] for i in range(8)])
    with torch.no_grad():
        logits = model.eval()(ids, instruction_mask=torch.arange(6).expand(8, 6) < 3).logits[:, :-1]
    expected = float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
