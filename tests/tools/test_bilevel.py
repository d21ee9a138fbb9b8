# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Bi-level learning of activations: who steps on which data, checkpoints, several processes, TRL."""

from __future__ import annotations

import os
import socket

import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_instance_prompt import IAPTConfig, learn_activations


LENGTH = 8


def rows(number: int, seed: int) -> list[dict]:
    """Rows of random tokens; the first four are the instruction."""
    ids = torch.randint(3, tiny.VOCAB, (number, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.masked_fill(torch.arange(LENGTH) < 4, -100)
    return [{"input_ids": i, "labels": l} for i, l in zip(ids.tolist(), labels.tolist())]


TRAIN, HELD_OUT = rows(4, seed=1), rows(12, seed=2)


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([example[name] for example in examples]) for name in ("input_ids", "labels")}


def adapted(**changes):
    # A fresh adapter's up-projection is zero, through which nothing reaches the activation.
    fields = {"task_type": "CAUSAL_LM", "bottleneck_dim": 8, "init_weights": False, **changes}
    return get_peft_model(tiny.causal_lm(), IAPTConfig(**{"activation": "rational", **fields}))


def make_trainer(model, folder, **changes) -> Trainer:
    fields = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "weight_decay": 0.0,
        "max_grad_norm": 0.0, "logging_strategy": "no",
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**fields, **changes})
    return Trainer(model, args, train_dataset=TRAIN, eval_dataset=HELD_OUT, data_collator=collate)


def split(model) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The adapter's weights and its activations' coefficients, by name."""
    own = {name: parameter for name, parameter in model.named_parameters() if "iapt_generator" in name}
    coefficients = {name: own.pop(name) for name in list(own) if name.endswith(".activation")}
    return own, coefficients


def values(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def moved(parameters: dict[str, nn.Parameter], before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(parameter, before[name]) for name, parameter in parameters.items())


def test_an_activation_moves_where_it_must(tmp_path):
    """The held-out labels are those of another activation and the weights stand still, so it takes that activation."""
    model = adapted()
    (weights, coefficients), batch = split(model), collate(HELD_OUT)

    def shift(by: float) -> float:
        """Move the numerators; the loss on the held-out rows."""
        with torch.no_grad():
            for coefficient in coefficients.values():
                coefficient[..., :7] += by
            return model(**batch).loss.item()

    shift(1.0)
    batch["labels"][:, 4:] = model(**batch).logits.argmax(-1)[:, 3:-1]
    teacher, before = shift(0.0), shift(-1.0)
    trainer = make_trainer(model, tmp_path, max_steps=30, learning_rate=0.0)
    held_out = [dict(zip(batch, row)) for row in zip(*(value.tolist() for value in batch.values()))]
    learn_activations(trainer, held_out, learning_rate=0.03, batch_size=12)
    old_weights, old_coefficients = values(weights), values(coefficients)
    trainer.train()
    after = model.eval()(**batch).loss.item()
    assert before - teacher > 0.5  # there is something to learn
    assert before - after > 0.8 * (before - teacher)
    assert not moved(weights, old_weights)
    assert all(not torch.equal(c, old_coefficients[name]) for name, c in coefficients.items())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_equals_steps_in_turns_by_hand(tmp_path, accumulate, reentrant):
    """The trainer's result is that of plain AdamW steps, on weights with train rows and on coefficients with held-out."""
    model, other = adapted(), adapted()
    checkpointing = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = make_trainer(
        model, tmp_path, gradient_accumulation_steps=accumulate, per_device_train_batch_size=4 // accumulate,
        gradient_checkpointing=reentrant is not None, **checkpointing,
    )  # fmt: skip
    callback = learn_activations(
        trainer, learning_rate=1e-2, batch_size=12
    )  # a step sees all rows, so order is nothing
    trainer.train()

    weights, coefficients = (list(part.values()) for part in split(other))
    steps = [(torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0), weights, TRAIN)]
    steps.append((torch.optim.AdamW(coefficients, lr=1e-2, weight_decay=0.0), coefficients, HELD_OUT))
    for _ in range(3):
        for optimizer, parameters, data in steps:
            loss = other.train()(**collate(data)).loss
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
                parameter.grad = gradient
            optimizer.step()
    assert callback.num_steps == 3 and callback.loss == pytest.approx(loss.item(), abs=1e-4)
    for mine, reference in zip(split(model), split(other)):
        for name, parameter in mine.items():
            torch.testing.assert_close(parameter, reference[name], atol=2e-5, rtol=1e-4)


def test_who_steps_on_which_data(tmp_path):
    """At each forward pass, what can get a gradient is the weights on train rows and the coefficients on held-out rows."""
    model = adapted()
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=4)
    learn_activations(trainer, learning_rate=1e-2, every=2)
    weights, coefficients = split(model)
    train = {tuple(row["input_ids"]) for row in TRAIN}
    seen, last = [], [values(weights), values(coefficients)]

    def watch(module, args, kwargs):
        on_train = {tuple(ids) for ids in kwargs["input_ids"].tolist()} <= train
        learns = [any(p.requires_grad for p in part.values()) for part in (weights, coefficients)]
        seen.append((on_train, learns, [moved(weights, last[0]), moved(coefficients, last[1])]))
        last[:] = [values(weights), values(coefficients)]

    model.get_base_model().register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    # Per held-out step: two optimiser steps of two micro-batches. `moved` tells what the step before did.
    nothing, a, b = [False, False], [True, False], [False, True]
    one_round = [(True, a, nothing), (True, a, nothing), (True, a, a), (True, a, nothing), (False, b, a)]
    assert seen == one_round + [(True, a, b), *one_round[1:]]
    assert moved(coefficients, last[1]) and not moved(weights, last[0])
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in weights.values()}
    assert all(p.requires_grad and p.grad is None for p in coefficients.values())
    assert all(p.requires_grad for p in weights.values())


