# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Weights that are changed: resized vocabularies, exchanged adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_calls import INPUTS, LIVE, logits, prompted
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from tiny import VOCAB, assert_same, causal_lm


def test_resized_vocabulary(kind: str, tmp_path: Path) -> None:
    model = prompted(kind)
    before = logits(model)
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    assert_same(logits(model)[..., :VOCAB], before)  # a wider product is summed in another order on some processors
    new = {**INPUTS, "input_ids": INPUTS["input_ids"].clone()}
    new["input_ids"][0, 2] = VOCAB + 3
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = causal_lm()
    base.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    if getattr(model.active_peft_config, "vocab_size", None) is not None:  # it has a table of its own, by token ids
        with pytest.raises(ValueError, match="has 96 rows, but the text has the token id 99"):
            logits(model, new)
        with pytest.raises(ValueError, match="`vocab_size` 96, but this one has 104"):
            PeftModel.from_pretrained(base, tmp_path)
        return
    assert logits(model, new)[LIVE].isfinite().all()
    assert_same(logits(PeftModel.from_pretrained(base, tmp_path))[..., :VOCAB], before)


def test_hotswap(kind: str, tmp_path: Path) -> None:
    """PEFT's own is for LoRA only and says so; weights put in place do what it does."""
    model, other = prompted(kind), prompted(kind, seed=5)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    where = [p.data_ptr() for p in model.parameters()]
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert [p.data_ptr() for p in model.parameters()] == where
    assert torch.equal(logits(model), logits(other))
    native = causal_lm()
    native.enable_peft_hotswap(target_rank=8)
    native.load_adapter(str(tmp_path), adapter_name="default")
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        native.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)
    assert torch.equal(logits(native), logits(other))
