# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Initial values of parameters."""

from __future__ import annotations

import torch
from torch import nn


def slower_down(inner: int, width: int) -> float:
    """The factor of a down-projection from a `width` to an `inner` one with which one learning rate suits it and the projection back."""
    return min(2.4 * inner / width, 1.0)


def fan_in_uniform(*shape: int, fan_in: int | None = None, factor: float = 1.0) -> nn.Parameter:
    """A parameter with the initial distribution of `torch.nn.Linear`: uniform in `+-1 / sqrt(fan_in)`.

    Args:
        shape (`int`): The shape: (..., a, b) for matrices from a to b features.
        fan_in (`int`, *optional*): The number of features that the matrix reads. Defaults to a. Set it for a bias.
        factor (`float`, *optional*): What the values are divided by, since they are multiplied by it when they are read. Defaults to 1.
    """
    bound = (shape[-2] if fan_in is None else fan_in) ** -0.5 / factor
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
