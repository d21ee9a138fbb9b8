# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The experiment folders for PEFT's method comparison load and train, in the steps of its runner, on a tiny model."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from methods import METHODS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "benchmarks" / "method_comparison"))

import check  # noqa: E402
import experiments  # noqa: E402


@pytest.fixture(scope="module")
def model_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama and a byte-level BPE that has the words of the data, in a folder."""
    folder = tmp_path_factory.mktemp("model")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [check.DEFAULTS["query_template"].format(query=query) + answer for query, answer in check.QUESTIONS]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(texts * 3, trainer)
    tf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        **{"vocab_size": 420, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1},
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_folders_are_what_the_script_writes(tmp_path: Path) -> None:
    experiments.write(tmp_path)
    written = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.glob("*/*/*.json")}
    assert written == {f.relative_to(experiments.FOLDER): f.read_text() for f in experiments.FOLDER.glob("*/*/*.json")}


def test_every_method_has_a_folder() -> None:
    ours = {type(make()).method for name, make in METHODS.items() if name != "mean_prompt"}
    assert {config["peft_type"].lower() for config, _ in experiments.EXPERIMENTS.values()} == ours


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_experiment(name: str, model_id: str) -> None:
    found = check.check(experiments.FOLDER / name, model_id)
    assert len(found["losses"]) == 2 and all(math.isfinite(loss) for loss in found["losses"])
    before, after, again = found["plain"]
    assert before != after == again  # it learned something, and the file has it
    assert len(found["written"]) == 3 and found["bytes"] > 0
