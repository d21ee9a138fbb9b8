# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ...generator import Instances, PromptGenerator, Weights
from ...nn.init import fan_in_uniform
from ...nn.pooling import attention_pool, rms
from ...nn.rational import FIXED_ACTIVATIONS, gelu_coefficients, rational


if TYPE_CHECKING:
    from ...engine.stack import StackInfo
    from .config import IAPTConfig


class IAPTGenerator(PromptGenerator):
    """The generator of IAPT, for all layers (https://arxiv.org/abs/2405.18203).

    With H (n, d) the input of a layer at the instruction's tokens: `z = H W_down`, `A = softmax over tokens (z W_pool)`,
    `p = g(A^T z) W_up`. It has 2*d*m*L weights in its projections, l*m*L in its pools and 12*L in its activations.

    Attributes:
        down, up (`nn.Parameter`): Shapes (Lg, d, m) and (Lg, m, d), Lg the number of groups of layers that share them.
        pool (`nn.Parameter`): Shape (L, m, l).
        activation (`nn.Parameter`): Shape (L, 1, 12), the coefficients of [`rational`]. A fixed activation has none.
        constant (`nn.Parameter`): Shape (L, l, m). With `condition="constant"`, in place of `down` and `pool`.
    """

    feeds_constant = False

    def __init__(self, config: IAPTConfig, info: StackInfo):
        super().__init__(config, info)
        d, m, l, L = info.hidden_size, config.bottleneck_dim, config.num_virtual_tokens, len(self.depths)
        groups = -(-L // config.share_layers)  # rounded up
        self.up = fan_in_uniform(groups, m, d)
        if self.constant_condition:
            self.constant = nn.Parameter(torch.randn(L, l, m))
        else:
            self.down = fan_in_uniform(groups, d, m)
            self.pool = fan_in_uniform(L, m, l)
        if config.activation == "rational":
            self.activation = nn.Parameter(gelu_coefficients(config.activation_fit).repeat(L, 1, 1))
        self.zero_at_start(self.up)

    @property
    def activation_coefficients(self) -> nn.Parameter | None:
        return getattr(self, "activation", None)

    def rows_at(self, depth: int) -> dict[str, int]:
        layer = self.depths.index(depth)
        group = layer // self.config.share_layers
        return {name: group if name in ("down", "up") else layer for name, _ in self.named_parameters()}

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        if self.constant_condition:
            pooled = weights["constant"]  # (l, m) or (G, l, m)
        else:
            z = self._project(instances.states, weights)  # (G, n, m)
            pooled = attention_pool(z, z @ weights["pool"], instances.mask)  # (G, l, m)
        if "activation" in weights:
            activated = rational(pooled, weights["activation"])
        else:
            activated = FIXED_ACTIVATIONS[self.config.activation](pooled)
        return activated @ weights["up"]  # (G, l, d)

    def token_weights(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor | None:
        if self.constant_condition:
            return None
        scores = self._project(instances.states, weights) @ weights["pool"]  # (G, n, l)
        G, n = instances.mask.shape
        one_hot = torch.eye(n, device=scores.device).expand(G, -1, -1)  # (G, n, n)
        return attention_pool(one_hot, scores, instances.mask)  # (G, l, n)

    def _project(self, states: torch.Tensor, weights: Weights) -> torch.Tensor:
        """z (G, n, m) of the states (G, n, d)."""
        dtype = weights["down"].dtype
        z = states.to(dtype) @ weights["down"]  # (G, n, m)
        # Residual streams hold huge activations. Division after the projection saves a copy of the states.
        return z if self.paper else z / rms(states).to(dtype)
