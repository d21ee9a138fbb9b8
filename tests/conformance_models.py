# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the checks of conformance share: models with a method's adapter or LoRA, their logits and texts, comparisons."""

from __future__ import annotations

import torch
from methods import METHODS
from peft import LoraConfig, PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from tiny import adapted, batch, causal_lm, perturb


GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
LENGTHS = (9, 6, 4)
NAMES = ["b", "__base__", "default"]
NO_CACHE = {"use_cache": False}


def config(method: str, task_type: str = "CAUSAL_LM", base: torch.nn.Module | None = None, **fields):
    if method != "lora":
        return METHODS[method](task_type=task_type, **fields)
    # Where LoRA is most at home: PEFT's own choice for the model, else the attention's queries and values.
    model_type = "llama" if base is None else base.config.model_type
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if targets is None:
        ends = {name.rpartition(".")[2] for name, _ in base.named_modules()}
        usual = [name for name in ("q_proj", "v_proj", "query", "value", "q", "v", "Wqkv") if name in ends]
        targets = usual
    return LoraConfig(task_type=task_type, r=4, target_modules=targets, **fields)


def prompted(method: str, base: torch.nn.Module | None = None, task_type: str = "CAUSAL_LM", **fields) -> PeftModel:
    return adapted(causal_lm() if base is None else base, config(method, task_type, base, **fields))


def of_several(method: str, base: torch.nn.Module | None = None, task_type: str = "CAUSAL_LM") -> PeftModel:
    model = prompted(method, base, task_type)
    model.add_adapter("b", config(method, task_type, model.get_base_model()))
    return perturb(model, seed=1, adapter="b").eval()


def must(condition: bool, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


@torch.no_grad()
def logits(model: torch.nn.Module, side: str = "left", **kwargs) -> torch.Tensor:
    return model(**batch(*LENGTHS, side=side), **kwargs).logits


def text(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    return model.generate(**batch(*LENGTHS), **{**GREEDY, **kwargs})
