# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A method in one file: the mean of the instruction's states, through a bottleneck, is the prompt of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_instance_prompt import InstancePromptConfig, register_method
from peft_instance_prompt.generator import Instances, PromptGenerator, Weights
from peft_instance_prompt.nn.init import fan_in_uniform
from peft_instance_prompt.nn.pooling import mean_pool, rms_norm


@dataclass
class MeanPromptConfig(InstancePromptConfig):
    """Configuration of [`MeanPromptModel`].

    Args:
        bottleneck_dim (`int`): The width m of the bottleneck. Defaults to 8.
    """

    bottleneck_dim: int = 8


class MeanPromptGenerator(PromptGenerator):
    """`p = tanh(mean(H) W_down) W_up`, reshaped to (l, d), with H (n, d) the states of the instruction's tokens.

    Attributes:
        down, up (`nn.Parameter`): Shapes (D, d, m) and (D, m, l*d), one row for each of D layers.
    """

    def __init__(self, config, info):
        super().__init__(config, info)
        D, d, m = len(self.depths), info.hidden_size, config.bottleneck_dim
        self.down = fan_in_uniform(D, d, m)
        self.up = fan_in_uniform(D, m, self.num_slots * d)
        self.zero_at_start(self.up)

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        mean = mean_pool(instances.states, instances.mask)[:, None]  # (G, 1, d)
        hidden = torch.tanh(rms_norm(mean).to(weights["down"].dtype) @ weights["down"])  # (G, 1, m)
        prompts = hidden @ weights["up"]  # (G, 1, l * d)
        return prompts.reshape(len(mean), self.num_slots, -1)  # (G, l, d)


MeanPromptModel = register_method("mean_prompt", MeanPromptConfig, MeanPromptGenerator)
