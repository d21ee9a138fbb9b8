# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What of a base model is saved and loaded with an adapter: classifiers, and the embeddings of a resized vocabulary."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from folders import WEIGHTS, assert_unchanged, change_config, change_weights, picture
from methods import METHODS
from peft import PeftModel
from safetensors.torch import load_file
from tiny import VOCAB, adapted, batch, causal_lm, configure

from peft_instance_prompt import IAPTConfig


PREFIX = "base_model.model."
CLASSES = {"task_type": "SEQ_CLS"}
TEXT = {"task_type": "CAUSAL_LM"}
LOADS: list[Callable] = [
    lambda base, folder: PeftModel.from_pretrained(base, folder),
    lambda base, folder: base.load_adapter(str(folder)),
]


def refuse(base: Callable, folder: Path, says: str) -> None:
    for load in LOADS:
        model = base()
        before = picture(model)
        with pytest.raises(ValueError, match=says):
            load(model, folder)
        assert_unchanged(model, before)


def loaded(base: Callable, config, folder: Path) -> list[torch.nn.Module]:
    """What each way to load makes of a folder."""
    native, again = base(), adapted(base(), config, seed=5)
    native.load_adapter(str(folder))
    again.load_adapter(folder, "default")
    second = adapted(base(), config, name="first", seed=6)
    second.load_adapter(folder, "second")
    second.set_adapter("second")
    return [PeftModel.from_pretrained(base(), folder), native, again, second]


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


# ---------------------------------------------------------------------------------------------------------- classifiers


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    return tf.LlamaForSequenceClassification(configure("llama", num_labels=3)).eval()


def test_a_classifier_that_peft_saves_by_itself(kind: str, tmp_path: Path) -> None:
    model = adapted(classifier(), METHODS[kind](**CLASSES))
    model.save_pretrained(tmp_path)
    ids = batch(9, 9)["input_ids"]
    for again in loaded(classifier, METHODS[kind](**CLASSES), tmp_path):
        assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda w: w.pop(f"{PREFIX}score.weight"), "lack .*score.weight"),
        (
            lambda w: w.update({f"{PREFIX}score.weight": torch.ones(2, 32)}),
            "another shape.*score.weight.*where .3, 32",
        ),
        (
            lambda w: w.update({f"{PREFIX}score.weight": w[f"{PREFIX}score.weight"] / 0}),
            "NaN or infinity.*score.weight",
        ),
        (lambda w: w.update({f"{PREFIX}score.original_module.weight": torch.ones(3, 32)}), "not know.*score.original"),
        (lambda w: w.update({f"{PREFIX}classifier.weight": torch.ones(3, 32)}), "not know.*classifier"),
    ],
    ids=["missing", "shape", "not finite", "the original", "no such module"],
)
def test_a_classifier_that_does_not_fit(edit: Callable, says: str, tmp_path: Path) -> None:
    adapted(classifier(), IAPTConfig(**CLASSES)).save_pretrained(tmp_path)
    change_weights(tmp_path, edit)
    refuse(classifier, tmp_path, says)


# --------------------------------------------------------------------------------------------------------- vocabularies


