# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A plugin for axolotl: `adapter: iapt` trains IAPT, and so on for each method; `instance_prompt:` holds the fields of its config."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import BaseModel
from transformers import PreTrainedModel, set_seed

import peft_instance_prompt


# By the name that the YAML has, such as `iapt`.
METHODS = {
    kind.value.lower(): config
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    if config.__module__.startswith(f"{peft_instance_prompt.__name__}.")
}


class Arguments(BaseModel):
    """The key that the plugin adds to axolotl's YAML."""

    instance_prompt: dict[str, Any] | None = None


class InstancePromptPlugin(BasePlugin):
    """Makes the adapter, or loads the one in `lora_model_dir`; training, saving and resuming are axolotl's."""

    def get_input_args(self) -> str:
        return f"{Arguments.__module__}.{Arguments.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in METHODS]

    def load_adapter(
        self, model: PreTrainedModel, cfg, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if cfg.adapter not in METHODS:
            return None
        if config_only:
            return None, make_config(cfg)
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            if cfg.seed is not None:  # axolotl draws LoRA's first weights by it, too
                set_seed(cfg.seed)
            model = get_peft_model(model, make_config(cfg))
        model.print_trainable_parameters()
        return model, model.active_peft_config


def make_config(cfg) -> PeftConfig:
    """The config of a fresh adapter."""
    return METHODS[cfg.adapter](task_type="CAUSAL_LM", **(cfg.instance_prompt or {}))
