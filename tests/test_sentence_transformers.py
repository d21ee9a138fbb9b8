# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""sentence-transformers, which calls `model.forward`: add, encode, train, save, load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from methods import METHODS
from peft import get_peft_model
from tiny import encoder, perturb, tokenizer


sentence_transformers = pytest.importorskip("sentence_transformers")
TEXTS = ["w1 w2 w3", "w4 w5 w6 w7 w8", "w9"]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A sentence encoder: a random BERT with mean pooling."""
    path = tmp_path / "bert"
    encoder(vocab_size=96).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def sentence_encoder(folder: str):
    return sentence_transformers.SentenceTransformer(folder, device="cpu").eval()


def test_encode_uses_the_adapter(folder: str, kind: str) -> None:
    """Through `get_peft_model` on the transformer inside, which every release takes."""
    model = sentence_encoder(folder)
    bare = model.encode(TEXTS)
    inner = model[0].model
    perturb(get_peft_model(inner, METHODS[kind]())).eval()
    adapted = model.encode(TEXTS)
    assert np.abs(adapted - bare).max() > 1e-3, "the adapter has an effect"
    with torch.no_grad():
        tokens = model.tokenize(TEXTS)
        states = inner(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        expected = (states * mask).sum(dim=1) / mask.sum(dim=1)
    np.testing.assert_allclose(adapted, expected, atol=1e-5)
    np.testing.assert_allclose(np.stack([model.encode(text) for text in TEXTS]), adapted, atol=1e-5)


@pytest.mark.native
@pytest.mark.slow
def test_add_train_save_load(folder: str, kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses

    model = sentence_encoder(folder)
    bare = model.encode(TEXTS)
    model.add_adapter(METHODS[kind](task_type="FEATURE_EXTRACTION", init_weights=False))
    before = model.encode(TEXTS)
    assert np.abs(before - bare).max() > 1e-3
    pairs = datasets.Dataset.from_dict({"anchor": TEXTS * 4, "positive": TEXTS[::-1] * 4})
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=0.05, report_to=[], use_cpu=True
        ),
        train_dataset=pairs,
        loss=losses.MultipleNegativesRankingLoss(model),
    ).train()
    trained = model.eval().encode(TEXTS)
    assert np.abs(trained - before).max() > 1e-4, "training moves the adapter"
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu").eval()
    np.testing.assert_allclose(loaded.encode(TEXTS), trained, atol=1e-5)
