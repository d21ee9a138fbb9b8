# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""What serving_cost.py measures: the methods, the shapes of models, and a model with an adapter for each tenant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from many_adapters import _share_weights
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_instance_prompt import (
    DynamicPromptConfig,
    IAPTConfig,
    IDPGConfig,
    IDSPAMConfig,
    IPTConfig,
    LPTConfig,
    PreFTConfig,
)


# The loader of the model.
sys.path.append(str(Path(__file__).resolve().parent.parent / "realdata"))

from smollm2 import load_smollm2


CAUSAL = {"task_type": "CAUSAL_LM"}
METHODS: dict[str, Callable[[], PeftConfig] | None] = {
    "bare": None,
    "lora-r16": lambda: LoraConfig(**CAUSAL, r=16, target_modules="all-linear"),
    "lora-r16-qv": lambda: LoraConfig(**CAUSAL, r=16, target_modules=["q_proj", "v_proj"]),
    "prompt-tuning": lambda: PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "prefix-tuning": lambda: PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "iapt": lambda: IAPTConfig(**CAUSAL),
    "m-idpg": lambda: IDPGConfig.preset("m-phm", **CAUSAL),
    "s-idpg": lambda: IDPGConfig.preset("s-phm", **CAUSAL),
    "ipt": lambda: IPTConfig(**CAUSAL),
    "dp": lambda: DynamicPromptConfig(**CAUSAL),
    "lpt": lambda: LPTConfig(**CAUSAL),
    "idspam": lambda: IDSPAMConfig(**CAUSAL),
    "preft": lambda: PreFTConfig(**CAUSAL),
}
ONE_TENANT = ("prompt-tuning", "prefix-tuning")  # PEFT's prompt methods take no `adapter_names`
SHAPES: dict[str, dict] = {
    "llama-3.1-8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192},
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 2048},
    },
}


def load(args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    if args.shape:
        with torch.device(args.device):
            model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[args.shape]), dtype=getattr(torch, args.dtype))
        model.name_or_path = args.shape
    elif args.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    else:
        model = load_smollm2()[0].to(getattr(torch, args.dtype))
    return model.to(args.device).eval().requires_grad_(False)


def adapted(base: torch.nn.Module, name: str, tenants: int, rows: int) -> tuple[torch.nn.Module, dict]:
    """A model on the base's weights with an adapter for each tenant, and what to pass to each call."""
    model = _share_weights(base)
    if METHODS[name] is None:
        return model, {}
    model = get_peft_model(model, METHODS[name](), adapter_name="tenant0").eval()
    for number in range(1, tenants):
        model.add_adapter(f"tenant{number}", METHODS[name]())
    names = (
        {} if tenants == 1 else {"adapter_names": [f"tenant{row * tenants // rows % tenants}" for row in range(rows)]}
    )
    return model, names


def size_of(model: torch.nn.Module, name: str) -> dict:
    """What one tenant adds: bytes of its adapter, and its slots in the cache of each row."""
    if METHODS[name] is None:
        return {"adapter_bytes": 0, "slots": 0}
    model.set_adapter("tenant0")
    config = model.peft_config["tenant0"]
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"adapter_bytes": trained, "slots": getattr(config, "num_virtual_tokens", 0) or 0}
