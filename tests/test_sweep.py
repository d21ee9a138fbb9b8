# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The table of the sweep is what running its cells gives, has no wrong cell, and would have one if the engine were wrong."""

from __future__ import annotations

import json
import warnings

import pytest
import sweep
import sweep_table
import torch
import transformers as tf
from peft import PeftModel
from sweep_models import classes
from sweep_table import BARE, REFUSED, RIGHT, TITLES, WRONG, worst
from tiny import perturb

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.engine import forward, layer


TABLE = json.loads(sweep.TABLE.read_text())
SAME = pytest.mark.skipif(
    tf.__version__ != TABLE["versions"]["transformers"], reason="the table is of another release of transformers"
)
# Decoders, encoders, pairs, vision-language and speech models; rotary, learned and relative positions, ALiBi and none; experts,
# states beside attention, sliding windows, layers that run several times; and each kind of refusal.
AGAIN = {
    "albert": "MaskedLM",
    "bart": "CausalLM",
    "bert": "CausalLM",
    "bigbird_pegasus": "CausalLM",
    "bloom": "CausalLM",
    "canine": "SequenceClassification",
    "deberta-v2": "SequenceClassification",
    "deepseek_v3": "CausalLM",
    "deepseek_v4": "CausalLM",
    "falcon_h1": "CausalLM",
    "gemma3": "ImageTextToText",
    "gemma3n_text": "CausalLM",
    "gemma4": "CausalLM",
    "gpt2": "SequenceClassification",
    "gpt_oss": "CausalLM",
    "hrm_text": "CausalLM",
    "lfm2": "CausalLM",
    "llama": "CausalLM",
    "mamba": "CausalLM",
    "mixtral": "CausalLM",
    "modernbert": "MaskedLM",
    "mpt": "CausalLM",
    "opt": "CausalLM",
    "qwen2_vl": "ImageTextToText",
    "qwen3_next": "SequenceClassification",
    "recurrent_gemma": "CausalLM",
    "t5": "Seq2SeqLM",
    "voxtral": "SpeechSeq2Seq",
    "whisper": "CausalLM",
    "xlm": "CausalLM",
}


@SAME
def test_table_has_every_class_and_no_wrong_cell() -> None:
    there = {(name, auto) for auto, rows in TABLE["classes"].items() for name in rows}
    missing = {tuple(text.split(", ")) for types in TABLE["not_built"].values() for text in types}
    assert there | missing == {(name, auto) for name, autos in classes().items() for auto in autos}
    assert not there & missing
    for auto, rows in TABLE["classes"].items():
        for name, row in rows.items():
            for method in TITLES:
                what, why = row[method]
                assert what in (RIGHT, BARE, REFUSED) or method == "lora", (auto, name, method, why)


def test_page_is_made_from_the_table() -> None:
    assert sweep.PAGE.read_text() == sweep_table.page(TABLE)


@pytest.mark.parametrize(("model_type", "auto"), AGAIN.items())
def test_cells(model_type: str, auto: str) -> None:
    if auto not in classes().get(model_type, {}):
        pytest.skip("this release of transformers has no such class")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = sweep.run_class(model_type, auto)
        except sweep.NotBuilt as error:
            pytest.skip(f"another release of transformers: {error}")
    cells = {method: worst(found[method]) for method in TITLES}
    assert not [cell for method, cell in cells.items() if cell.what == WRONG and method != "lora"]
    if tf.__version__ == TABLE["versions"]["transformers"]:
        assert {method: list(cell) for method, cell in cells.items()} == {
            method: TABLE["classes"][auto][model_type][method] for method in TITLES
        }


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check fails where the engine is wrong in what it is there for."""
    made = sweep.subject("llama", "CausalLM")

    def failing() -> set[str]:
        found = sweep.checked(made, made.with_method("iapt"))
        return {name for name, (what, _) in found.items() if what == WRONG}

    assert not failing()
    take, resume, write, load = forward.take, layer.resume, forward.write, PeftModel.from_pretrained
    with monkeypatch.context() as patch:  # each token gets the state of the next
        patch.setattr(forward, "take", lambda states, *args, **kw: take(states.roll(-1, dims=1), *args, **kw))
        assert {"rows", "leak", "prompt"} <= failing()
    with monkeypatch.context() as patch:  # a step of generation stands in the wrong place
        patch.setattr(
            layer,
            "resume",
            lambda *args, **kw: {**(call := resume(*args, **kw)), "position_ids": call["position_ids"] + 3},
        )
        assert failing() == {"cache"}
    with monkeypatch.context() as patch:  # the prompt is cut off from what it was made of
        patch.setattr(
            forward, "write", lambda states, rows, values, *args: write(states, rows, values.detach(), *args)
        )
        assert failing() == {"gradient"}
    with monkeypatch.context() as patch:  # what is loaded is not what was saved
        patch.setattr(PeftModel, "from_pretrained", lambda *args: perturb(load(*args), 5, "default"))
        assert failing() == {"saved"}


def test_an_error_that_is_not_ours_is_no_refusal() -> None:
    def foreign() -> None:
        torch.zeros(2).reshape(3)

    def ours() -> None:
        IAPTConfig(num_virtual_tokens=0)

    assert sweep.outcome(foreign)[0] == WRONG and sweep.outcome(ours)[0] == REFUSED
