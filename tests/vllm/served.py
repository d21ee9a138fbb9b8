# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters on SmolLM2 whose weights are far from their start, and what transformers answers with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import get_peft_model
from tiny import perturb

from peft_instance_prompt import DynamicPromptConfig, IAPTConfig, IDPGConfig, IPTConfig, LPTConfig
from pypi_assets import asset_folder
from smollm2 import load_smollm2


TEXTS = [
    "The capital of France is",
    "A good way to cook an egg is to",
    "My favourite animal, without any doubt, is the",
    "To be or not to be, that is",
]
NEW_TOKENS = 10
BASE = "base"
EMBEDS = {"instance_source": "embeddings"}
SINGLE = {"multi_layer": False, "bottleneck_dim": 16, "phm_n": 4, "dropout": 0.0}

# What the layers' route serves, and how far the weights are moved: the texts must change and stay text.
CONFIGS = {
    "iapt": (IAPTConfig(), 0.15),
    "iapt_too": (IAPTConfig(), 0.15),
    "iapt_first": (IAPTConfig(prompt_position="after_first", share_layers=3), 0.15),
    "iapt_end": (IAPTConfig(prompt_position="end"), 0.05),
    "iapt_some": (IAPTConfig(layers_to_transform=[3, 7, 20], condition="constant"), 0.15),
    "iapt_template": (IAPTConfig(response_template="chat"), 0.15),
    "idpg": (IDPGConfig(num_virtual_tokens=3, bottleneck_dim=16, phm_n=4, dropout=0.0, **EMBEDS), 0.1),
    "idpg_single": (IDPGConfig(num_virtual_tokens=3, **SINGLE, **EMBEDS), 0.1),
    "ipt": (IPTConfig(num_virtual_tokens=9, table_rank=4), 0.5),
    "ipt_encoder": (
        IPTConfig(num_virtual_tokens=4, strategy="encoder", table_rank=4, bottleneck_dim=8, dropout=0.0),
        0.1,
    ),
    "ipt_deep": (
        IPTConfig(num_virtual_tokens=4, strategy="encoder", host="deep", bottleneck_dim=8, dropout=0.0, table_rank=4),
        0.1,
    ),
    "dynamic": (
        DynamicPromptConfig(num_virtual_tokens=6, length="instance", representation="instance", **EMBEDS),
        0.5,
    ),
}
# What it does not.
OTHERS = {
    "lpt": (LPTConfig(), 0.1),
    "idpg_frozen": (IDPGConfig(num_virtual_tokens=3, **SINGLE), 0.1),
    "dynamic_frozen": (DynamicPromptConfig(num_virtual_tokens=6), 0.5),
    "idpg_frozen_deep": (IDPGConfig(num_virtual_tokens=3, bottleneck_dim=16, phm_n=4), 0.1),
}


@dataclass
class Served:
    """Attributes:
    base (`Path`): The base model's folder.
    folders (`dict[str, Path]`): The adapters' folders, by name.
    answers (`dict[str, list[list[int]]]`): By name, the greedy continuation of each text; of the base model under `BASE`.
    """

    base: Path
    folders: dict[str, Path] = field(default_factory=dict)
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)

    @classmethod
    def make(cls, folder: Path) -> Served:
        base, tokenizer = load_smollm2()
        made = cls(asset_folder("smollm2-135m-instruct"))
        made.prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
        made.chats = [chat_ids(tokenizer, text) for text in TEXTS]
        made.tokenizer = tokenizer
        made.answers[BASE] = [continuation(base, ids) for ids in made.prompts]
        made.answers["chat"] = [continuation(base, ids) for ids in made.chats]
        for seed, (name, (config, scale)) in enumerate({**CONFIGS, **OTHERS}.items()):
            torch.manual_seed(seed)
            config.task_type = "CAUSAL_LM"
            model = perturb(get_peft_model(base, config), seed, scale=scale).eval()
            prompts = made.chats if config.response_template else made.prompts
            made.answers[name] = [continuation(model, ids) for ids in prompts]
            model.save_pretrained(folder / name)
            made.folders[name] = folder / name
            base = model.unload()
        return made

    def prompts_of(self, name: str) -> list[list[int]]:
        return self.chats if name in ("iapt_template", "chat") else self.prompts


def chat_ids(tokenizer, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


@torch.no_grad()
def continuation(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """The greedy continuation of a prompt."""
    out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, len(ids) :].tolist()
