# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""PEFT's examples that use the `Trainer`: token classification and question answering."""

from __future__ import annotations

from pathlib import Path

import transformers as tf
from common import ROWS, TRAINING, Job, load, of_trainer, prompts
from peft import PeftConfig, get_peft_model
from tiny import tokenizer


def token_classification(config: PeftConfig, folder: Path) -> Job:
    model = get_peft_model(load(tf.AutoModelForTokenClassification, "bert", num_labels=3), config)
    rows = [tokenizer()(row["prompt"], return_token_type_ids=False) for row in ROWS]
    trainer = tf.Trainer(
        model=model,
        args=tf.TrainingArguments(output_dir=str(folder), **TRAINING),
        train_dataset=[{**row, "labels": [token % 3 for token in row["input_ids"]]} for row in rows],
        data_collator=tf.DataCollatorForTokenClassification(tokenizer()),
    )
    return of_trainer(trainer, prompts(ROWS[0]["prompt"], ROWS[5]["prompt"]))


def question_answering(config: PeftConfig, folder: Path) -> Job:
    """Question and context in one row, apart by their token types; the answer is a span of the context."""
    model = get_peft_model(load(tf.AutoModelForQuestionAnswering, "bert"), config)
    rows = []
    for i, row in enumerate(ROWS):
        made = tokenizer()(row["prompt"], row["good"], return_token_type_ids=False)
        length, question = len(made["input_ids"]), len(row["prompt"].split())
        made["token_type_ids"] = [0] * question + [1] * (length - question)
        rows.append({**made, "start_positions": question, "end_positions": question + i % 2})
    trainer = tf.Trainer(
        model=model,
        args=tf.TrainingArguments(output_dir=str(folder), **TRAINING),
        train_dataset=rows,
        data_collator=tf.DataCollatorWithPadding(tokenizer()),
    )
    return of_trainer(trainer, prompts(ROWS[0]["prompt"], ROWS[5]["prompt"]))
