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

from peft_instance_prompt.saving import digest


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
    change_config(folder, weights_sha256=digest(weights))
