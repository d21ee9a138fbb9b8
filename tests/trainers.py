# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the tests of trainers share: tiny trainers of transformers and TRL, their data, losses by hand."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import PeftModel
from tiny import VOCAB, adapted, causal_lm, tokenizer
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from peft_instance_prompt import IAPTConfig


datasets.disable_progress_bars()
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}
TRL = {"bf16": False, "gradient_checkpointing": False, "max_length": 32}

COMPLETION = [{"prompt": f"w{5 + i} w{6 + i} w{7 + i}", "completion": f" w{8 + i} w{9 + i}"} for i in range(8)]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"w{5 + i} w{6 + i}"}],
        "completion": [{"role": "assistant", "content": f"w{8 + i} w{9 + i}"}],
    }
    for i in range(8)
]


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    gc.freeze()  # each run collects garbage, which takes longer than its training as long as all libraries are looked at
    yield
    gc.unfreeze()


def rows(num: int = 12, prompt: int = 3, response: int = 4) -> datasets.Dataset:
    """Instruction and response as token ids, of several lengths."""
    made = []
    for i in range(num):
        ids = [4 + (7 * i + 5 * j) % (VOCAB - 8) for j in range(prompt + i % 3 + response + i % 2)]
        made.append({"input_ids": ids, "labels": [-100] * (prompt + i % 3) + ids[prompt + i % 3 :]})
    return datasets.Dataset.from_list(made)


def collate(data: Any) -> dict[str, torch.Tensor]:
    return tf.DataCollatorForSeq2Seq(tokenizer())([dict(row) for row in data])


def per_token_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each next token (B, S - 1), 0 where none is asked for, and where one is: by rule 1, without `labels`."""
    labels = batch["labels"]
    answered = (labels != -100).cumsum(dim=1) > 0
    scope = (batch["attention_mask"] == 1) & ~answered
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], instruction_mask=scope).logits
    loss = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return loss, labels[:, 1:] != -100


@torch.no_grad()
def loss_by_hand(model: PeftModel, batch: dict[str, torch.Tensor]) -> float:
    loss, asked = per_token_loss(model.eval(), batch)
    return float(loss.sum() / asked.sum())


def losses(trainer: tf.Trainer, name: str = "loss") -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if name in before and not value.equal(before[name])}


def causal_trainer(path: Path, kind: str = "iapt", model: PeftModel | None = None, **changes: Any) -> tf.Trainer:
    extra = {name: changes.pop(name) for name in ("compute_metrics", "data_collator") if name in changes}
    extra.setdefault("data_collator", collate)
    data = changes.pop("data", None) or rows()
    return tf.Trainer(
        model=adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")) if model is None else model,
        args=tf.TrainingArguments(output_dir=str(path), **{**COMMON, **changes}),
        train_dataset=data,
        eval_dataset=data,
        **extra,
    )


def sft(path: Path, data: list[dict], model: PeftModel | None = None, **changes: Any) -> SFTTrainer:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")) if model is None else model
    data, extra = datasets.Dataset.from_list(data), {}
    if isinstance(changes.get("peft_config"), IAPTConfig):
        extra["peft_config"] = changes.pop("peft_config")
    args = SFTConfig(output_dir=str(path), **{**COMMON, **TRL, **changes})
    return SFTTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), **extra
    )


def sft_batch(data: list[dict]) -> dict[str, torch.Tensor]:
    """What SFT makes of the data, tokenized by hand: the completion and its end token are learned."""
    made = []
    for row in data:
        if isinstance(row["prompt"], str):
            prompt, rest = row["prompt"], row["completion"] + " </s>"
        else:
            prompt, rest = f"w0 {row['prompt'][0]['content']} </s> w1", f"{row['completion'][0]['content']} </s>"
        first, second = (tokenizer()(text, add_special_tokens=False)["input_ids"] for text in (prompt, rest))
        made.append({"input_ids": first + second, "labels": [-100] * len(first) + second})
    return collate(made)
