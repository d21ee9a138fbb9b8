# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The settings of an engine under which the answers stay those of transformers, each in processes of its own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import served as module
import tiny
import torch
from peft import get_peft_model
from served import BASE, LORA, Engine, Served, continuations

from peft_instance_prompt import IAPTConfig, IDPGConfig, IPTConfig
from peft_instance_prompt.engine.calls import SWITCH


pytestmark = pytest.mark.slow

VARIANTS = {
    "compiled": {"enforce_eager": False},
    # Too few blocks for all requests at once: some are computed anew, their answers so far included.
    "preempted": {"enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 14, "max_num_seqs": 16},
    "transformers, n-grams": {
        "enforce_eager": True,
        "model_impl": "transformers",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
    "tensor parallel": {"enforce_eager": True, "tensor_parallel_size": 3},
    "LoRA": {"enforce_eager": True, "additional_config": {"instance_prompt": {"lora": True}}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_those_of_transformers(served, variant, tmp_path) -> None:
    file = tmp_path / "served.pickle"
    file.write_bytes(pickle.dumps(served))
    out = tmp_path / "same.json"
    command = [sys.executable, module.__file__, str(file), json.dumps(VARIANTS[variant]), str(out)]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        SWITCH: str(int(variant == "LoRA")),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1500)
    assert done.returncode == 0, done.stderr[-5000:]
    same = json.loads(out.read_text())
    assert same == dict.fromkeys(same, True) and BASE in same and (LORA in same) == (variant == "LoRA")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_families(family, tmp_path) -> None:
    """Small models with random weights, of each architecture that is called tested."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    changes = {**sizes, "head_dim": 32, "sliding_window": None, "eos_token_id": None}
    model = tiny.causal_lm(family, **changes).float()
    made = Served(tmp_path / "base")
    model.save_pretrained(made.base)
    prompts = [row[row > 0].tolist() for row in tiny.batch(5, 11, 23)["input_ids"]]
    made.prompts[BASE], made.answers[BASE] = prompts, continuations(model, prompts)
    fields = {"num_virtual_tokens": 3, "bottleneck_dim": 8, "dropout": 0.0}
    configs = {
        "iapt": IAPTConfig(bottleneck_dim=8),
        "idpg": IDPGConfig(**fields, phm_n=4, instance_source="embeddings"),
        "ipt": IPTConfig(num_virtual_tokens=4, table_rank=4),
    }
    for seed, (name, config) in enumerate(configs.items()):
        config.task_type = "CAUSAL_LM"
        torch.manual_seed(seed)
        adapted = tiny.perturb(get_peft_model(model, config), seed).eval()
        made.prompts[name], made.answers[name] = prompts, continuations(adapted, prompts)
        adapted.save_pretrained(tmp_path / name)
        made.folders[name] = tmp_path / name
        model = adapted.unload()
    names = [BASE, *configs]
    engine = Engine(made, enforce_eager=True, skip_tokenizer_init=True, max_model_len=128)
    assert engine.answers(names) == made.answers_of(names)
    assert all(made.answers[name] != made.answers[BASE] for name in configs)
    assert Path(made.base, "model.safetensors").is_file()
