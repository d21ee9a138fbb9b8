# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import nn

from ...generator import Instance, PromptGenerator, anchored
from ...nn.pooling import adaptive_avg_pool, adaptive_max_pool, first_token, last_token, rms
from ...stack import StackInfo
from .config import LPTConfig


def insertion_layer(config: LPTConfig, info: StackInfo) -> int:
    """The layer at which the prompt enters; by default the middle."""
    return info.num_layers // 2 if config.insertion_layer is None else config.insertion_layer


class LPTGenerator(PromptGenerator):
    """The generator of late prompt tuning (https://arxiv.org/abs/2210.11292).

    With H (n, d) the input of layer k over the instruction's tokens and h one of its rows:

    - `npg`: `p = relu(h W1 + b1) W2 + b2`, reshaped to (l, d); d*m + m + m*l*d + l*d weights;
    - `appg`, `mppg`: `p = relu(pool(H W1 + b1)) W2 + b2`, with `pool` to l vectors; 2*d*m + m + d weights;
    - `none`: `p` itself is learned; l*d weights.
    """

    def __init__(self, config: LPTConfig, info: StackInfo):
        super().__init__(config, info)
        d, m, l = info.hidden_size, config.bottleneck_dim, config.num_virtual_tokens
        self.visible_from = insertion_layer(config, info)
        self.depths = (self.visible_from,)
        self.kind = config.generator_type
        self.paper = config.init_weights == "paper"
        self.constant_input = config.condition == "constant"
        self.dropout = nn.Dropout(config.dropout)
        if self.kind == "none":
            # The paper's released code has an embedding table, which starts as N(0, 1).
            self.prompt = nn.Parameter(torch.randn(l, d))
            last = [self.prompt]
        else:
            self.up = nn.Linear(m, l * d if self.kind == "npg" else d)
            last = list(self.up.parameters())
            if self.constant_input:
                self.constant = nn.Parameter(torch.randn(m) if self.kind == "npg" else torch.randn(l, m))
            else:
                self.down = nn.Linear(d, m)
        if config.init_weights is True:
            for weight in last:
                nn.init.zeros_(weight)

    @classmethod
    def check(cls, config: LPTConfig, info: StackInfo) -> None:
        if config.insertion_layer is not None and config.insertion_layer >= info.num_layers:
            raise ValueError(
                f"`insertion_layer` must lie in 0..{info.num_layers - 1} for {info.layers_name!r}, got "
                f"{config.insertion_layer}."
            )
        start = insertion_layer(config, info)
        if below := [number for number in info.recurrent_layers if number < start]:
            raise ValueError(
                f"Late prompts cannot be hidden from the layers {below} of {info.layers_name!r}, which have a state and no "
                f"attention: choose an `insertion_layer` that is not above them, got {start}, or another method."
            )

    def forward(self, states: torch.Tensor, instance: Instance, depth: int) -> torch.Tensor:
        generated = self.dropout(self._generate(states, instance))  # (B, l, d)
        return generated if self.paper else anchored(generated, states, self.anchor_index(instance))

    def reads(self, states: torch.Tensor, instance: Instance, depth: int) -> torch.Tensor | None:
        if self.kind == "none" or self.constant_input:
            return None
        one_hot = torch.eye(states.shape[1], device=states.device).expand(states.shape[0], -1, -1)  # (B, N, N)
        if self.kind == "npg":
            chosen = (last_token if self.causal else first_token)(one_hot, instance.mask)  # (B, N)
            return chosen[:, None].expand(-1, self.num_slots, -1)  # (B, l, N)
        # Which token of its bin a maximum is taken from differs between features: the bins are shown.
        return adaptive_avg_pool(one_hot, instance.mask, self.num_slots)  # (B, l, N)

    def _generate(self, states: torch.Tensor, instance: Instance) -> torch.Tensor:
        B, l = states.shape[0], self.num_slots
        if self.kind == "none":
            return self.prompt.expand(B, -1, -1)  # (B, l, d)
        if self.constant_input:
            pooled = self.constant.expand(B, *self.constant.shape)  # (B, m) or (B, l, m)
        elif self.kind == "npg":
            chosen = (last_token if self.causal else first_token)(states, instance.mask)  # (B, d)
            pooled = self._project(chosen)  # (B, m)
        else:
            pool = adaptive_avg_pool if self.kind == "appg" else adaptive_max_pool
            pooled = pool(self._project(states), instance.mask, l)  # (B, l, m)
        return self.up(torch.relu(pooled)).view(B, l, -1)  # (B, l, d)

    def _project(self, states: torch.Tensor) -> torch.Tensor:
        """The down-projection, (..., d) to (..., m)."""
        # Residual streams hold huge activations.
        states = states if self.paper else states / rms(states)
        return self.down(states.to(self.down.weight.dtype))
