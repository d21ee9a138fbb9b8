# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Vectors that are computed once and stored with the data set, and what carries them to the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from tiny import adapted, assert_same, causal_lm, encoder, pair
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments

from peft_instance_prompt import IDPGConfig, InstanceEmbedsCollator, add_instance_embeds
from peft_instance_prompt.engine.intercept import intercept


TEXTS = ["a b c d e", "b", "c a b", "e e d d c b a"]
DATA = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1]})


def lengths(texts: list[str]) -> list[list[float]]:
    return [[len(text), text.count("a")] for text in texts]


@pytest.fixture(params=["left", "right"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 5, "b": 6, "c": 7, "d": 8, "e": 9}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side=request.param)


class Sentences:
    encode = staticmethod(lengths)


@pytest.mark.parametrize(
    "make",
    [
        lengths,
        lambda texts: np.array(lengths(texts), dtype=np.float64),
        lambda texts: torch.tensor(lengths(texts), dtype=torch.bfloat16, requires_grad=True),
        Sentences(),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_kinds_of_encoders(make, batch_size: int) -> None:
    data = add_instance_embeds(DATA, make, batch_size=batch_size)
    assert data["instance_embeds"][:] == lengths(TEXTS)
    assert data.features["instance_embeds"].feature.dtype == "float32"
    assert data["text"][:] == TEXTS and data["label"][:] == [0, 1, 0, 1]


def test_dataset_dict_and_names() -> None:
    data = DatasetDict({part: DATA.rename_column("text", "review") for part in ("train", "test")})
    data = add_instance_embeds(data, lengths, text_column="review", column="vector")
    assert isinstance(data, DatasetDict)
    assert all(part["vector"][:] == lengths(TEXTS) for part in data.values())


def test_another_encoder_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    DATA.save_to_disk(tmp_path)
    data = Dataset.load_from_disk(tmp_path)  # what lies on disk is cached there
    one = add_instance_embeds(data, lambda texts: np.zeros((len(texts), 2)))
    two = add_instance_embeds(data, lambda texts: np.ones((len(texts), 2)))
    assert one["instance_embeds"][:] != two["instance_embeds"][:]


@pytest.mark.parametrize("pooling", ["auto", "mean"])
@torch.no_grad()
def test_adapted_model_as_encoder_gives_what_its_frozen_pass_would(tokenizer, pooling: str) -> None:
    config = IDPGConfig(task_type="CAUSAL_LM", phm_n=4, instance_pooling=pooling)
    model = adapted(causal_lm(attention_dropout=0.5), config).train()
    stored = add_instance_embeds(DATA, (model, tokenizer), pooling=pooling, batch_size=3)["instance_embeds"][:]
    assert model.training and model.base_model.model.model.layers[0].training
    inputs, seen = tokenizer(TEXTS, padding=True, return_tensors="pt"), []
    with intercept(lambda made: seen.append(made.values) if made.depth is None else None):
        model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert_same(torch.tensor(stored), seen[0])


@pytest.mark.parametrize(
    ("base", "pooling", "pick"),
    [
        (encoder, "auto", lambda states: states[0]),
        (encoder, "mean", lambda states: states.mean(dim=0)),
        (encoder, "last", lambda states: states[-1]),
        (pair, "auto", lambda states: states.mean(dim=0)),
        (causal_lm, "first", lambda states: states[0]),
    ],
)
@torch.no_grad()
def test_plain_model_as_encoder(tokenizer, base, pooling: str, pick) -> None:
    model = base()
    stored = add_instance_embeds(DATA, (model, tokenizer), pooling=pooling)["instance_embeds"][:]
    stack = model.encoder if base is pair else getattr(model, "model", model)
    for text, vector in zip(TEXTS, stored):
        states = stack(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        assert_same(torch.tensor(vector), pick(states))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"dataset": [{"text": "a"}]}, TypeError, "`dataset` must be.*got list"),
        ({"text_column": "review"}, ValueError, r"`text_column` 'review'.*\['text', 'label'\]"),
        ({"column": "label"}, ValueError, "`column` 'label' is in the data set already"),
        ({"pooling": "max"}, ValueError, "`pooling`.*'max'"),
        ({"encoder": 3}, TypeError, "`encoder` must be.*got int"),
        ({"encoder": lambda texts: np.ones(len(texts))}, ValueError, r"a vector of each of 4 texts.*\(4,\)"),
        ({"encoder": lambda texts: np.ones((2, 3))}, ValueError, r"a vector of each of 4 texts.*\(2, 3\)"),
    ],
)
def test_bad_arguments(arguments: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        add_instance_embeds(**{"dataset": DATA, "encoder": lengths, **arguments})


def test_collator() -> None:
    seen = []
    collator = InstanceEmbedsCollator(lambda rows: seen.append(rows) or {"n": len(rows)}, column="v")
    rows = [{"text": "a", "v": [1.0, 2.0]}, {"text": "b", "v": np.array([3.0, 4.0])}]
    batch = collator(rows)
    assert torch.equal(batch.pop("instance_embeds"), torch.tensor([[1.0, 2.0], [3.0, 4.0]])) and batch == {"n": 2}
    assert seen == [[{"text": "a"}, {"text": "b"}]] and "v" in rows[0]
    with pytest.raises(ValueError, match=r"Example\(s\) \[1\].*'v'.*remove_unused_columns=False"):
        collator([rows[0], {"text": "b"}])
    with pytest.raises(ValueError, match=r"differ in width: \[\(2,\), \(3,\)\]"):
        collator([rows[0], {"text": "b", "v": [1.0, 2.0, 3.0]}])


def test_trainer_pays_no_second_pass(tokenizer, tmp_path: Path) -> None:
    """And sees the vectors: another prompt is learned with others."""

    def tokenize(row: dict) -> dict:
        ids = tokenizer(row["text"])["input_ids"]
        return {"input_ids": [*ids, 9], "labels": [-100] * len(ids) + [9]}

    weights = []
    for sign in (1, -1):
        data = add_instance_embeds(DATA, lambda texts, sign=sign: sign * np.array(lengths(texts), dtype=np.float32))
        data = data.map(tokenize).remove_columns(["text", "label"])
        config = IDPGConfig(task_type="CAUSAL_LM", phm_n=2, instance_source="instance_embeds", instance_embeds_dim=2)
        torch.manual_seed(0)
        model = get_peft_model(causal_lm(), config)
        calls = []
        model.base_model.model.model.layers[0].register_forward_hook(lambda *_: calls.append(None))
        arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.1, "report_to": "none"}
        Trainer(
            model=model,
            args=TrainingArguments(tmp_path, remove_unused_columns=False, use_cpu=True, **arguments),
            train_dataset=data,
            data_collator=InstanceEmbedsCollator(DataCollatorForSeq2Seq(tokenizer)),
        ).train()
        assert len(calls) == 3
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert not torch.equal(*weights)
