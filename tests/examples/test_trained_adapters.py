# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The trained adapters of examples/adapters: what their folders say, and that they know their tasks, beside each other, too."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import peft_instance_prompt  # noqa: F401, before an adapter is loaded
from smollm2 import load_smollm2


FOLDER = Path(__file__).parents[2] / "examples/adapters"
LABELS = {"sentiment": ["negative", "positive"], "source": ["editorial", "movie", "product", "tweet"]}
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", LABELS)
def test_folder_is_small_and_names_no_machine(name: str) -> None:
    folder = FOLDER / name
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    ]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
    assert {value.dtype for value in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
    config, card = (folder / "adapter_config.json").read_text(), (folder / "README.md").read_text()
    assert json.loads(config)["base_model_name_or_path"] == BASE
    assert f"\nbase_model: {BASE}\n" in card and "\nlicense: apache-2.0\n" in card
    assert not re.search(r"/(root|home|tmp|work)/", config + card)
    assert "More Information Needed" not in card


@pytest.mark.parametrize("name", LABELS)
def test_card_says_that_it_is_better(name: str) -> None:
    """Than the base model whose prompt names the task, and than the commonest word."""
    card = (FOLDER / name / "README.md").read_text()
    after = re.search(r"\*\*accuracy on \d+ held-out texts\*\* \| \*\*(\S+)\*\*", card)[1]
    before, guess = re.findall(r"^\| (?:base model, with|always) .* \| (\S+) \|$", card, flags=re.MULTILINE)
    assert float(after) > max(float(before), float(guess))


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[PeftModel, object]:
    model, tokenizer = load_smollm2()
    model = PeftModel.from_pretrained(model, FOLDER / "sentiment", adapter_name="sentiment")
    model.load_adapter(FOLDER / "source", adapter_name="source")
    return model.eval(), tokenizer


@pytest.mark.slow
@torch.inference_mode()
def test_mixed_batch_is_each_alone(model_and_tokenizer: tuple) -> None:
    model, tokenizer = model_and_tokenizer
    texts = [
        "A tender, funny film.",
        "The battery died after two weeks, and the seller never answered.",
        "omg best day",
    ]
    names = ["sentiment", "source", "__base__"]
    rows = [(text, name) for text in texts for name in names]
    inputs = tokenizer([f"Text: {text}\nAnswer:" for text, _ in rows], padding=True, return_tensors="pt")
    mixed = model(**inputs, adapter_names=[name for _, name in rows]).logits[:, -1]  # (B, V)
    bare, _ = load_smollm2()
    for (text, name), logits in zip(rows, mixed):
        alone = tokenizer(f"Text: {text}\nAnswer:", return_tensors="pt")
        if name == "__base__":
            expected = bare(**alone).logits[0, -1]
        else:
            model.set_adapter(name)
            expected = model(**alone).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)
    assert (mixed[0] - mixed[1]).abs().max() > 1 < (mixed[0] - mixed[2]).abs().max(), "each row has its own adapter"


@pytest.mark.slow
@pytest.mark.parametrize("name", LABELS)
@torch.inference_mode()
def test_knows_its_task(name: str, model_and_tokenizer: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """On held-out texts, by the likeliest of the words: better than the base model on the same prompt."""
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(sys, "path", list(sys.path))  # which the script extends
    make = runpy.run_path(str(FOLDER / "make.py"))
    texts = [row for row in make["load_texts"]()[1] if row[name] is not None][:24]
    firsts = [tokenizer(" " + label)["input_ids"][0] for label in LABELS[name]]

    def right(adapter: str) -> int:
        prompts = [f"Text: {row['text']}\nAnswer:" for row in texts]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        logits = model(**inputs, adapter_names=[adapter] * len(texts), logits_to_keep=1).logits[:, -1]  # (B, V)
        chosen = logits[:, firsts].argmax(dim=1)  # (B,)
        return sum(LABELS[name][choice] == row[name] for choice, row in zip(chosen, texts))

    known, asked = right(name), right("__base__")
    assert known >= asked + 4 and known >= 16, f"{known} of {len(texts)} are right, {asked} without an adapter"
