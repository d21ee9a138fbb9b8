# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Parameters at the start."""

from __future__ import annotations

import torch
from torch import nn


def fan_in_uniform(*shape: int, fan_in: int | None = None) -> nn.Parameter:
    """A parameter that is drawn as `torch.nn.Linear` draws its own: uniform in `+-1 / sqrt(fan_in)`.

    Args:
        shape (`int`): The shape, (..., a, b) for matrices from a to b features.
        fan_in (`int`, *optional*): The number of features that a matrix reads. Defaults to a; a bias needs it.
    """
    bound = (shape[-2] if fan_in is None else fan_in) ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
