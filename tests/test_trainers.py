# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The trainers of transformers and TRL: a few real steps each, against losses computed by hand with `instruction_mask`."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import VOCAB, adapted, assert_same, causal_lm, perturb, tokenizer
from torch.nn.functional import cross_entropy, logsigmoid
from transformers.trainer import DEFAULT_CALLBACKS
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.trainers import SamplingGuard


datasets.disable_progress_bars()
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}
TRL = {"bf16": False, "gradient_checkpointing": False, "max_length": 32}


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    gc.freeze()  # each run collects garbage, which takes longer than its training as long as all libraries are looked at
    yield
    gc.unfreeze()


def rows(num: int = 12, prompt: int = 3, response: int = 4) -> datasets.Dataset:
    """Instruction and response as token ids, of several lengths."""
    made = []
    for i in range(num):
        ids = [4 + (7 * i + 5 * j) % (VOCAB - 8) for j in range(prompt + i % 3 + response + i % 2)]
        made.append({"input_ids": ids, "labels": [-100] * (prompt + i % 3) + ids[prompt + i % 3 :]})
    return datasets.Dataset.from_list(made)


def collate(data: Any) -> dict[str, torch.Tensor]:
    return tf.DataCollatorForSeq2Seq(tokenizer())([dict(row) for row in data])


def per_token_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each next token (B, S - 1), 0 where none is asked for, and where one is: by rule 1, without `labels`."""
    labels = batch["labels"]
    answered = (labels != -100).cumsum(dim=1) > 0
    scope = (batch["attention_mask"] == 1) & ~answered
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], instruction_mask=scope).logits
    loss = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return loss, labels[:, 1:] != -100


@torch.no_grad()
def loss_by_hand(model: PeftModel, batch: dict[str, torch.Tensor]) -> float:
    loss, asked = per_token_loss(model.eval(), batch)
    return float(loss.sum() / asked.sum())


def losses(trainer: tf.Trainer, name: str = "loss") -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if name in before and not value.equal(before[name])}


# ------------------------------------------------------------------------------------------------------ transformers


def causal_trainer(path: Path, kind: str = "iapt", model: PeftModel | None = None, **changes: Any) -> tf.Trainer:
    extra = {name: changes.pop(name) for name in ("compute_metrics", "data_collator") if name in changes}
    extra.setdefault("data_collator", collate)
    data = changes.pop("data", None) or rows()
    return tf.Trainer(
        model=adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")) if model is None else model,
        args=tf.TrainingArguments(output_dir=str(path), **{**COMMON, **changes}),
        train_dataset=data,
        eval_dataset=data,
        **extra,
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


# --------------------------------------------------------------------------------------------------------------- TRL


COMPLETION = [{"prompt": f"w{5 + i} w{6 + i} w{7 + i}", "completion": f" w{8 + i} w{9 + i}"} for i in range(8)]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"w{5 + i} w{6 + i}"}],
        "completion": [{"role": "assistant", "content": f"w{8 + i} w{9 + i}"}],
    }
    for i in range(8)
]
PREFERENCE = [
    {"prompt": f"w{5 + i} w{6 + i} w{7 + i} <unk>", "chosen": f" w{8 + i} w{9 + i}", "rejected": f" w{1 + i}"}
    for i in range(8)
]


def sft(path: Path, data: list[dict], model: PeftModel | None = None, **changes: Any) -> SFTTrainer:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")) if model is None else model
    data, extra = datasets.Dataset.from_list(data), {}
    if isinstance(changes.get("peft_config"), IAPTConfig):
        extra["peft_config"] = changes.pop("peft_config")
    args = SFTConfig(output_dir=str(path), **{**COMMON, **TRL, **changes})
    return SFTTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), **extra
    )


def sft_batch(data: list[dict]) -> dict[str, torch.Tensor]:
    """What SFT makes of the data, tokenized by hand: the completion and its end token are learned."""
    made = []
    for row in data:
        if isinstance(row["prompt"], str):
            prompt, rest = row["prompt"], row["completion"] + " </s>"
        else:
            prompt, rest = f"w0 {row['prompt'][0]['content']} </s> w1", f"{row['completion'][0]['content']} </s>"
        first, second = (tokenizer()(text, add_special_tokens=False)["input_ids"] for text in (prompt, rest))
        made.append({"input_ids": first + second, "labels": [-100] * len(first) + second})
    return collate(made)


@pytest.mark.parametrize("data", [COMPLETION, CHAT], ids=["prompt_completion", "conversational"])
def test_sft(kind: str, data: list[dict], tmp_path: Path, loss_type: str = "nll") -> None:
    """`nll` is the fused loss that calls the backbone itself and makes no logits."""
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
    trainer = sft(tmp_path, data, model, loss_type=loss_type)
    before = trainable(model)
    trainer.train()
    assert changed(before, model) == set(before)
    with torch.no_grad():
        loss, asked = per_token_loss(model.eval(), sft_batch(data))
        loss = loss * (-loss).exp() if loss_type == "dft" else loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(loss.sum() / asked.sum()), rel=1e-5)


def test_sft_with_another_loss(tmp_path: Path) -> None:
    test_sft("iapt", COMPLETION, tmp_path, "dft")


def test_sft_makes_the_adapter_itself(tmp_path: Path) -> None:
    base = causal_lm()
    trainer = sft(tmp_path, COMPLETION, base, peft_config=METHODS["iapt"](task_type="CAUSAL_LM"))
    assert isinstance(trainer.model, PeftModel)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(causal_lm(), tmp_path / "adapter")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_by_hand(again, sft_batch(COMPLETION)), rel=1e-5)
    assert trainer.evaluate()["eval_loss"] < start


def test_sft_of_assistant_turns(tmp_path: Path) -> None:
    data = [{"messages": row["prompt"] + row["completion"]} for row in CHAT]
    trainer = sft(tmp_path, data, assistant_only_loss=True)
    trainer.train()
    batch = sft_batch(CHAT)
    # The template marks what lies between {% generation %} and {% endgeneration %}: the words and the end token.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_by_hand(trainer.model, batch), rel=1e-5)


@pytest.fixture
def chat_config(tmp_path: Path) -> Callable:
    """A config whose `response_template` is found in the tokenizer's chat template."""
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    fields = {"response_template": "chat", "tokenizer_name_or_path": str(tmp_path / "tokenizer")}
    return lambda kind="iapt", **kw: METHODS[kind](task_type="CAUSAL_LM", **fields, **kw)


