# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What a LoRA user types out of habit: each word is refused by name, with its counterpart in this package."""

from __future__ import annotations

from dataclasses import fields

import pytest
from folders import change_config
from methods import METHODS
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny import causal_lm


WORDS = [
    ("r", 8, r"`r`: .*`num_virtual_tokens`.*`bottleneck_dim`"),
    ("lora_alpha", 16, "`lora_alpha`: .*learning rate"),
    ("lora_dropout", 0.1, "`lora_dropout`: (use `dropout`|the method has no dropout)"),
    ("bias", "none", "`bias`: .*`modules_to_save`"),
    ("use_dora", True, "`use_dora`: .*leave it out"),
    ("init_lora_weights", "gaussian", "`init_lora_weights`: use `init_weights`"),
    ("layers_pattern", "h", "`layers_pattern`: .*`target_modules`"),
    ("rank_pattern", {"q_proj": 4}, "`rank_pattern`: .*`layers_to_transform`"),
]


@pytest.mark.parametrize(("word", "value", "says"), WORDS, ids=[row[0] for row in WORDS])
def test_counterpart(kind: str, word: str, value, says: str) -> None:
    with pytest.raises(
        TypeError, match=f"^{type(METHODS[kind]()).__name__} does not have these fields of LoRA's. {says}"
    ):
        METHODS[kind](**{word: value})


def test_dropout_is_named_where_there_is_one(kind: str) -> None:
    has = hasattr(METHODS[kind](), "dropout")
    with pytest.raises(TypeError, match="use `dropout`" if has else "has no dropout"):
        METHODS[kind](lora_dropout=0.1)


def test_every_word_of_a_whole_config_at_once(kind: str) -> None:
    own = {field.name for field in fields(METHODS[kind]())}
    words = {field.name: None for field in fields(LoraConfig) if field.name not in own}
    assert {"r", "lora_alpha", "bias", "use_dora"} <= set(words)
    with pytest.raises(TypeError) as caught:
        METHODS[kind](**words)
    assert [word for word in words if f"`{word}`: " not in str(caught.value)] == []


def test_words_in_a_file(kind: str, tmp_path) -> None:
    """PEFT ignores fields that it does not know, with a warning that proposes an upgrade; a word of LoRA's is no new field."""
    METHODS[kind]().save_pretrained(tmp_path)
    change_config(tmp_path, r=8)
    with pytest.raises(TypeError, match=r"`r`: .*`num_virtual_tokens`"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ".*q_proj"])
def test_linear_layers_as_targets(kind: str, targets) -> None:
    with pytest.raises(ValueError, match="'model.layers': 'model'.*which LoRA targets.*leave `target_modules` out"):
        get_peft_model(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", target_modules=targets))


def test_what_to_import_stands_in_the_file(kind: str, tmp_path) -> None:
    config = METHODS[kind]()
    config.save_pretrained(tmp_path)
    home = type(config).__module__.partition(".")[0]
    assert f'"import_first": "{home}"' in (tmp_path / "adapter_config.json").read_text()
