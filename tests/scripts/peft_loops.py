# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""PEFT's examples that train in a loop of their own: causal and conditional generation, classification, several adapters."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from common import LONGEST, ROWS, Job, distance, load, must, outputs, prompts, trainable
from peft import PeftConfig, PeftModel, get_peft_model
from tiny import tokenizer
from torch.utils.data import DataLoader


STEPS, LEARNING_RATE = 4, 1e-2
PROMPTS = [ROWS[0]["prompt"], ROWS[5]["prompt"]]


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def loop(model: torch.nn.Module, rows: list[dict], collate: Callable) -> list[float]:
    """The loop of PEFT's notebooks."""
    loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = tf.get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=2 * STEPS)
    model.train()
    losses = []
    while len(losses) < STEPS:
        for batch in loader:
            loss = model(**batch).loss
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return losses


def job(model: PeftModel, rows: list[dict], collate: Callable, instruction: int | None = None) -> Job:
    return Job(
        model=model,
        train=lambda: loop(model, rows, collate),
        save=lambda folder: model.save_pretrained(folder),
        inputs=prompts(*PROMPTS),
        instruction=instruction,
    )


def answered(name: str = "good") -> list[dict]:
    """Rows of a causal model: the prompt is not learned."""
    rows = []
    for row in ROWS:
        prompt, answer = ids(row["prompt"]), ids(row[name] + " </s>")
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def causal(config: PeftConfig, folder: Path) -> Job:
    model = get_peft_model(load(tf.AutoModelForCausalLM, "llama"), config)
    return job(model, answered(), tf.DataCollatorForSeq2Seq(tokenizer()), LONGEST)


def seq2seq(config: PeftConfig, folder: Path) -> Job:
    model = get_peft_model(load(tf.AutoModelForSeq2SeqLM, "t5"), config)
    rows = [{"input_ids": ids(row["prompt"]), "labels": ids(row["good"] + " </s>")} for row in ROWS]
    return job(model, rows, tf.DataCollatorForSeq2Seq(tokenizer(), model=model), LONGEST)


def classification(config: PeftConfig, folder: Path) -> Job:
    model = get_peft_model(load(tf.AutoModelForSequenceClassification, "bert", num_labels=3), config)
    rows = [{"input_ids": ids(row["prompt"]), "labels": i % 3} for i, row in enumerate(ROWS)]
    return job(model, rows, tf.DataCollatorWithPadding(tokenizer()))


def load_both(folder: str) -> PeftModel:
    base = load(tf.AutoModelForCausalLM, "llama")
    model = PeftModel.from_pretrained(base, f"{folder}/first", adapter_name="first")
    model.load_adapter(f"{folder}/second", adapter_name="second")
    return model


def under_each(model: PeftModel) -> torch.Tensor:
    """The states of three rows under the first adapter, the second, and none: row for row, and the same in one batch."""
    inputs = prompts(*PROMPTS, PROMPTS[0])
    alone = []
    for name in ("second", "first"):
        model.set_adapter(name)
        alone.insert(0, outputs(model, inputs)[0])  # (3, S, d)
    with model.disable_adapter():
        alone.append(outputs(model, inputs)[0])
    must(distance(alone[0][0], alone[1][0]) > 1e-3, "both adapters give the same")
    names = ["first", "second", "__base__"]
    with torch.no_grad():
        mixed = model.eval()(**inputs, output_hidden_states=True, adapter_names=names).hidden_states[-1]
    seen = inputs["attention_mask"].bool()  # (3, S)
    states = torch.stack([each[row] for row, each in enumerate(alone)])[seen]  # (tokens, d)
    must(distance(mixed[seen], states) < 1e-5, "a row of a mixed batch differs from the row alone")
    return states


def several_adapters(config: PeftConfig, folder: Path) -> Job:
    """Two adapters are trained on one base model, saved, and loaded again; each row of a batch takes its own."""
    model = get_peft_model(load(tf.AutoModelForCausalLM, "llama"), config, adapter_name="first")
    model.add_adapter("second", config)
    trained = set()
    for name in ("second", "first"):
        model.set_adapter(name)
        trained |= trainable(model)

    def train() -> list[float]:
        losses = []
        for name, answers in (("second", "bad"), ("first", "good")):
            model.set_adapter(name)
            losses += loop(model, answered(answers), tf.DataCollatorForSeq2Seq(tokenizer()))
        return losses

    def save(to: Path) -> None:
        with tempfile.TemporaryDirectory() as both:
            model.save_pretrained(both)  # a folder in it for each adapter
            again = load_both(both)
            must(
                distance(under_each(again), under_each(model)) < 1e-5,
                "adapters loaded side by side give other outputs",
            )
            again.delete_adapter("second")
            again.save_pretrained(both)
            shutil.copytree(f"{both}/first", to, dirs_exist_ok=True)

    return Job(model, train, save, prompts(*PROMPTS), LONGEST, trained)
