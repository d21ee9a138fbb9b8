# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The checks of features that train: gradient checkpointing, the Trainer, TRL's SFTTrainer."""

from __future__ import annotations

import contextlib
import io
import tempfile

import torch
import transformers as tf
from conformance_models import close, must, prompted
from peft import PeftModel
from tiny import batch, tokenizer


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    inputs = batch(9, 6)
    labels = inputs["input_ids"].where(torch.arange(9) > 5, -100)
    model.zero_grad()
    torch.manual_seed(3)
    model.train()(**inputs, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def check_checkpointing(method: str, use_reentrant: bool) -> None:
    model = prompted(method)
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    actual = gradients(model)
    must(bool(expected) and actual.keys() == expected.keys(), "gradients are missing")
    must(all(close(actual[name], expected[name], 2e-5) for name in expected), "the gradients differ")


TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
TRAINING.update(use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False)


def check_trained(model: PeftModel, trainer: tf.Trainer) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    must(bool(moved) and moved <= wanted, "training moves weights of the base model, or none")


def check_trainer(method: str) -> None:
    model = prompted(method)
    rows = [
        {"input_ids": list(range(4 + i, 13 + i)), "labels": [-100] * 5 + list(range(9 + i, 13 + i))} for i in range(8)
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = tf.TrainingArguments(output_dir=folder, **TRAINING)
        check_trained(model, tf.Trainer(model=model, args=args, train_dataset=rows))


def check_sft(method: str, **changes) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    model = prompted(method)
    rows = [{"prompt": f"w{5 + i} w{6 + i} w{7 + i}", "completion": f" w{8 + i} w{9 + i}"} for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, gradient_checkpointing=False, **{"max_length": 32, **TRAINING, **changes})
        data = datasets.Dataset.from_list(rows)
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())
        check_trained(model, trainer)
