# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""TRL's `sft.py`: the trainer loads the model and makes the adapter from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import LONGEST, ROWS, TRAINING, Job, hub, of_trainer, prompts, turn
from datasets import Dataset
from peft import PeftConfig
from trl import SFTConfig, SFTTrainer


COMPLETIONS = [{"prompt": row["prompt"], "completion": row["good"]} for row in ROWS]
MESSAGES = [{"messages": [turn("user", row["prompt"]), turn("assistant", row["good"])]} for row in ROWS]
TEXTS = [{"text": row["prompt"] + row["good"] + row["bad"]} for row in ROWS]
TEXT_LENGTH = 2  # of an instruction in plain text, in tokens


def trainer(config: PeftConfig, folder: Path, rows: list[dict], **changes: Any) -> SFTTrainer:
    return SFTTrainer(
        model=hub("llama"),
        args=SFTConfig(output_dir=str(folder), bf16=False, **{**TRAINING, **changes}),
        train_dataset=Dataset.from_list(rows),
        peft_config=config,
    )


def prompt_completion(config: PeftConfig, folder: Path, **changes: Any) -> Job:
    return of_trainer(trainer(config, folder, COMPLETIONS, **changes), prompts(*PROMPTS), LONGEST)


def messages(config: PeftConfig, folder: Path, **changes: Any) -> Job:
    """Tokens of all turns are learned, unless `assistant_only_loss` is set."""
    template = 3  # tokens that the chat template of tiny.py writes around a question: w0 ... </s> w1
    asked = prompts(*(f"w0 {text} </s> w1" for text in PROMPTS))
    return of_trainer(trainer(config, folder, MESSAGES, **changes), asked, LONGEST + template)


def text(config: PeftConfig, folder: Path) -> Job:
    return of_trainer(trainer(config, folder, TEXTS), prompts(*PROMPTS), TEXT_LENGTH)


PROMPTS = [ROWS[0]["prompt"], ROWS[5]["prompt"]]
