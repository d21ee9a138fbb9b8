# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""LPT, late prompt tuning (https://arxiv.org/abs/2210.11292): a layer's states generate a prompt that enters at this layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..checks import check_choice, check_dropout
from ..engine.stack import StackInfo
from ..generator import Instances, Weights
from ..nn.init import fan_in_uniform
from ..nn.pooling import adaptive_avg_pool, adaptive_max_pool, first_token, last_token, rms
from ..registry import register_method
from .late_prompt import LatePromptConfig, LatePromptGenerator


@dataclass
class LPTConfig(LatePromptConfig):
    """Configuration of [`LPTModel`], late prompt tuning (https://arxiv.org/abs/2210.11292).

    The prompt is generated from the states at the input of one layer in the middle of the model, enters there, and stays in the
    residual stream. The layers below run as if there were no prompt, so training builds no autograd graph for them.

    Deviations from the paper: by default the adapter starts as a near no-op, and the generator reads the layer's states divided by
    their root mean square (`init_weights`).

    Args:
        num_virtual_tokens (`int`): The number l of prompt vectors. Defaults to 5, the paper's; with `generator_type="none"`
            the paper has 20.
        bottleneck_dim (`int`): The width m of the generator. Defaults to 128, the paper's.
        generator_type (`str`): `"npg"`, the default: all prompt vectors are generated from the state of one token, the first
            (encoders) or the last of the instruction (causal models). `"appg"` and `"mppg"`: the instruction is cut into l bins,
            and each vector is generated from the average or the maximum of its bin's projected states. `"none"`: learned vectors,
            the same for all instances.
        insertion_layer (`int`, *optional*): The layer k, counted from 0, at whose input the prompt enters. Defaults to half
            the number of layers, as in the paper. With 0, which is prompt tuning, its slots take positions and shift those of
            the tokens; otherwise the tokens keep the positions that they have in the base model.
        dropout (`float`): The rate of the dropout on the generated vectors in training, from 0 to below 1. Defaults to
            0.1, the paper's.
        prompt_position (`str`): As for all methods. It must be `"before"` if the prompt is late and the model measures distances
            by column (ALiBi, tables of relative distances).

    All fields of [`BottleneckConfig`] and [`InstancePromptConfig`] but `layers_to_transform` are inherited.
    """

    paper = ("Late Prompt Tuning: A Late Prompt Could Be Better Than Many Prompts", "2210.11292")

    num_virtual_tokens: int = 5
    bottleneck_dim: int = 128
    generator_type: Literal["npg", "appg", "mppg", "none"] = "npg"
    dropout: float = 0.1

    def _check_fields(self) -> None:
        super()._check_fields()
        check_choice(self, "generator_type", ("npg", "appg", "mppg", "none"))
        check_dropout(self)


class LPTGenerator(LatePromptGenerator):
    """Late prompt tuning (https://arxiv.org/abs/2210.11292): a prompt is generated from the states in the middle of the model,
    enters there and stays in the residual stream. Training builds no autograd graph for the layers below.

    With H (n, d) the input of layer k at the instruction's tokens and h one of its rows:

    - `npg`: `p = relu(h W1 + b1) W2 + b2`, reshaped to (l, d); d*m + m + m*l*d + l*d weights;
    - `appg`, `mppg`: `p = relu(pool(H W1 + b1)) W2 + b2`, with `pool` to l vectors; 2*d*m + m + d weights;
    - `none`: `p` itself is learned: l*d weights.

    Attributes:
        down, down_bias (`nn.Parameter`): Shapes (1, d, m) and (1, 1, m): W1, divided by
            `down_factor`, and b1.
        up, up_bias (`nn.Parameter`): Shapes (1, m, l*d) and (1, 1, l*d); of `appg` and `mppg`, d in place of l*d: W2 and b2.
        constant (`nn.Parameter`): With `condition="constant"`, instead of `down`: shape (1, 1, m), of `appg` and `mppg` (1, l, m).
        prompt (`nn.Parameter`): Shape (1, l, d). The only parameter of `none`.
    """

    def __init__(self, config: LPTConfig, info: StackInfo):
        super().__init__(config, info)
        d, m, l = info.hidden_size, config.bottleneck_dim, config.num_virtual_tokens
        self.width = d
        self.kind = config.generator_type
        self.down_factor = config.factor_of(d)
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
            self.down = fan_in_uniform(1, d, m, factor=self.down_factor)
            self.down_bias = fan_in_uniform(1, 1, m, fan_in=d)
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
        # With `mppg` each feature may have its maximum at a different token of the bin, so all tokens of a bin count.
        return adaptive_avg_pool(one_hot, instances.mask, self.num_slots)  # (G, l, n)

    def _pool(self, instances: Instances, weights: Weights) -> torch.Tensor:
        """The projected states of one token (G, 1, m), or all pooled to l vectors (G, l, m)."""
        states, mask = instances.states, instances.mask
        if self.kind == "npg":
            states = self._choose(states, mask)  # (G, 1, d)
        # Residual streams hold huge activations.
        states = states if self.paper else states / rms(states)
        down = weights["down"] * self.down_factor  # (d, m) or (G, d, m)
        projected = states.to(down.dtype) @ down + weights["down_bias"]  # (G, 1 or n, m)
        if self.kind == "npg":
            return projected
        return (adaptive_avg_pool if self.kind == "appg" else adaptive_max_pool)(
            projected, mask, self.num_slots
        )  # (G, l, m)

    def _choose(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The state (G, 1, w) of one token: of the last in a causal model, of the first in an encoder."""
        return (last_token if self.causal else first_token)(states, mask)[:, None]


LPTModel = register_method("lpt", LPTConfig, LPTGenerator)
