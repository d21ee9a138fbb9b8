# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ...generator import Instances, Weights
from ...nn.init import fan_in_uniform
from ...nn.pooling import adaptive_avg_pool, adaptive_max_pool, first_token, last_token, rms
from ..late_prompt import LatePromptGenerator


if TYPE_CHECKING:
    from ...engine.stack import StackInfo
    from .config import LPTConfig


class LPTGenerator(LatePromptGenerator):
    """The generator of late prompt tuning (https://arxiv.org/abs/2210.11292).

    With H (n, d) the input of layer k at the instruction's tokens and h one of its rows:

    - `npg`: `p = relu(h W1 + b1) W2 + b2`, reshaped to (l, d); d*m + m + m*l*d + l*d weights;
    - `appg`, `mppg`: `p = relu(pool(H W1 + b1)) W2 + b2`, with `pool` to l vectors; 2*d*m + m + d weights;
    - `none`: `p` itself is learned; l*d weights.

    Attributes:
        down, down_bias (`nn.Parameter`): Shapes (1, d, m) and (1, 1, m): W1 and b1.
        up, up_bias (`nn.Parameter`): Shapes (1, m, l*d) and (1, 1, l*d); of `appg` and `mppg`, d in place of l*d: W2 and b2.
        constant (`nn.Parameter`): With `condition="constant"`, in place of `down`: shape (1, 1, m), or (1, l, m).
        prompt (`nn.Parameter`): Shape (1, l, d). Of `none`, and nothing else.
    """

    def __init__(self, config: LPTConfig, info: StackInfo):
        super().__init__(config, info)
        d, m, l = info.hidden_size, config.bottleneck_dim, config.num_virtual_tokens
        self.width = d
        self.kind = config.generator_type
        self.dropout = nn.Dropout(config.dropout)
        if self.kind == "none":
            # The paper's released code has an embedding table, which starts as N(0, 1).
            self.prompt = nn.Parameter(torch.randn(1, l, d))
            self.zero_at_start(self.prompt)
            return
        width = l * d if self.kind == "npg" else d
        self.up, self.up_bias = fan_in_uniform(1, m, width), fan_in_uniform(1, 1, width, fan_in=m)
        if self.constant_condition:
            self.constant = nn.Parameter(torch.randn(1, 1 if self.kind == "npg" else l, m))
        else:
            self.down, self.down_bias = fan_in_uniform(1, d, m), fan_in_uniform(1, 1, m, fan_in=d)
        self.zero_at_start(self.up, self.up_bias)

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        G, l = len(instances.mask), self.num_slots
        if self.kind == "none":
            prompts = weights["prompt"]  # (l, d) or (G, l, d)
        else:
            pooled = (
                weights["constant"] if self.constant_condition else self._pool(instances, weights)
            )  # (G, 1 or l, m)
            prompts = torch.relu(pooled) @ weights["up"] + weights["up_bias"]  # (G, 1, l * d) or (G, l, d)
        return self.dropout(prompts.reshape(-1, l, self.width).expand(G, -1, -1))  # (G, l, d)

    def token_weights(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor | None:
        if self.kind == "none" or self.constant_condition:
            return None
        G, n = instances.mask.shape
        one_hot = torch.eye(n, device=instances.mask.device).expand(G, -1, -1)  # (G, n, n)
        if self.kind == "npg":
            return self._choose(one_hot, instances.mask).expand(-1, self.num_slots, -1)  # (G, l, n)
        # Of `mppg`, each feature has its maximum at another token of the bin, so the whole bins are shown.
        return adaptive_avg_pool(one_hot, instances.mask, self.num_slots)  # (G, l, n)

    def _pool(self, instances: Instances, weights: Weights) -> torch.Tensor:
        """The projected states of one token (G, 1, m), or all pooled to l vectors (G, l, m)."""
        states, mask = instances.states, instances.mask
        if self.kind == "npg":
            states = self._choose(states, mask)  # (G, 1, d)
        # Residual streams hold huge activations.
        states = states if self.paper else states / rms(states)
        projected = states.to(weights["down"].dtype) @ weights["down"] + weights["down_bias"]  # (G, 1 or n, m)
        if self.kind == "npg":
            return projected
        return (adaptive_avg_pool if self.kind == "appg" else adaptive_max_pool)(
            projected, mask, self.num_slots
        )  # (G, l, m)

    def _choose(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The state (G, 1, w) of the last instruction token in a causal model, of the first in an encoder."""
        return (last_token if self.causal else first_token)(states, mask)[:, None]