def test_single_level_is_the_default(tmp_path):
    """Without `learn_activations` coefficients are learned with the weights."""
    model = adapted()
    before = values(split(model)[1])
    make_trainer(model, tmp_path).train()
    assert moved(split(model)[1], before)


@pytest.mark.parametrize("momentum", [False, True])
def test_resume(tmp_path, momentum):
    """Stopping at a checkpoint and going on in a new trainer gives the bits of a run without a stop."""

    def run(folder, steps, resume=None, **changes):
        torch.manual_seed(3)
        model = adapted()
        trainer = make_trainer(model, folder, max_steps=steps, **changes)
        kind = {"optimizer_cls": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.9}} if momentum else {}
        callback = learn_activations(trainer, learning_rate=1e-2, batch_size=5, **kind)
        trainer.train(resume_from_checkpoint=resume)
        return model, callback

    straight, callback = run(tmp_path / "a", 4, save_strategy="steps", save_steps=2)
    assert callback.num_steps == 4
    resumed, callback = run(tmp_path / "b", 4, resume=str(tmp_path / "a" / "checkpoint-2"))
    assert callback.num_steps == 4
    for mine, reference in zip(split(resumed), split(straight)):
        for name, parameter in mine.items():
            assert torch.equal(parameter, reference[name]), name


def test_held_out_rows_all_come_in_turn_and_are_shuffled(tmp_path):
    trainer = make_trainer(adapted(), tmp_path)
    callback = learn_activations(trainer, batch_size=5)
    drawn = []
    for callback.num_steps in range(12):
        drawn += map(tuple, callback._batch()["input_ids"].tolist())
    rounds = [drawn[start : start + 12] for start in range(0, 60, 12)]
    wanted = {tuple(row["input_ids"]) for row in HELD_OUT}
    assert all(set(part) == wanted for part in rounds)
    assert rounds[0] != rounds[1]


def test_sft(tmp_path):
    """TRL's trainer, whose loss is its own: coefficients move, and the weights move otherwise than without them."""
    model = adapted(response_template=[5])
    data = [{"input_ids": [3, 4, 5, *row["input_ids"]], "labels": [-100] * 3 + row["input_ids"]} for row in HELD_OUT]
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True}, bf16=False,
    )  # fmt: skip

    def pad(examples):
        batch = collate(examples)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    trainer = SFTTrainer(
        model, args, train_dataset=Dataset.from_list(data[:4]), data_collator=pad, processing_class=processing_class(),
        eval_dataset={"held_out": Dataset.from_list(data[4:]), "test": Dataset.from_list(data[:2])},
    )  # fmt: skip
    callback = learn_activations(trainer, "held_out", learning_rate=1e-2)
    weights, coefficients = split(model)
    old_weights, old_coefficients = values(weights), values(coefficients)
    trainer.train()
    assert callback.num_steps == 2 and moved(coefficients, old_coefficients) and moved(weights, old_weights)
    assert len(callback.dataset) == 8


def processing_class():
    """A word-level tokenizer made on the spot."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2")


def _learn_in_process(rank: int, world: int, port: int, folder: str) -> None:
    """What each of `world` processes runs: DDP by Trainer, with gloo. The weights stand still, so only held-out rows count."""
    import sys

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    model = adapted()
    trainer = make_trainer(model, folder, ddp_backend="gloo", learning_rate=0.0, per_device_train_batch_size=2)
    callback = learn_activations(trainer, learning_rate=1e-2, batch_size=6 // world)
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel) and callback.num_steps == 3
    torch.save(values(split(model)[1]), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_learn_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_learn_in_process, (2, port, str(tmp_path)), nprocs=2)
    model = adapted()
    trainer = make_trainer(model, tmp_path, learning_rate=0.0)
    learn_activations(trainer, learning_rate=1e-2, batch_size=6)
    before = values(split(model)[1])
    trainer.train()
    alone = values(split(model)[1])
    assert any(not torch.equal(alone[name], before[name]) for name in alone)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in alone.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], value, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_learned_is_refused(tmp_path):
    trainer = make_trainer(adapted(activation="gelu"), tmp_path)
    with pytest.raises(ValueError, match="no learned activation"):
        learn_activations(trainer)
    trainer = make_trainer(adapted(), tmp_path)
    for fields, message in (({"every": 0}, "`every`"), ({"learning_rate": 0.0}, "`learning_rate`")):
        with pytest.raises(ValueError, match=message):
            learn_activations(trainer, **fields)
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="`dataset`"):
        learn_activations(trainer)
    trainer = make_trainer(adapted(), tmp_path)
    assert all(p.requires_grad for p in split(trainer.model)[1].values())  # what was refused changed nothing
    trainer.create_optimizer()
    with pytest.raises(ValueError, match="optimiser holds"):
        learn_activations(trainer)
    coarse = adapted().to(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        learn_activations(make_trainer(coarse, tmp_path))
