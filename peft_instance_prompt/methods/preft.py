# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""PreFT (https://arxiv.org/abs/2605.14217): edits of the instruction's own states at prefill, and of nothing afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checks import check_choice, check_int
from ..config import InstanceConfig
from ..engine.stack import StackInfo
from ..generator import EditGenerator, Instances, Weights
from ..registry import register_method


@dataclass
class PreFTConfig(InstanceConfig):
    """Configuration of [`PreFTModel`], fine-tuning of the prefill only (https://arxiv.org/abs/2605.14217).

    At each layer's input, a low-rank edit is added to the states of the instruction's tokens. There are no slots: nothing is inserted,
    and positions and masks are the base model's. Keys and values of the edited tokens are in the KV cache, so that decoding costs what it
    costs without an adapter. In a chat every turn is edited but the answers, see `response_end`.

    Deviation from the paper, which applies LoRA or ReFT to the prefill's tokens: the edit is one product of two matrices with a bias
    between them, without an orthonormal projection.

    Args:
        r (`int`): The rank of the edit, at least 1 and at most the width of the layers. Defaults to 16, which has as many weights as
            LoRA of rank 8 on queries and values that are as wide as the layers.
        init_weights (`bool`): `True`, the default, starts as a no-op: up-projection and bias are zero. `False` starts from random weights
            (used by tests).

    All fields of [`InstanceConfig`] are inherited.
    """

    paper = ("PreFT: Prefill-only finetuning for efficient inference", "2605.14217")
    sized_by = ("r",)

    r: int = 16
    init_weights: bool = True

    def _check_fields(self) -> None:
        super()._check_fields()
        check_int(self, "r", minimum=1)
        check_choice(self, "init_weights", (True, False))


class PreFTGenerator(EditGenerator):
    """PreFT (https://arxiv.org/abs/2605.14217): low-rank edits of the instruction's own states at each layer's input. Prefill
    computes them; decoding is the base model's.

    With h (d,) the state of an instruction token at a layer's input: `h + (h W_down + b) W_up`. It has `2 d r L + r L` weights.

    Attributes:
        down, up (`nn.Parameter`): Shapes (L, d, r) and (L, r, d).
        bias (`nn.Parameter`): Shape (L, 1, r).
    """

    def __init__(self, config: Any, info: StackInfo):
        super().__init__(config, info)
        L, d, r = len(self.depths), info.hidden_size, config.r
        self.down = nn.Parameter(torch.randn(L, d, r) / d**0.5)
        self.bias = nn.Parameter(torch.randn(L, 1, r))
        self.up = nn.Parameter(torch.randn(L, r, d) / r**0.5)
        self.zero_at_start(self.up, self.bias)

    @classmethod
    def check(cls, config: Any, info: StackInfo) -> None:
        """Raise a ValueError if the rank is above the width of the layers."""
        if config.r > info.hidden_size:
            raise ValueError(
                f"`r` must be at most {info.hidden_size}, the width of the layers of {info.layers_name!r}, got {config.r}: a higher "
                "rank adds nothing."
            )

    def edit(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        states = instances.states.to(weights["down"].dtype)  # (G, n, d)
        z = states @ weights["down"] + weights["bias"]  # (G, n, r)
        return z @ weights["up"]  # (G, n, d)


PreFTModel = register_method("preft", PreFTConfig, PreFTGenerator)
