# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""TRL's DPOTrainer: a few real steps, against losses computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from methods import METHODS
from tiny import adapted, causal_lm, perturb, tokenizer
from torch.nn.functional import logsigmoid
from trainers import (
    COMMON,
    TRL,
    changed,
    little_garbage,  # noqa: F401, around all tests of a file
    per_token_loss,
    sft_batch,
    trainable,
)
from trl import DPOConfig, DPOTrainer


PREFERENCE = [
    {"prompt": f"w{5 + i} w{6 + i} w{7 + i} <unk>", "chosen": f" w{8 + i} w{9 + i}", "rejected": f" w{1 + i}"}
    for i in range(8)
]


def dpo(path: Path, model: Any, peft_config: Any = None, **changes: Any) -> DPOTrainer:
    data = datasets.Dataset.from_list(PREFERENCE)
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(path), beta=1.0, **{**COMMON, **TRL, **changes}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


@torch.no_grad()
def margin(model: Any) -> torch.Tensor:
    """By how much the log-probability of the chosen answer is above that of the rejected one, (B,)."""
    both = [sft_batch([{**row, "completion": row[name]} for row in PREFERENCE]) for name in ("rejected", "chosen")]
    rejected, chosen = (per_token_loss(model.eval(), batch)[0].sum(dim=1) for batch in both)
    return rejected - chosen


def check_dpo(trainer: DPOTrainer, reference: torch.Tensor) -> None:
    before = trainable(trainer.model)
    trainer.train()
    assert changed(before, trainer.model) == set(before)
    expected = float(-logsigmoid(margin(trainer.model) - reference).mean())
    assert abs(expected - 0.6931) > 0.002, "a model that is its own reference proves nothing"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_dpo(kind: str, tmp_path: Path) -> None:
    """Both answers get their prompts from the instruction alone; the reference is a copy that TRL makes of the adapter."""
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
    trainer = dpo(tmp_path, model)
    assert set(model.peft_config) == {"default", "ref"}
    check_dpo(trainer, margin(adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))))


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_against_the_base_model(precompute: bool, tmp_path: Path) -> None:
    """With a template, which serves these answers as the labels do."""
    config = METHODS["iapt"](task_type="CAUSAL_LM", response_template=[3])  # <unk>
    trainer = dpo(tmp_path, causal_lm(), config, precompute_ref_log_probs=precompute)
    perturb(trainer.model)
    with trainer.model.disable_adapter():
        reference = margin(trainer.model)
    check_dpo(trainer, reference)