def said(*turns: str) -> dict:
    """A conversation, in which user and assistant take turns."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def chat_batch(data: list[dict], cut: int | None = None, assistant_only: bool = False) -> dict[str, torch.Tensor]:
    """Conversations as token ids, by hand, cut off at a length; what is learned is the answers only, or all tokens."""
    made = []
    for row in data:
        ids, learned = [], []
        for turn in row["messages"]:
            words = tokenizer()(turn["content"] + " </s>", add_special_tokens=False)["input_ids"]
            answer = turn["role"] == "assistant"
            ids += [5 if answer else 4, *words]  # w1 or w0
            learned += [not assistant_only, *[answer or not assistant_only] * len(words)]
        labels = [token if own else -100 for token, own in zip(ids, learned)]
        made.append({"input_ids": ids[:cut], "labels": labels[:cut]})
    return collate(made)


@torch.no_grad()
def chat_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> float:
    """The loss with prompts that are made of what stands up to the first `w1`, by rule 1; of all of a row without it."""
    marks = batch["input_ids"] == 5
    scope = (marks.cumsum(dim=1) - marks.long() == 0) & (batch["attention_mask"] == 1)
    logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"], instruction_mask=scope).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100))


def marks_user_turns() -> bool:
    """Whether the tokenizer says that the user's second turn is the assistant's, as transformers 5.18 does."""
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    turns = said("w5", "w6", "w7", "w8")["messages"]  # w0 w5 </s> w1 w6 </s> w0 w7 </s> w1 w8 </s>
    return tokenizer().apply_chat_template(turns, **how)["assistant_masks"] != [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("assistant_only", [False, True])
def test_sft_of_conversations(kind: str, assistant_only: bool, chat_config: Callable, tmp_path: Path) -> None:
    """`messages` as they are, of several turns: one more word in the config."""
    data = [said(f"w{5 + i} w{6 + i}", f"w{8 + i}", *[f"w{20 + i}", f"w{30 + i} w9"] * (i % 2)) for i in range(8)]
    if assistant_only and marks_user_turns():
        pytest.skip("this transformers takes what stands between two answers for an answer, too")
    model = adapted(causal_lm(), chat_config(kind))
    trainer = sft(tmp_path, data, model, assistant_only_loss=assistant_only)
    trainer.train()
    expected = chat_loss(model, chat_batch(data, assistant_only=assistant_only))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_sft_of_conversations_without_a_template_proposes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for chat data, `response_template='chat'`"):
        sft(tmp_path, [said("w5", "w6")] * 8).train()


LONG = [said("w9 " * (4 * i % 12), f"w{8 + i}") for i in range(8)]  # cut off at 8, some have no answer


def test_sft_of_conversations_that_are_cut_off(chat_config: Callable, tmp_path: Path) -> None:
    """Where answers only are learned, TRL leaves out a row that was cut off before its answer."""
    model = adapted(causal_lm(), chat_config())
    trainer = sft(tmp_path, LONG, model, assistant_only_loss=True, max_length=8)
    trainer.train()
    batch = chat_batch(LONG, cut=8, assistant_only=True)
    assert ((batch["labels"] == -100).all(dim=1)).sum() > 0
    assert trainer.evaluate()["eval_loss"] == pytest.approx(chat_loss(model, batch), rel=1e-5)


def test_sft_of_all_tokens_of_conversations_that_are_cut_off(chat_config: Callable, tmp_path: Path) -> None:
    """There the prompt would read what is learned: that must be asked for."""
    with pytest.raises(ValueError, match="does not occur in row.*set `missing_template='all'`"):
        sft(tmp_path / "error", LONG, adapted(causal_lm(), chat_config()), max_length=8).train()
    model = adapted(causal_lm(), chat_config(missing_template="all"))
    trainer = sft(tmp_path / "all", LONG, model, max_length=8)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(chat_loss(model, chat_batch(LONG, cut=8)), rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_sft_with_gradient_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        how = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}} if on else {}
        trainer = sft(tmp_path, COMPLETION, gradient_checkpointing=on, **how)
        trainer.train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules()) == on
        runs.append((losses(trainer), trainable(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    for name, value in runs[0][1].items():
        assert_same(runs[1][1][name], value, 1e-4)


PACKED = {
    "packing": {"packing": True, "packing_strategy": "bfd"},
    "packing_split": {"packing": True, "packing_strategy": "bfd_split"},
    "padding_free": {"padding_free": True, "max_length": None},
    "padding_free_multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
}


@pytest.mark.parametrize("changes", PACKED.values(), ids=PACKED)
def test_sft_of_packed_rows(kind: str, changes: dict, tmp_path: Path) -> None:
    """The loss and the gradients of packed rows are those of the rows with padding."""
    runs = []
    for name, how in (("plain", {}), ("packed", changes)):
        model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
        if kind == "dynamic_prompt":  # without random choices
            model.get_base_model().model.dynamic_prompt.generators["default"].sampling.p = 0.0
        trainer = sft(tmp_path / name, COMPLETION, model, per_device_train_batch_size=8, **how)
        model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["input_ids"].shape[0] == 1) == (name == "packed")
        trainer.compute_loss(model, batch).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        runs.append((trainer.evaluate()["eval_loss"], gradients))
        trainer.train()
        assert len(losses(trainer)) == 3
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    assert runs[0][0] == pytest.approx(
        loss_by_hand(adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")), sft_batch(COMPLETION)), rel=1e-5
    )
    assert runs[0][1].keys() == runs[1][1].keys() and runs[0][1]
    for name, gradient in runs[0][1].items():
        assert_same(runs[1][1][name], gradient, 1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_sft_of_packed_rows_with_gradient_checkpointing(use_reentrant: bool, tmp_path: Path) -> None:
    how = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    runs = []
    for on in (False, True):
        trainer = sft(tmp_path, COMPLETION, packing=True, gradient_checkpointing=on, **(how if on else {}))
        trainer.train()
        runs.append((losses(trainer), trainable(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    for name, value in runs[0][1].items():
        assert_same(runs[1][1][name], value, 1e-4)


def test_sft_of_texts_that_are_split(tmp_path: Path) -> None:
    """Of a text that `bfd_split` cuts, the second part has no instruction, and its prompt is made from its first token."""
    words = [f"w{10 + i}" for i in range(20)]
    data = [{"prompt": "w1 w2 w3", "completion": " " + " ".join(words)}, *COMPLETION[:3]]
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    trainer = sft(tmp_path, data, model, packing=True, packing_strategy="bfd_split", max_length=16)
    (ids,) = tokenizer()("w1 w2 w3 " + " ".join(words) + " </s>", return_tensors="pt")["input_ids"].split(1)
    parts = [(ids[:, :16], 3), (ids[:, 16:], 1)]
    parts += [(batch["input_ids"], 3) for batch in (sft_batch([row]) for row in COMPLETION[:3])]
    loss, asked = 0.0, 0
    with torch.no_grad():
        for part, instruction in parts:
            labels = part.clone()
            labels[:, :instruction] = -100
            one, which = per_token_loss(
                model, {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": labels}
            )
            loss, asked = loss + float(one.sum()), asked + int(which.sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss / asked, rel=1e-5)
    trainer.train()


@pytest.mark.parametrize("template", [None, [3]])
def test_wrapped_packing_is_refused(template: list[int] | None, tmp_path: Path) -> None:
    """It cuts texts anywhere and does not say where they begin, so a row begins with what is to be predicted."""
    config = METHODS["iapt"](task_type="CAUSAL_LM", response_template=template, missing_template="all")
    model = adapted(causal_lm(), config)
    data = [{**row, "prompt": row["prompt"] + " <unk>"} for row in COMPLETION]
    with pytest.raises(ValueError, match="packing_strategy='wrapped'"):
        sft(tmp_path, data, model, packing=True, packing_strategy="wrapped", max_length=9).train()


TEXT = [{"text": " ".join(f"w{5 + 3 * i + j}" for j in range(6 + i))} for i in range(8)]


@pytest.mark.parametrize("changes", [{}, {"packing": True}], ids=["padded", "packed"])
def test_sft_of_plain_text(changes: dict, tmp_path: Path) -> None:
    """The first three tokens are the instruction, and no prompt and no logit at or before a token depends on later ones."""
    config = METHODS["iapt"](task_type="CAUSAL_LM", instruction_length=3, prompt_position="end")
    model = adapted(causal_lm(), config)
    trainer = sft(tmp_path, TEXT, model, **changes)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in TEXT:
            ids = torch.tensor([tokenizer()(row["text"] + " </s>", add_special_tokens=False)["input_ids"]])
            logits = model(ids, instruction_mask=torch.arange(ids.shape[1])[None] < 3).logits[:, :-1]
            total += float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids.shape[1] - 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    batch["use_cache"] = False
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        for column in range(1, batch["input_ids"].shape[1]):
            other = {**batch, "input_ids": batch["input_ids"].clone()}
            other["input_ids"][:, column:] = (other["input_ids"][:, column:] + 7) % VOCAB
            found = model(**other).logits
            assert_same(found[:, :column], expected[:, :column])
            assert (found[:, column:] - expected[:, column:]).abs().max() > 1e-3


def test_sft_refuses_plain_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompt-completion data, completion-only loss"):
        sft(tmp_path, [{"text": row["prompt"] + row["completion"]} for row in COMPLETION]).train()


def test_sft_of_plain_text_with_a_template(tmp_path: Path) -> None:
    """All tokens are learned, and the prompt is generated from what stands up to the template."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM", response_template=[4]))  # w0
    trainer = sft(tmp_path, [{"text": f"w{5 + i} w{6 + i} w0 w{8 + i} w{9 + i}"} for i in range(8)], model)
    trainer.train()
    ids = torch.tensor([[9 + i, 10 + i, 4, 12 + i, 13 + i, 2] for i in range(8)])
    with torch.no_grad():
        logits = model.eval()(ids, instruction_mask=torch.arange(6).expand(8, 6) < 3).logits[:, :-1]
    expected = float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def dpo(path: Path, model: Any, peft_config: Any = None, **changes: Any) -> DPOTrainer:
    data = datasets.Dataset.from_list(PREFERENCE)
    return DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(path), beta=1.0, **{**COMMON, **TRL, **changes}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


