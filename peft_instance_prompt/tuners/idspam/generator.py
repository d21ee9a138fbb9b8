# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ...generator import Instances, Source, Weights
from ...nn.init import fan_in_uniform
from ...nn.pooling import mean_attention, rms_norm
from ..late_prompt import LatePromptGenerator


if TYPE_CHECKING:
    from ...engine.stack import StackInfo
    from .config import IDSPAMConfig


class TokenAttention(nn.Module):
    """The mean over the tokens of one head of self-attention, equation 1 of the paper.

    Attributes:
        query, key, value (`nn.Parameter`): Shapes (e, d_k), (e, d_k) and (e, e): W_Q, W_K and W_V.
    """

    def __init__(self, width: int, attention_dim: int):
        super().__init__()
        self.query, self.key = fan_in_uniform(width, attention_dim), fan_in_uniform(width, attention_dim)
        self.value = fan_in_uniform(width, width)

    def forward(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A (G, e) of the embeddings (G, n, e), of which those count that `mask` (G, n) shows."""
        embeds = embeds.to(self.query.device, self.query.dtype)
        shares = mean_attention(embeds @ self.query, embeds @ self.key, mask.to(embeds.device))  # (G, n)
        # The mean of the outputs is the mean of the tokens in these shares, so W_V multiplies one vector and not n.
        kept = embeds.masked_fill(~mask.to(embeds.device)[..., None], 0.0)  # (G, n, e)
        return (shares[:, None] @ kept @ self.value)[:, 0]  # (G, e)


class IDSPAMGenerator(LatePromptGenerator):
    """The generator of ID-SPAM (https://arxiv.org/abs/2506.05629).

    With E (n, e) the token embeddings of the instance, equations 1 and 2 of the paper:

    - `A = mean over tokens of softmax(E W_Q (E W_K)^T / sqrt(d_k)) E W_V`, (e,);
    - `p = relu(relu(A W_down + b_down) W_up + b_up)`, reshaped to (l, d). The outer relu is there with `init_weights="paper"`.

    It has `2 e d_k + e^2` weights in its attention and `e m + m + m l d + l d` in its bottleneck.

    Attributes:
        attention (`TokenAttention`): W_Q, W_K and W_V.
        down, down_bias (`nn.Parameter`): Shapes (1, e, m) and (1, 1, m): W_down and b_down.
        up, up_bias (`nn.Parameter`): Shapes (1, m, l*d) and (1, 1, l*d): W_up and b_up.
        constant (`nn.Parameter`): Shape (1, 1, e). With `condition="constant"`, in place of `attention`: A.
    """

    def __init__(self, config: IDSPAMConfig, info: StackInfo):
        super().__init__(config, info)
        e, m, width = info.embedding_size, config.bottleneck_dim, config.num_virtual_tokens * info.hidden_size
        if self.constant_condition:
            self.constant = nn.Parameter(torch.randn(1, 1, e))
        else:
            self.attention = TokenAttention(e, config.attention_dim or e)
        self.down, self.down_bias = fan_in_uniform(1, e, m), fan_in_uniform(1, 1, m, fan_in=e)
        self.up, self.up_bias = fan_in_uniform(1, m, width), fan_in_uniform(1, 1, width, fan_in=m)
        self.dropout = nn.Dropout(config.dropout)
        self.zero_at_start(self.up, self.up_bias)

    def encode(self, source: Source) -> torch.Tensor | None:
        if self.constant_condition:
            return None
        embeds = source.embeds.detach()  # (G, n, e)
        return self.attention(embeds if self.paper else rms_norm(embeds), source.mask)  # (G, e)

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        A = weights["constant"] if self.constant_condition else instances.vector[:, None]  # (G, 1, e) or (1, e)
        u = self.dropout(torch.relu(A.to(weights["down"].dtype) @ weights["down"] + weights["down_bias"]))  # (G, 1, m)
        p = u @ weights["up"] + weights["up_bias"]  # (G, 1, l * d)
        return (torch.relu(p) if self.paper else p).unflatten(-1, (self.num_slots, -1)).flatten(-3, -2)  # (G, l, d)
