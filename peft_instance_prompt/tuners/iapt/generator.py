# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import nn

from ...generator import Instance, PromptGenerator, anchored, names_in
from ...nn.pooling import attention_pool, rms
from ...nn.rational import Rational, get_activation
from ...stack import StackInfo
from .config import IAPTConfig


class IAPTGenerator(PromptGenerator):
    """The generator of IAPT, for all layers (https://arxiv.org/abs/2405.18203).

    With H (n, d) the input of a layer over the instruction's tokens: `z = H W_down`, `A = softmax over tokens (z W_pool)`,
    `p = g(A^T z) W_up`. It has 2*d*m*L weights in its projections, l*m*L in its pools and 12*L in its activations.
    """

    def __init__(self, config: IAPTConfig, info: StackInfo):
        super().__init__(config, info)
        d, m, l = info.hidden_size, config.bottleneck_dim, config.num_virtual_tokens
        self.paper = config.init_weights == "paper"
        self.constant_input = config.condition == "constant"
        own = range(len(self.depths))  # per layer
        shared = range(-(-len(self.depths) // config.share_layers))  # per group of layers
        self.up = nn.ModuleList(nn.Linear(m, d, bias=False) for _ in shared)
        if self.constant_input:
            self.constant = nn.ParameterList(nn.Parameter(torch.randn(l, m)) for _ in own)
        else:
            self.down = nn.ModuleList(nn.Linear(d, m, bias=False) for _ in shared)
            self.pool = nn.ModuleList(nn.Linear(m, l, bias=False) for _ in own)
        rational = config.activation == "rational"
        self.activation = nn.ModuleList(
            Rational(config.activation_fit) if rational else get_activation(config.activation) for _ in own
        )
        if config.init_weights is True:
            for up in self.up:
                nn.init.zeros_(up.weight)

    def _numbers(self, depth: int) -> tuple[int, int]:
        """Which of the modules per layer, and which of those per group, serve a depth."""
        own = self.depths.index(depth)
        return own, own // self.config.share_layers

    def parameters_at(self, depth: int) -> list[str]:
        own, shared = self._numbers(depth)
        names = names_in(self, f"up.{shared}", f"activation.{own}")
        if self.constant_input:
            return [*names, f"constant.{own}"]
        return names + names_in(self, f"down.{shared}", f"pool.{own}")

    def _bottleneck(self, states: torch.Tensor, shared: int) -> torch.Tensor:
        dtype = self.up[shared].weight.dtype
        z = self.down[shared](states.to(dtype))  # (B, N, m)
        # Residual streams hold huge activations. Dividing behind the projection saves a copy of the states.
        return z if self.paper else z / rms(states).to(dtype)

    def reads(self, states: torch.Tensor, instance: Instance, depth: int) -> torch.Tensor | None:
        if self.constant_input:
            return None
        own, shared = self._numbers(depth)
        scores = self.pool[own](self._bottleneck(states, shared))  # (B, N, l)
        one_hot = torch.eye(states.shape[1], device=states.device).expand(states.shape[0], -1, -1)  # (B, N, N)
        return attention_pool(one_hot, scores, instance.mask)  # (B, l, N)

    def forward(self, states: torch.Tensor, instance: Instance, depth: int) -> torch.Tensor:
        own, shared = self._numbers(depth)
        if self.constant_input:
            pooled = self.constant[own].expand(states.shape[0], -1, -1)  # (B, l, m)
        else:
            z = self._bottleneck(states, shared)  # (B, N, m)
            pooled = attention_pool(z, self.pool[own](z), instance.mask)  # (B, l, m)
        generated = self.up[shared](self.activation[own](pooled))  # (B, l, d)
        return generated if self.paper else anchored(generated, states, self.anchor_index(instance))
