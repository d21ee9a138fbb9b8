# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What is refused when an adapter is made or loaded: another size, another task, no stack. The model stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import PeftConfig, PeftModel, get_peft_model
from prompted_model import config, logits, prompted, traces
from tiny import causal_lm

from peft_instance_prompt.engine.layer import InstancePromptLayer


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 64}, "`hidden_size` 32, but this one has 64"),
        ({"num_hidden_layers": 2, "layer_types": None}, "`num_layers` 3, but this one has 2"),
    ],
)
def test_adapter_for_another_size(method: str, changes: dict, says: str, tmp_path: Path) -> None:
    prompted(method).save_pretrained(tmp_path)
    base = causal_lm(**changes)
    before, plain = traces(base), logits(base)
    for load in (
        lambda: PeftModel.from_pretrained(base, tmp_path),
        lambda: get_peft_model(base, PeftConfig.from_pretrained(tmp_path)),
        lambda: base.load_adapter(tmp_path, adapter_name="x"),
    ):
        with pytest.raises(ValueError, match=says):
            load()
    assert torch.equal(logits(base), plain)
    hooks, _, _, state = traces(base)
    assert hooks == before[0] and state == before[3]
    assert not any(isinstance(module, InstancePromptLayer) for module in base.modules())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"task_type": "SEQ_CLS"}, "does not fit the base model, which is a causal language model"),
        ({"task_type": "TOKEN_CLS"}, "does not fit"),
        ({"task_type": "QUESTION_ANS"}, "does not fit"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "does not fit"),
        (
            {"target_modules": ["encoder"]},
            r"^Leave `target_modules` out: \['encoder'\] names none .*\['model.layers'\]",
        ),
        ({"target_modules": ["q_proj"]}, "names none"),
        ({"target_modules": ["odel"]}, "names none"),
        ({"target_modules": "layers"}, "names none"),  # a regular expression for the whole name
        ({"exclude_modules": ["model"]}, r"`exclude_modules` \['model'\] leaves none of the stacks"),
        ({"layers_to_transform": [0, 3]}, r"`layers_to_transform` must .*3\]"),
        ({"layers_to_transform": 7}, "`layers_to_transform` must .*7"),
    ],
    ids=str,
)
def test_config_that_does_not_fit(kind: str, fields: dict, says: str) -> None:
    if not all(hasattr(config(kind), name) for name in fields):
        pytest.skip(f"{kind} has no such field")
    base = causal_lm()
    before = traces(base)
    with pytest.raises(ValueError, match=says):
        get_peft_model(base, config(kind, **fields))
    assert traces(base)[0] == before[0] and traces(base)[3] == before[3]


def test_task_for_another_kind_of_model(kind: str) -> None:
    bert = tf.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(ValueError, match="which is an encoder, a classifier or"):
        get_peft_model(tf.BertForSequenceClassification(bert), METHODS[kind](task_type="CAUSAL_LM"))


def test_model_without_a_stack(kind: str) -> None:
    with pytest.raises(
        ValueError, match="No transformer stack .* found in Sequential: none of its modules takes `input_ids`"
    ):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), METHODS[kind]())
