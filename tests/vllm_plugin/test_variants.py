# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The settings of an engine under which the answers stay those of transformers, each in processes of its own."""

from __future__ import annotations

import json
import math
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
from served import BASE, CHAT, CHATS, CONFIGS, LORA, NEW_TOKENS, OVERLAY, Engine, Served, continuations
from vllm.config import CompilationMode

from peft_instance_prompt import IAPTConfig, IDPGConfig, IPTConfig, PreFTConfig
from peft_instance_prompt.vllm.package import SWITCH


pytestmark = pytest.mark.slow

ALL = [BASE, CHAT, *CONFIGS]
EAGER = {"enforce_eager": True}
CHUNKS = {"max_num_batched_tokens": 96, "max_num_seqs": 16}  # fewer tokens in a step than all prompts have
FEW = [[BASE, "iapt", "preft"]]  # nine prompts: Triton's interpreter is slow
HERE = Path(__file__).parent
V2 = [str(HERE / "interpreter")]

# By name: the engine's settings; batches of adapters; what stands on PYTHONPATH; and whether untested settings pass.
VARIANTS = {
    "compiled, chunks": ({**CHUNKS}, [ALL], [], False),
    # Too few blocks for all requests at once: some are computed anew, their answers so far included.
    "preempted": ({**EAGER, "block_size": 32, "num_gpu_blocks_override": 14, "max_num_seqs": 16}, [ALL], [], False),
    "transformers, n-grams": (
        {
            **EAGER,
            "model_impl": "transformers",
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        },
        [ALL],
        [],
        False,
    ),
    "tensor parallel": ({**EAGER, "tensor_parallel_size": 3}, [ALL], [], False),
    # In batches of their own: on the CPU, vLLM's LoRA reaches the other rows of a batch.
    "LoRA beside": ({**EAGER, "additional_config": {"instance_prompt": {"lora": True}}}, [ALL, [LORA]], [], True),
    "LoRA alone": ({**EAGER, "additional_config": {}, "enable_lora": True}, [[BASE], [LORA]], [], False),
    "whole prompts": ({**EAGER, "enable_chunked_prefill": False, "enable_prefix_caching": False}, FEW, [], False),
    "V2, chunks": ({**EAGER, **CHUNKS}, FEW, V2, False),
    "0.33, chunks": ({**EAGER, **CHUNKS}, [ALL], [str(OVERLAY)], False),
    "0.33, V2": ({**EAGER}, FEW, [str(OVERLAY), *V2], False),
}


def compare(served, tmp_path, settings, batches, path=(), untested=False, **more):
    """What `served.py` finds in a process of its own."""
    if str(OVERLAY) in path and not OVERLAY.is_dir():
        pytest.skip("`make test-vllm` makes the overlay of 0.33")
    file, out = tmp_path / "served.pickle", tmp_path / "found.json"
    file.write_bytes(pickle.dumps(served))
    given = json.dumps({"settings": settings, "batches": batches, **more})
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.pathsep.join([*path, str(HERE.parent.parent)]),  # this checkout, whatever is installed
        SWITCH: str(int(untested)),
    }
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    done = subprocess.run(
        [sys.executable, module.__file__, str(file), given, str(out)],
        capture_output=True,
        text=True,
        env=env,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_those_of_transformers(served, variant, tmp_path) -> None:
    settings, batches, path, untested = VARIANTS[variant]
    found = compare(served, tmp_path, settings, batches, path, untested)
    assert found["same"] == dict.fromkeys((name for names in batches for name in names), True)
    assert found["release"] == ([0, 33] if "0.33" in variant else [0, 32])
    assert found["v2"] == ("V2" in variant) and found["dtype"] == "torch.float32"
    if "chunks" in variant:
        assert found["chunks"]["held"] > 0
    if "compiled" in variant:
        # A step that reads prompts runs without compiled code; those that only decode run it.
        assert found["mode"] == CompilationMode.DYNAMO_TRACE_ONCE
        assert found["steps"]["compiled"] >= NEW_TOKENS - 2 and found["steps"]["eager"] > 0


def test_half_precision(served, tmp_path) -> None:
    """In bfloat16, adapters are as near to transformers in float32 as the base model is."""
    names = [BASE, *(name for name in CONFIGS if name not in CHATS)]
    found = compare(served, tmp_path, {**EAGER, "dtype": "bfloat16"}, [], differences=names)
    differences = found["differences"]
    print(differences)
    assert found["dtype"] == "torch.bfloat16"
    assert max(differences.values()) < 2 * differences[BASE]


def test_half_precision_with_defaults(served, tmp_path) -> None:
    """
    Compiled and in chunks, vLLM in bfloat16 is about as far from transformers, in float32 and in bfloat16, as transformers in bfloat16 is
    from itself in float32: what is left is rounding. Slots before the text, slots behind it, and edits.
    """
    names = [BASE, "iapt", "iapt_end", "preft"]
    made, half = served.of_beginnings(names)
    found = compare(made, tmp_path, {**CHUNKS, "dtype": "bfloat16"}, [], firsts=names)
    assert found["dtype"] == "torch.bfloat16" and found["mode"] == CompilationMode.DYNAMO_TRACE_ONCE
    assert found["chunks"]["held"] > 0 and found["chunks"]["cut"] > 0
    for name in names:
        own, exact, rounded = found["firsts"][name], made.firsts[name], half[name]
        print(name, len(own), distance(own, exact), distance(own, rounded), distance(rounded, exact))
        assert max(distance(own, exact), distance(own, rounded)) < 2 * distance(rounded, exact)


def distance(left: list[float], right: list[float]) -> float:
    """The root of the mean square of the differences."""
    return math.dist(left, right) / len(left) ** 0.5


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
        "preft": PreFTConfig(r=8),
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