@torch.no_grad()
def margin(model: Any) -> torch.Tensor:
    """By how much the log-probability of the chosen answer is above that of the rejected one, (B,)."""
    both = [sft_batch([{**row, "completion": row[name]} for row in PREFERENCE]) for name in ("rejected", "chosen")]
    rejected, chosen = (per_token_loss(model.eval(), batch)[0].sum(dim=1) for batch in both)
    return rejected - chosen


def check_dpo(trainer: DPOTrainer, reference: torch.Tensor) -> None:
    before = trainable(trainer.model)
    trainer.train()
    assert changed(before, trainer.model) == set(before)
    expected = float(-logsigmoid(margin(trainer.model) - reference).mean())
    assert abs(expected - 0.6931) > 0.002, "a model that is its own reference proves nothing"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_dpo(kind: str, tmp_path: Path) -> None:
    """Both answers get their prompts from the instruction alone; the reference is a copy that TRL makes of the adapter."""
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
    trainer = dpo(tmp_path, model)
    assert set(model.peft_config) == {"default", "ref"}
    check_dpo(trainer, margin(adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))))


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_against_the_base_model(precompute: bool, tmp_path: Path) -> None:
    """With a template, which serves these answers as the labels do."""
    config = METHODS["iapt"](task_type="CAUSAL_LM", response_template=[3])  # <unk>
    trainer = dpo(tmp_path, causal_lm(), config, precompute_ref_log_probs=precompute)
    perturb(trainer.model)
    with trainer.model.disable_adapter():
        reference = margin(trainer.model)
    check_dpo(trainer, reference)


