# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A tiny chat model in a folder, and commands that train and load it. Each framework has an environment of its own: see the Makefile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import peft_instance_prompt  # noqa: F401, before an adapter is loaded


ROOT = Path(__file__).parents[2]
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(folder: Path) -> Path:
    """A Llama of random weights, so large that prompts change what it says, and a tokenizer of bytes with a chat template."""
    vocab = {piece: n for n, piece in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": False}
    torch.manual_seed(0)
    config = tf.LlamaConfig(vocab_size=len(vocab), num_key_value_heads=2, initializer_range=0.3, **sizes, **ids)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def run(*command: str | Path, stdin: str = "", fails: bool = False, **env: str) -> str:
    """Run a command from the repository's root; returns what it prints, errors too."""
    shared = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, **shared, **env},
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert (done.returncode != 0) == fails, f"{' '.join(words)}\n{done.stdout[-6000:]}"
    return done.stdout


def script(name: str) -> Path:
    """A command of this environment."""
    return Path(sys.executable).with_name(name)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    """Whether the adapters in two folders are equal, bit by bit."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def answer(base: Path, adapter: Path | None, question: str, tokens: int = 8) -> str:
    """What PEFT alone makes of a question, greedily, with the adapter or without one: the reference."""
    tokenizer, model = tf.AutoTokenizer.from_pretrained(base), tf.AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.eval().generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
