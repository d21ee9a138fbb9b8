# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Packed rows that are refused: caches, and models that cannot keep sequences apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as tf
from methods import METHODS
from packed_rows import LENGTHS, boundaries, labels_of, packed, texts
from tiny import VLMS, VOCAB, adapted, causal_lm, encoder, pair, vlm


def test_no_cache_of_packed_rows() -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    batch = packed([texts(*LENGTHS)])
    assert model(**batch, use_cache=True).get("past_key_values") is None
    with pytest.raises(ValueError, match="cannot be continued"):
        model(**batch, past_key_values=tf.DynamicCache())


def test_encoders_and_pairs_are_refused() -> None:
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2]])
    ids = torch.arange(4, 10)[None]
    model = adapted(encoder("bert"), METHODS["iapt"](task_type="FEATURE_EXTRACTION"))
    with pytest.raises(ValueError, match="packed rows are for decoder-only models"):
        model(ids, position_ids=position_ids)
    seq2seq = adapted(pair("t5"), METHODS["iapt"](task_type="SEQ_2_SEQ_LM"))
    with pytest.raises((ValueError, TypeError), match="decoder-only models|cu_seq_lens_q"):
        seq2seq(ids, labels=ids, cu_seq_lens_q=boundaries(3, 3))


@pytest.mark.parametrize("family", [name for name in VLMS if "qwen" in name])
def test_several_rows_of_positions_are_refused(family: str) -> None:
    model = adapted(vlm(family)[0], METHODS["iapt"](task_type="CAUSAL_LM"))
    ids = torch.arange(4, 10)[None]
    positions = torch.tensor([0, 1, 2, 0, 1, 2]).expand(3, 1, 6)
    with pytest.raises(ValueError, match=r"several rows of `position_ids`, got \(\d, 1, 6\)"):
        model(input_ids=ids, labels=labels_of(ids), position_ids=positions)


def test_layers_that_need_seq_idx_are_refused() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    base = tf.Lfm2ForCausalLM(
        tf.Lfm2Config(**sizes, num_key_value_heads=2, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    )
    model = adapted(base.eval(), METHODS["iapt"](task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="mixes neighbouring tokens without attention, and would need `seq_idx`"):
        model(**packed([texts(*LENGTHS)]))


def test_other_kinds_of_attention_are_refused() -> None:
    model = adapted(causal_lm("gemma3"), METHODS["iapt"](task_type="CAUSAL_LM"))
    layer = model.get_base_model().model.iapt
    layer.info = dataclasses.replace(layer.info, attention_kinds=frozenset({"full_attention", "chunked_attention"}))
    with pytest.raises(ValueError, match="Gemma3TextModel: its 'chunked_attention' layers"):
        model(**packed([texts(*LENGTHS)]))
