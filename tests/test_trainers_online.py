# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""TRL's trainers that sample their own answers, GRPO and RLOO: with the adapter, or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers as tf
from methods import METHODS
from peft import LoraConfig
from tiny import adapted, causal_lm, tokenizer
from trainers import (
    COMMON,
    COMPLETION,
    changed,
    little_garbage,  # noqa: F401, around all tests of a file
    trainable,
)
from transformers.trainer import DEFAULT_CALLBACKS
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from peft_instance_prompt.trainers import SamplingGuard


ONLINE = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def online(path: Path, name: str, model: Any, peft_config: Any = None, **changes: Any) -> tf.Trainer:
    trainer, config = ONLINE[name]
    common = {key: value for key, value in COMMON.items() if "batch_size" not in key}
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4, "bf16": False}
    sizes["temperature"] = 3.0  # the answers to one question must differ, or there is nothing to learn
    return trainer(
        model=model,
        args=config(output_dir=str(path), gradient_checkpointing=False, **{**common, **sizes, **changes}),
        reward_funcs=lambda completions, **_: [sum(map(ord, text)) / 1000 for text in completions],
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in COMPLETION]),
        processing_class=tokenizer("left"),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("option", ["use_vllm", "use_transformers_continuous_batching"])
@pytest.mark.parametrize("name", ONLINE)
def test_online_trainers_refuse_samplers_without_the_adapter(name: str, option: str, tmp_path: Path) -> None:
    """When they are made, before vLLM is started, whoever makes the adapter; others' adapters are no business of ours."""
    says = f"cannot be used with `{option}`.*Set `{option}=False`: the trainer then samples with `generate`"
    with pytest.raises(ValueError, match=says):
        online(tmp_path, name, adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")), **{option: True})
    with pytest.raises(ValueError, match=says):
        online(tmp_path, name, causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"), **{option: True})
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(ImportError, match="vLLM") if option == "use_vllm" else contextlib.nullcontext():
        online(tmp_path, name, causal_lm(), lora, **{option: True})
    assert DEFAULT_CALLBACKS.count(SamplingGuard) == 1


def test_online_trainers_sample_with_the_adapter(kind: str, tmp_path: Path) -> None:
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
    trainer = online(tmp_path, "grpo", model, learning_rate=1e-2)
    before = trainable(model)
    trainer.train()
    assert changed(before, model)


def test_weights_that_are_sent_to_vllm(tmp_path: Path) -> None:
    """What TRL calls before it sends weights, for a trainer that was loaded after the adapter: the cure is named there, too."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="cannot be merged.*`use_vllm=False`"):
        model.merge_adapter()
