# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The trainers of transformers: a few real steps each, against losses computed by hand with `instruction_mask`."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import VOCAB, adapted, assert_same, causal_lm, perturb, tokenizer
from torch.nn.functional import cross_entropy
from trainers import (
    COMMON,
    causal_trainer,
    changed,
    collate,
    little_garbage,  # noqa: F401, around all tests of a file
    loss_by_hand,
    losses,
    per_token_loss,
    rows,
    trainable,
)


def test_causal_lm(kind: str, tmp_path: Path) -> None:
    shapes = []

    def accuracy(prediction: tf.EvalPrediction) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        asked = prediction.label_ids[:, 1:] != -100
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(right[asked].mean())}

    trainer = causal_trainer(tmp_path, kind, compute_metrics=accuracy, per_device_eval_batch_size=12)
    model, base = trainer.model, causal_lm()
    before, start = trainable(model), loss_by_hand(model, collate(rows()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(start, rel=1e-5)
    trainer.train()
    assert len(losses(trainer)) == 3 and changed(before, model) == set(before)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss_by_hand(model, collate(rows())), rel=1e-5)
    assert metrics["eval_loss"] != pytest.approx(start, rel=1e-3)
    with torch.no_grad():
        batch = collate(rows())
        logits = model.eval()(**batch).logits
        hits = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[batch["labels"][:, 1:] != -100]
    assert metrics["eval_accuracy"] == pytest.approx(float(hits.float().mean()))
    assert shapes[0] == ((12, 10, VOCAB), (12, 10))
    for name, value in model.unload().state_dict().items():
        assert value.equal(base.state_dict()[name]), f"training changed {name} of the base model"


def test_the_losses_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    trainer = causal_trainer(tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0)
    order: list[dict] = []
    trainer.data_collator = lambda data: order.append(collate(data)) or order[-1]
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    trainer.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    expected = []
    for batch in order[:3]:
        loss, asked = per_token_loss(model.train(), batch)
        loss = loss.sum() / asked.sum()
        expected.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses(trainer) == pytest.approx(expected, rel=1e-3)  # the log has four digits
    for name, value in trainable(model).items():
        assert_same(trainer.model.get_parameter(name), value, 1e-5)


def test_resuming_goes_on_as_if_never_stopped(kind: str, tmp_path: Path) -> None:
    whole = causal_trainer(tmp_path / "whole", kind, max_steps=4)
    whole.train()
    # As after a crash: the same schedule of four steps, of which two were saved.
    first = causal_trainer(tmp_path / "part", kind, max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    model = get_peft_model(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
    again = causal_trainer(tmp_path / "part", kind, perturb(model, seed=9), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert losses(again) == losses(whole) and len(losses(whole)) == 4
    for name, value in trainable(whole.model).items():
        assert_same(again.model.get_parameter(name), value, 1e-6)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    scores = iter([0.2, 0.9, 0.1])
    trainer = causal_trainer(
        tmp_path,
        compute_metrics=lambda prediction: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    now = {name.replace(".default.", "."): value for name, value in trainable(trainer.model).items()}
    assert now.keys() == saved.keys()
    assert all(now[name].equal(saved[name]) and not now[name].equal(last[name]) for name in saved)


def test_instruction_mask_as_a_column(tmp_path: Path) -> None:
    ids = torch.randint(4, VOCAB, (12, 8), generator=torch.Generator().manual_seed(0))
    columns = {"input_ids": ids.tolist(), "labels": ids.tolist()}  # every token is learned, the instruction's too
    masked = datasets.Dataset.from_dict({**columns, "instruction_mask": [[1, 1, 1, 0, 0, 0, 0, 0]] * 12})
    trainer = causal_trainer(
        tmp_path,
        data=masked,
        data_collator=tf.default_data_collator,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer.train()
    with torch.no_grad():
        scope = torch.arange(8).expand(12, 8) < 3
        logits = trainer.model.eval()(ids, instruction_mask=scope).logits[:, :-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())), rel=1e-5
    )
    # The Trainer drops columns that the model's forward does not name, and then there is no instruction to be seen.
    for left in ({"data": datasets.Dataset.from_dict(columns)}, {"data": masked, "remove_unused_columns": True}):
        with pytest.raises(ValueError, match="instruction_mask"):
            causal_trainer(tmp_path, data_collator=tf.default_data_collator, **left).train()


def test_label_smoothing_needs_a_template(tmp_path: Path) -> None:
    """It takes the labels away from the model, and with them what tells instruction from response."""
    with pytest.raises(ValueError, match="cannot tell instruction from response"):
        causal_trainer(tmp_path, label_smoothing_factor=0.1).train()
    data = datasets.Dataset.from_list(
        [
            {"input_ids": [*range(5 + i, 9 + i), 3, 20 + i, 30 + i], "labels": [-100] * 5 + [20 + i, 30 + i]}
            for i in range(8)
        ]
    )
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM", response_template=[3]))
    trainer = causal_trainer(tmp_path, model=model, data=data, label_smoothing_factor=0.1)
    trainer.train()
    with torch.no_grad():
        batch = collate(data)
        scope = torch.arange(7).expand(8, 7) < 5
        logits = model.eval()(batch["input_ids"], instruction_mask=scope).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        expected = cross_entropy(logits[:, 4:].flatten(0, 1), targets[:, 4:].flatten(), label_smoothing=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def classifier(seed: int = 0) -> tf.BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = tf.BertConfig(vocab_size=VOCAB, num_labels=3, max_position_embeddings=64, **sizes)
    return tf.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("full", [None, ["classifier", "bert.pooler"]])
def test_sequence_classification(kind: str, full: list[str] | None, tmp_path: Path) -> None:
    data = rows().remove_columns("labels").map(lambda row: {"labels": row["input_ids"][0] % 3})
    fields = {} if full is None else {"modules_to_save": full}  # PEFT adds the head by itself for SEQ_CLS
    model = adapted(classifier(), METHODS[kind](task_type="SEQ_CLS", **fields))
    trainer = tf.Trainer(
        model=model,
        args=tf.TrainingArguments(output_dir=str(tmp_path), **COMMON),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        data_collator=tf.DataCollatorWithPadding(tokenizer()),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    before = trainable(model)
    trainer.train()
    assert changed(before, model) == set(before)
    assert any("classifier" in name for name in before) and any("generator" in name for name in before)
    assert any("pooler" in name for name in before) == (full is not None)
    result = trainer.predict(data)
    assert result.predictions.shape == (12, 3) and result.label_ids.shape == (12,)
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(classifier(), tmp_path / "adapter", adapter_name="other")
    with torch.no_grad():
        batch = tokenizer().pad({"input_ids": data["input_ids"][:8]}, return_tensors="pt")
        assert_same(again(**batch).logits, torch.tensor(result.predictions[:8]))
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(
        float((result.predictions.argmax(-1) == result.label_ids).mean())
    )


def test_seq2seq_with_generation(kind: str, tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    base = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=VOCAB, **sizes, **special)).eval()
    model = adapted(base, METHODS[kind](task_type="SEQ_2_SEQ_LM"))
    data = rows().map(lambda row: {"labels": [n for n in row["labels"] if n != -100]})
    generated = []

    def exact(prediction: tf.EvalPrediction) -> dict[str, float]:
        generated.append(torch.as_tensor(prediction.predictions))
        return {"rows": float(len(prediction.predictions))}

    trainer = tf.Seq2SeqTrainer(
        model=model,
        args=tf.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            predict_with_generate=True,
            generation_max_length=6,
            **{**COMMON, "per_device_eval_batch_size": 12},
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        data_collator=tf.DataCollatorForSeq2Seq(tokenizer()),
        compute_metrics=exact,
    )
    before = trainable(model)
    trainer.train()
    assert changed(before, model) == set(before)
    metrics = trainer.evaluate()
    batch = tf.DataCollatorForSeq2Seq(tokenizer())([dict(row) for row in data])
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        expected = model.eval().generate(**inputs, max_length=6)
        assert metrics["eval_loss"] == pytest.approx(float(model(**inputs, labels=batch["labels"]).loss), rel=1e-5)
    assert torch.equal(generated[0][:, : expected.shape[1]], expected)
    assert metrics["eval_rows"] == 12
