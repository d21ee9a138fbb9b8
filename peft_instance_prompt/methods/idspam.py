# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""ID-SPAM (https://arxiv.org/abs/2506.05629): self-attention over the token embeddings generates a prompt that enters at one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from ..checks import check_dropout, check_int
from ..engine.stack import StackInfo
from ..generator import Instances, Source, Weights
from ..nn.init import fan_in_uniform
from ..nn.pooling import mean_attention, rms_norm
from ..registry import register_method
from .late_prompt import LatePromptConfig, LatePromptGenerator


@dataclass
class IDSPAMConfig(LatePromptConfig):
    """Configuration of [`IDSPAMModel`], input-dependent soft prompting with self-attention (ACL 2025,
    https://arxiv.org/abs/2506.05629).

    One head of self-attention runs over the token embeddings E of the instance; a bottleneck turns the mean A of its outputs into
    `num_virtual_tokens` prompt vectors. These enter at the input of one layer in the middle of the model and stay in the residual
    stream. The layers below run as if there were no prompt, so training builds no autograd graph for them.

    Deviations from the paper: by default the adapter starts as a near no-op, the embeddings are divided by their root mean
    square, and the vectors have no ReLU of their own, under which they could add to their start state but not subtract from it
    (`init_weights`; `"paper"` has the paper's form).

    Args:
        num_virtual_tokens (`int`): The number l of prompt vectors. Defaults to 10, the paper's.
        attention_dim (`int`, *optional*): The width d_k of queries and keys. Defaults to the width of the embeddings, which
            follows from the paper's parameter counts.
        bottleneck_dim (`int`): The width m of the bottleneck. Defaults to 34, which comes closest to the paper's parameter
            counts; the paper does not give it.
        insertion_layer (`int`, *optional*): The layer k, counted from 0, at whose input the prompt enters. Defaults to half
            the number of layers; the paper finds 11 to 13 of 24 best. With 0 its slots take positions and shift those of the
            tokens; otherwise the tokens keep the positions that they have in the base model.
        dropout (`float`): The rate of the dropout in the bottleneck in training, from 0 to below 1. Defaults to 0.1. The paper
            tunes a dropout of 0.1 to 0.3 and does not say where.
        prompt_position (`str`): As for all methods. It must be `"before"`, the paper's, if the prompt is late and the model
            measures distances by column (ALiBi, tables of relative distances, sliding windows).

    All fields of [`BottleneckConfig`] and [`InstancePromptConfig`] but `layers_to_transform` are inherited.
    """

    paper = ("Leveraging Self-Attention for Input-Dependent Soft Prompting in LLMs", "2506.05629")

    num_virtual_tokens: int = 10
    attention_dim: Optional[int] = None
    bottleneck_dim: int = 34
    dropout: float = 0.1

    def _check_fields(self) -> None:
        super()._check_fields()
        check_int(self, "attention_dim", minimum=1, optional=True)
        check_dropout(self)


class TokenAttention(nn.Module):
    """The mean over the tokens of one head of self-attention, Eq. 1 of the paper.

    Attributes:
        query, key, value (`nn.Parameter`): Shapes (e, d_k), (e, d_k) and (e, e): W_Q, W_K and W_V.
    """

    def __init__(self, width: int, attention_dim: int):
        super().__init__()
        self.query, self.key = fan_in_uniform(width, attention_dim), fan_in_uniform(width, attention_dim)
        self.value = fan_in_uniform(width, width)

    def forward(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """A (G, e), from the embeddings (G, n, e) of the tokens in `mask` (G, n)."""
        embeds = embeds.to(self.query.device, self.query.dtype)
        shares = mean_attention(embeds @ self.query, embeds @ self.key, mask.to(embeds.device))  # (G, n)
        # The mean of the outputs is the sum of the tokens' embeddings in these shares, times W_V: one product and not n.
        kept = embeds.masked_fill(~mask.to(embeds.device)[..., None], 0.0)  # (G, n, e)
        return (shares[:, None] @ kept @ self.value)[:, 0]  # (G, e)


class IDSPAMGenerator(LatePromptGenerator):
    """ID-SPAM (ACL 2025, https://arxiv.org/abs/2506.05629): one head of self-attention over the token embeddings of the
    instance, averaged over the tokens, and a bottleneck generate a prompt that enters at one layer and stays in the residual stream.

    With E (n, e) the token embeddings of the instance:

    - `A = mean over tokens of softmax(E W_Q (E W_K)^T / sqrt(d_k)) E W_V`, (e,), the paper's Eq. 1;
    - `p = relu(relu(A W_down + b_down) W_up + b_up)`, reshaped to (l, d), its Eq. 2. Only `init_weights="paper"` has the outer relu.

    It has `2 e d_k + e^2` weights in its attention and `e m + m + m l d + l d` in its bottleneck.

    Attributes:
        attention (`TokenAttention`): W_Q, W_K and W_V.
        down, down_bias (`nn.Parameter`): Shapes (1, e, m) and (1, 1, m): W_down, divided by `down_factor`, and b_down.
        up, up_bias (`nn.Parameter`): Shapes (1, m, l*d) and (1, 1, l*d): W_up and b_up.
        constant (`nn.Parameter`): Shape (1, 1, e). With `condition="constant"`, instead of `attention`: A.
    """

    def __init__(self, config: IDSPAMConfig, info: StackInfo):
        super().__init__(config, info)
        e, m, width = info.embedding_size, config.bottleneck_dim, config.num_virtual_tokens * info.hidden_size
        if self.constant_condition:
            self.constant = nn.Parameter(torch.randn(1, 1, e))
        else:
            self.attention = TokenAttention(e, config.attention_dim or e)
        self.down_factor = config.factor_of(e)
        self.down = fan_in_uniform(1, e, m, factor=self.down_factor)
        self.down_bias = fan_in_uniform(1, 1, m, fan_in=e)
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
        down = weights["down"] * self.down_factor  # (e, m) or (G, e, m)
        u = self.dropout(torch.relu(A.to(down.dtype) @ down + weights["down_bias"]))  # (G, 1, m)
        p = u @ weights["up"] + weights["up_bias"]  # (G, 1, l * d)
        return (torch.relu(p) if self.paper else p).unflatten(-1, (self.num_slots, -1)).flatten(-3, -2)  # (G, l, d)


IDSPAMModel = register_method("idspam", IDSPAMConfig, IDSPAMGenerator)
