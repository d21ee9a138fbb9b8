# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Where prompts stand if the config leaves that open: behind a first special token, but not behind a first word."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import PeftModel, get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, encoder, pair

from peft_instance_prompt import DynamicPromptConfig, IAPTConfig, IDPGConfig, IPTConfig, LPTConfig


OPEN = {"idpg": lambda **kw: IDPGConfig(phm_n=4, **kw), "dynamic_prompt": lambda **kw: DynamicPromptConfig(**kw)}


def decoder_as_classifier():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**sizes, **heads))


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize(
    ("make", "family", "expected"),
    [
        (pair, "t5", "before"),
        (pair, "mt5", "before"),
        (pair, "bart", "after_first"),
        (encoder, "bert", "after_first"),
        (encoder, "deberta-v2", "after_first"),
        (causal_lm, "llama", "after_first"),
    ],
)
def test_filled_in(name: str, make, family: str, expected: str, tmp_path) -> None:
    config = OPEN[name](num_virtual_tokens=4)
    assert config.prompt_position is None
    model = get_peft_model(make(family), config)
    assert model.peft_config["default"].prompt_position == expected
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(family), tmp_path)
    assert loaded.peft_config["default"].prompt_position == expected


def test_causal_model_without_a_first_token() -> None:
    base = causal_lm(bos_token_id=None)
    assert get_peft_model(base, IDPGConfig(phm_n=4)).peft_config["default"].prompt_position == "before"


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize(("make", "family", "decided"), [(pair, "t5", "before"), (encoder, "bert", "after_first")])
def test_it_is_where_the_slots_stand(name: str, make, family: str, decided: str) -> None:
    inputs = batch(9, 9)
    if make is pair:
        inputs["decoder_input_ids"] = torch.zeros(2, 1, dtype=torch.long)
    outputs = {}
    for position in (None, "before", "after_first"):
        with torch.no_grad():
            outputs[position] = adapted(make(family), OPEN[name](num_virtual_tokens=4, prompt_position=position))(
                **inputs
            )[0]
    assert_same(outputs[None], outputs[decided])
    (other,) = {"before", "after_first"} - {decided}
    assert (outputs[None] - outputs[other]).abs().max() > 1e-3


def test_what_a_config_says_stays() -> None:
    assert get_peft_model(pair("t5"), IDPGConfig(phm_n=4, prompt_position="after_first")).peft_config[
        "default"
    ].prompt_position == ("after_first")
    for config in (IPTConfig(table_rank=4), LPTConfig()):
        assert config.prompt_position == "before"


@pytest.mark.parametrize(
    ("make", "fields", "expected"),
    [
        (causal_lm, {}, "end"),
        (causal_lm, {"task_type": "CAUSAL_LM", "instruction_length": 3}, "end"),
        (causal_lm, {"init_weights": "paper"}, "before"),
        (causal_lm, {"init_text": [5, 6]}, "before"),
        (causal_lm, {"prompt_position": "before"}, "before"),
        (lambda: causal_lm().model, {}, "before"),
        (lambda: causal_lm().model, {"instruction_length": 3, "prompt_position": "end"}, "end"),
        (decoder_as_classifier, {"task_type": "SEQ_CLS"}, "before"),
        (encoder, {}, "before"),
        (pair, {}, "before"),
    ],
)
def test_iapt_stands_behind_the_instruction_of_a_causal_lm(make, fields: dict, expected: str, tmp_path) -> None:
    model = get_peft_model(make(), IAPTConfig(**fields))
    assert model.peft_config["default"].prompt_position == expected
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["prompt_position"] == expected


def test_instruction_length_without_the_end() -> None:
    with pytest.raises(ValueError, match="`instruction_length` needs `prompt_position='end'`, got 'before'"):
        IAPTConfig(instruction_length=3, prompt_position="before")
    for make, config in ((encoder, IAPTConfig(instruction_length=3)), (causal_lm, IDPGConfig(instruction_length=3))):
        with pytest.raises(
            ValueError, match="`instruction_length` needs `prompt_position='end'`, got 'before'|after_first"
        ):
            get_peft_model(make(), config)


@torch.no_grad()
@pytest.mark.slots
def test_an_instruction_of_one_token(kind: str) -> None:
    """Behind the first token and at the end are the same place, and the response is predicted at the same slot."""
    if kind == "dynamic_prompt":
        pytest.skip("it has no `prompt_position='end'`; see methods/test_dynamic_prompt.py")
    # What stands in a slot is kept or replaced, and IAPT's default depends on the position.
    form = {"accumulate": True} if kind == "iapt" else {}
    inputs, answers = batch(9, 9), {}
    first = {"instruction_mask": torch.arange(9)[None].repeat(2, 1) < 1}
    for position in ("after_first", "end"):
        model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", prompt_position=position, **form))
        text = model.generate(inputs["input_ids"][:, :1], max_new_tokens=6, do_sample=False)
        answers[position] = (model(**inputs, **first).logits, text)
    assert_same(answers["after_first"][0], answers["end"][0])
    assert torch.equal(answers["after_first"][1], answers["end"][1])
    with model.disable_adapter():
        assert (model(**inputs).logits - answers["end"][0])[:, 0].abs().max() > 1e-3, "the prompt is read at once"
