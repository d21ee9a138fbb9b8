# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Folders that release 0.2.0 saved load and give the numbers that they gave there.

`saved_by_0_2_0/base` holds tiny base models, and beside it lies a folder per method and form with perturbed weights. Its
`expected.safetensors` has the arguments of a call and the logits that 0.2.0 computed. The files are data: nothing writes them again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from tiny import assert_same


SAVED = Path(__file__).parent / "saved_by_0_2_0"
AUTO = {
    "llama": tf.AutoModelForCausalLM,
    "bert": tf.AutoModelForSequenceClassification,
    "t5": tf.AutoModelForSeq2SeqLM,
}
FOLDERS = sorted(file.parent.relative_to(SAVED).as_posix() for file in SAVED.glob("*/*/adapter_config.json"))


def base_model(family: str) -> torch.nn.Module:
    return AUTO[family].from_pretrained(SAVED / "base" / family).eval()


def test_every_method_of_0_2_0_is_there():
    kinds = {json.loads((SAVED / name / "adapter_config.json").read_text())["peft_type"] for name in FOLDERS}
    assert kinds == {"IAPT", "IDPG", "IDSPAM", "IPT", "LPT", "DYNAMIC_PROMPT"}
    assert len(FOLDERS) == 68


@pytest.mark.filterwarnings("ignore:A causal language model got several rows")
@pytest.mark.parametrize("folder", FOLDERS)
@torch.no_grad()
def test_folder_gives_the_logits_of_0_2_0(folder: str):
    family = folder.split("/")[0]
    call = load_file(SAVED / folder / "expected.safetensors")
    expected = call.pop("logits")
    model = PeftModel.from_pretrained(base_model(family), SAVED / folder).eval()
    assert_same(model(**call).logits, expected)
    ours = {key: value for key, value in call.items() if key not in ("task_ids", "instance_embeds")}
    bare = base_model(family)(**ours).logits
    assert float((expected - bare).abs().max()) > 1e-2  # the prompt matters, so that a wrong one would show


@pytest.mark.parametrize("family", AUTO)
def test_saving_again_keeps_every_tensor(family: str, tmp_path: Path):
    for folder in (name for name in FOLDERS if name.startswith(f"{family}/")):
        model = PeftModel.from_pretrained(base_model(family), SAVED / folder)
        model.save_pretrained(tmp_path / folder)
        old = load_file(SAVED / folder / "adapter_model.safetensors")
        new = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
