# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters' folders that were tampered with, as if they had been saved so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peft_instance_prompt.adapter_files import digest


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def change_config(folder: Path, **fields: Any) -> None:
    """Set fields of a config file."""
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a file with `edit`, which gets a dict of them, and give the config their digest."""
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    change_config(folder, weights_digest=digest(weights))


def picture(model: torch.nn.Module) -> dict[str, Any]:
    """All of a model that loading could change, to be compared with [`assert_unchanged`]."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    modules = {
        name: (
            id(module),
            module.training,
            sorted(vars(module)),
            [[*map(id, getattr(module, kind).values())] for kind in hooks],
            module.active_adapter if hasattr(module, "adapter_layer_names") else None,
        )
        for name, module in model.named_modules()
    }
    configs = {
        name: (id(config), config.to_dict()) for name, config in (getattr(model, "peft_config", None) or {}).items()
    }
    return {
        "modules": modules,
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "adapters": configs,
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def assert_unchanged(model: torch.nn.Module, before: dict[str, Any]) -> None:
    after = picture(model)
    old, new = before["tensors"], after["tensors"]
    assert old.keys() == new.keys()
    assert [name for name in old if not torch.equal(old[name], new[name])] == []
    assert {k: v for k, v in after.items() if k != "tensors"} == {k: v for k, v in before.items() if k != "tensors"}
