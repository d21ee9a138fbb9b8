# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""TRL's `dpo.py`, `kto.py`, `grpo.py`, `rloo.py` and `reward_modeling.py`."""

from __future__ import annotations

from pathlib import Path

import trl
from common import LONGEST, ROWS, TRAINING, Job, hub, of_trainer, prompts
from datasets import Dataset
from peft import PeftConfig


PROMPTS = [ROWS[0]["prompt"], ROWS[5]["prompt"]]


def dpo(config: PeftConfig, folder: Path) -> Job:
    trainer = trl.DPOTrainer(
        model=hub("llama"),
        args=trl.DPOConfig(output_dir=str(folder), bf16=False, **TRAINING),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "chosen": row["good"], "rejected": row["bad"]} for row in ROWS]
        ),
        peft_config=config,
    )
    return of_trainer(trainer, prompts(*PROMPTS), LONGEST)


def kto(config: PeftConfig, folder: Path) -> Job:
    trainer = trl.KTOTrainer(
        model=hub("llama"),
        args=trl.KTOConfig(output_dir=str(folder), bf16=False, **TRAINING),
        train_dataset=Dataset.from_list(
            [
                {"prompt": row["prompt"], "completion": row[name], "label": name == "good"}
                for row in ROWS
                for name in ("good", "bad")
            ]
        ),
        peft_config=config,
    )
    return of_trainer(trainer, prompts(*PROMPTS), LONGEST)


def odd_words(completions: list[str], **kwargs) -> list[float]:
    """A reward that differs between completions of one prompt."""
    return [sum(int(word[1:]) % 2 for word in text.split() if word[1:].isdigit()) / 4 for text in completions]


def grpo(config: PeftConfig, folder: Path) -> Job:
    trainer = trl.GRPOTrainer(
        model=hub("llama"),
        reward_funcs=odd_words,
        args=trl.GRPOConfig(
            output_dir=str(folder), bf16=False, num_generations=4, max_completion_length=6, beta=0.1, **TRAINING
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        peft_config=config,
    )
    return of_trainer(trainer, prompts(*PROMPTS), LONGEST)


def rloo(config: PeftConfig, folder: Path) -> Job:
    trainer = trl.RLOOTrainer(
        model=hub("llama"),
        reward_funcs=odd_words,
        args=trl.RLOOConfig(
            output_dir=str(folder), bf16=False, num_generations=4, max_completion_length=6, **TRAINING
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        peft_config=config,
    )
    return of_trainer(trainer, prompts(*PROMPTS), LONGEST)


def reward(config: PeftConfig, folder: Path) -> Job:
    trainer = trl.RewardTrainer(
        model=hub("llama"),
        args=trl.RewardConfig(output_dir=str(folder), bf16=False, **TRAINING),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "chosen": row["good"], "rejected": row["bad"]} for row in ROWS]
        ),
        peft_config=config,
    )
    return of_trainer(trainer, prompts(*PROMPTS))