@pytest.fixture(params=["untied", "tied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    causal_lm(tie_word_embeddings=request.param == "tied").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(checkpoint: Path, more: int = 8) -> torch.nn.Module:
    base = tf.AutoModelForCausalLM.from_pretrained(checkpoint)
    base.resize_token_embeddings(VOCAB + more, mean_resizing=False)
    with torch.no_grad():
        base.get_input_embeddings().weight[VOCAB:] = 0.0
        base.get_output_embeddings().weight[VOCAB:] = 0.0
    return base.eval()


IDS = torch.tensor([[5, VOCAB + 3, 7, VOCAB + 7]])


@pytest.mark.parametrize("saved_by", ["PeftModel", pytest.param("transformers", marks=pytest.mark.native)])
def test_embeddings_of_a_resized_vocabulary(checkpoint: Path, saved_by: str, tmp_path: Path) -> None:
    """PEFT saves them by itself. That the config says so lets them in again, and nothing else."""
    model, folder = resized(checkpoint), tmp_path / "adapter"
    if saved_by == "PeftModel":
        model = adapted(model, IAPTConfig(**TEXT))
    else:
        model.add_adapter(IAPTConfig(**TEXT))
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:] = 0.5
    model.save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    kept = IAPTConfig.from_pretrained(folder).saved_embedding_layers
    assert {f"{PREFIX}{name}.weight" for name in kept} == {name for name in weights if "generator" not in name}
    assert "model.embed_tokens" in kept
    for again in loaded(lambda: resized(checkpoint), IAPTConfig(**TEXT), folder):
        assert torch.equal(logits(again, IDS), logits(model, IDS))
    refuse(
        lambda: resized(checkpoint, 4), folder, rf"embed_tokens.weight' \({VOCAB + 8}, 32\) where \({VOCAB + 4}, 32\)"
    )
    change_config(folder, saved_embedding_layers=["model.layers.0.mlp", "model", "model.embed"])
    refuse(lambda: resized(checkpoint), folder, "does not know, such as .*embed_tokens.weight")


def test_only_embeddings_can_be_declared_so(checkpoint: Path, tmp_path: Path) -> None:
    adapted(resized(checkpoint), IAPTConfig(**TEXT)).save_pretrained(tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj"
    change_weights(tmp_path / "adapter", lambda w: w.update({f"{PREFIX}{name}.weight": torch.ones(32, 32)}))
    for listed in (name, "model", "model.layers.0", ""):
        kept = IAPTConfig.from_pretrained(tmp_path / "adapter").saved_embedding_layers
        change_config(tmp_path / "adapter", saved_embedding_layers=[*kept, listed])
        refuse(lambda: resized(checkpoint), tmp_path / "adapter", "does not know, such as .*q_proj.weight")


def test_embeddings_that_are_saved_on_demand(tmp_path: Path) -> None:
    model = adapted(causal_lm(), IAPTConfig(**TEXT))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    for again in loaded(causal_lm, IAPTConfig(**TEXT), tmp_path):
        assert torch.equal(logits(again, IDS % VOCAB), logits(model, IDS % VOCAB))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert IAPTConfig.from_pretrained(tmp_path).saved_embedding_layers is None
    change_weights(tmp_path, lambda w: w.update({f"{PREFIX}model.embed_tokens.weight": torch.ones(VOCAB, 32)}))
    refuse(causal_lm, tmp_path, "does not know, such as .*embed_tokens.weight")


def test_embeddings_that_are_trained_and_resized(tmp_path: Path) -> None:
    """PEFT would save the original and a copy with the adapter's name as well, which overwrite others' when loaded."""
    causal_lm().save_pretrained(tmp_path / "base")
    config = IAPTConfig(**TEXT, modules_to_save=["embed_tokens", "lm_head"])
    model, folder = adapted(resized(tmp_path / "base"), config), tmp_path / "adapter"
    model.save_pretrained(folder)
    names = [name for name in load_file(folder / WEIGHTS) if "generator" not in name]
    assert sorted(names) == [f"{PREFIX}lm_head.weight", f"{PREFIX}model.embed_tokens.weight"]
    assert IAPTConfig.from_pretrained(folder).saved_embedding_layers is None
    for again in loaded(lambda: resized(tmp_path / "base"), config, folder):
        assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_resuming_with_a_resized_vocabulary(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, VOCAB + 1, 8], "labels": [-100, -100, VOCAB + 1, 8]}] * 4

    def trainer(seed: int) -> tf.Trainer:
        args = {"save_strategy": "steps", "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = tf.TrainingArguments(str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, **args)
        model = adapted(resized(checkpoint), IAPTConfig(**TEXT), seed=seed)
        return tf.Trainer(model, args, train_dataset=rows, data_collator=tf.default_data_collator)

    first, again, last = trainer(0), trainer(3), trainer(4)
    with torch.no_grad():
        first.model.get_input_embeddings().weight[VOCAB:] = 0.5
    first.train()
    again.train(resume_from_checkpoint=True)  # all steps are done: it loads, and no more
    for (name, one), two in zip(first.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(one, two), name
    shutil.rmtree(tmp_path / "out" / "checkpoint-1")
    layer = f"{PREFIX}model.layers.0.self_attn.q_proj.weight"
    change_weights(tmp_path / "out" / "checkpoint-2", lambda w: w.update({layer: torch.ones(32, 32)}))
    weights = {name: tensor.clone() for name, tensor in last.model.state_dict().items()}
    with pytest.raises(ValueError, match="hold 1 tensor.*q_proj"):
        last.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in last.model.state_dict().items())