ONLINE = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def online(path: Path, name: str, model: Any, peft_config: Any = None, **changes: Any) -> tf.Trainer:
    trainer, config = ONLINE[name]
    common = {key: value for key, value in COMMON.items() if "batch_size" not in key}
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 4, "bf16": False}
    sizes["temperature"] = 3.0  # the answers to one question must differ, or there is nothing to learn
    return trainer(
        model=model,
        args=config(output_dir=str(path), gradient_checkpointing=False, **{**common, **sizes, **changes}),
        reward_funcs=lambda completions, **_: [sum(map(ord, text)) / 1000 for text in completions],
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in COMPLETION]),
        processing_class=tokenizer("left"),
        peft_config=peft_config,
    )


@pytest.mark.parametrize("option", ["use_vllm", "use_transformers_continuous_batching"])
@pytest.mark.parametrize("name", ONLINE)
def test_online_trainers_refuse_samplers_without_the_adapter(name: str, option: str, tmp_path: Path) -> None:
    """When they are made, before vLLM is started, whoever makes the adapter; others' adapters are no business of ours."""
    says = f"cannot be used with `{option}`.*Set `{option}=False`: the trainer then samples with `generate`"
    with pytest.raises(ValueError, match=says):
        online(tmp_path, name, adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")), **{option: True})
    with pytest.raises(ValueError, match=says):
        online(tmp_path, name, causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"), **{option: True})
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(ImportError, match="vLLM") if option == "use_vllm" else contextlib.nullcontext():
        online(tmp_path, name, causal_lm(), lora, **{option: True})
    assert DEFAULT_CALLBACKS.count(SamplingGuard) == 1


def test_online_trainers_sample_with_the_adapter(kind: str, tmp_path: Path) -> None:
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
    trainer = online(tmp_path, "grpo", model, learning_rate=1e-2)
    before = trainable(model)
    trainer.train()
    assert changed(before, model)


def test_weights_that_are_sent_to_vllm(tmp_path: Path) -> None:
    """What TRL calls before it sends weights, for a trainer that was loaded after the adapter: the cure is named there, too."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="cannot be merged.*`use_vllm=False`"):
        model.merge_adapter()
