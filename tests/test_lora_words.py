# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What users of LoRA, prompt tuning and prefix tuning type out of habit, or by a slip: refused by name, with the counterpart."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from folders import change_config
from methods import METHODS
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tiny import causal_lm


WORDS = [
    ("r", 8, r"`r`: .*`num_virtual_tokens`.*`bottleneck_dim`"),
    ("lora_alpha", 16, "`lora_alpha`: .*learning rate"),
    ("lora_dropout", 0.1, "`lora_dropout`: (use `dropout`|.*the method has no dropout)"),
    ("bias", "none", "`bias`: .*`modules_to_save`"),
    ("use_dora", True, "`use_dora`: .*leave it out"),
    ("init_lora_weights", "gaussian", "`init_lora_weights`: use `init_weights`"),
    ("layers_pattern", "h", "`layers_pattern`: .*`target_modules`"),
    ("rank_pattern", {"q_proj": 4}, "`rank_pattern`: .*`layers_to_transform`"),
    ("prompt_tuning_init", "TEXT", "`prompt_tuning_init`: use `init_text`"),
    ("prompt_tuning_init_text", "Say:", "`prompt_tuning_init_text`: use `init_text`"),
    ("prefix_projection", True, "`prefix_projection`: .*always a generator"),
    ("encoder_hidden_size", 64, "`encoder_hidden_size`: use `bottleneck_dim`"),
    ("encoder_dropout", 0.1, "`encoder_dropout`: (use `dropout`|.*the method has no dropout)"),
    ("token_dim", 32, "`token_dim`: .*read off the base model"),
]


@pytest.mark.parametrize(("word", "value", "says"), WORDS, ids=[row[0] for row in WORDS])
@pytest.mark.slots
def test_counterpart(kind: str, word: str, value, says: str) -> None:
    with pytest.raises(TypeError, match=f"^{type(METHODS[kind]()).__name__} does not have these fields. {says}"):
        METHODS[kind](**{word: value})


def test_dropout_is_named_where_there_is_one(kind: str) -> None:
    has = hasattr(METHODS[kind](), "dropout")
    with pytest.raises(TypeError, match="use `dropout`" if has else "has no dropout"):
        METHODS[kind](lora_dropout=0.1)


@pytest.mark.parametrize(
    "foreign", [LoraConfig, PromptTuningConfig, MultitaskPromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig]
)
@pytest.mark.slots
def test_every_word_of_another_methods_config(kind: str, foreign: type) -> None:
    """Each has a counterpart; of many the first are told."""
    own = {field.name for field in fields(METHODS[kind]())}
    words = {field.name: None for field in fields(foreign) if field.name not in own}
    assert len(words) >= 5
    for word in words:
        with pytest.raises(TypeError, match=f"does not have these fields. `{word}`: "):
            METHODS[kind](**{word: None})
    with pytest.raises(TypeError) as caught:
        METHODS[kind](**words)
    told, more = re.findall("`(\\w+)`: ", str(caught.value)), re.search(r"And (\d+) more\.$", str(caught.value))
    assert told == list(words)[: len(told)] and len(told) >= 2
    assert len(told) + int(more[1] if more else 0) == len(words)


@pytest.mark.slots
def test_the_words_of_a_usual_script_are_all_told(kind: str) -> None:
    with pytest.raises(TypeError, match="`r`: .*`lora_alpha`: .*`lora_dropout`: .*`bias`: "):
        METHODS[kind](task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, bias="none")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("num_virtual_token", "num_virtual_tokens"),
        ("num_prompt_tokens", "num_virtual_tokens"),
        ("bottleneck_dimension", "bottleneck_dim"),
        ("target_module", "target_modules"),
        ("response_templates", "response_template"),
    ],
)
@pytest.mark.slots
def test_a_slip_of_the_pen(kind: str, word: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"`{word}`: did you mean `{meant}`\\?"):
        METHODS[kind](**{word: 3})
    with pytest.raises(TypeError, match=f"does not have these fields. `r`: .* `{word}`: did you mean `{meant}`\\?"):
        METHODS[kind](**{word: 3, "r": 8})


@pytest.mark.slots
def test_a_field_of_a_newer_release_in_a_file(kind: str, tmp_path) -> None:
    """PEFT leaves it out with a warning, as it does for its own methods, whether or not it resembles one that is known."""
    METHODS[kind](num_virtual_tokens=3).save_pretrained(tmp_path)
    change_config(tmp_path, num_virtual_token=5, invented_later=1)
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'invented_later', 'num_virtual_token'"):
        assert PeftConfig.from_pretrained(tmp_path).num_virtual_tokens == 3


@pytest.mark.slots
def test_words_in_a_file(kind: str, tmp_path) -> None:
    """PEFT ignores fields that it does not know, with a warning that proposes an upgrade; a word of LoRA's is no new field."""
    METHODS[kind]().save_pretrained(tmp_path)
    change_config(tmp_path, r=8)
    with pytest.raises(TypeError, match=r"`r`: .*`num_virtual_tokens`"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", ".*q_proj"])
def test_linear_layers_as_targets(kind: str, targets) -> None:
    with pytest.raises(
        ValueError,
        match=r"^Leave `target_modules` out: .*none of the stacks that hold prompts here, \['model.layers'\]",
    ):
        get_peft_model(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", target_modules=targets))


def test_what_to_import_stands_in_the_file(kind: str, tmp_path) -> None:
    config = METHODS[kind]()
    config.save_pretrained(tmp_path)
    home = type(config).__module__.partition(".")[0]
    assert f'"import_first": "{home}"' in (tmp_path / "adapter_config.json").read_text()
