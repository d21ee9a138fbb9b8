# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from ...checks import check_dropout, check_int
from ..late_prompt import LatePromptConfig


@dataclass
class IDSPAMConfig(LatePromptConfig):
    """Configuration of [`IDSPAMModel`], input-dependent soft prompting with self-attention (ACL 2025,
    https://arxiv.org/abs/2506.05629).

    One head of self-attention runs over the token embeddings E of the instance; the mean A of its outputs goes through a
    bottleneck to `num_virtual_tokens` prompt vectors. These enter at the input of one layer in the middle of the model and stay
    in the stream. The layers below run as if there were no prompt, so that training builds no autograd graph for them.

    Deviations from the paper: by default the adapter starts as a near no-op, the embeddings are divided by their root mean
    square, and the vectors have no ReLU of their own, which would let them add to the state that they start from but not take
    from it (`init_weights`; `"paper"` has the paper's form).

    Args:
        num_virtual_tokens (`int`): The number l of prompt vectors. Defaults to 10, the paper's.
        attention_dim (`int`, *optional*): The width d_k of queries and keys. Defaults to the width of the embeddings, which is
            what the paper's parameter counts say.
        bottleneck_dim (`int`): The width m of the bottleneck. The paper does not give it; the default of 34 comes closest to its
            parameter counts.
        insertion_layer (`int`, *optional*): The layer k, counted from 0, at whose input the prompt enters. Defaults to half
            the number of layers; the paper finds 11 to 13 of 24 best. With 0 it enters at the first layer: then its positions
            are counted and the tokens' move; otherwise the tokens keep the positions of the base model.
        dropout (`float`): The rate of the dropout in the bottleneck in training, from 0 to below 1. The paper tunes a rate of
            0.1 to 0.3 without saying of what. Defaults to 0.1.
        prompt_position (`str`): As for all methods. Where a model reads distances off the columns of its input (ALiBi, tables of
            relative distances, sliding windows) and the prompt is late, it must be `"before"`, the paper's.

    The fields that all methods have are those of [`InstancePromptConfig`]; `layers_to_transform` is not one of them.
    """

    paper = ("Leveraging Self-Attention for Input-Dependent Soft Prompting in LLMs", "2506.05629")

    num_virtual_tokens: int = field(default=10, metadata={"help": "The number of prompt vectors per instance."})
    attention_dim: Optional[int] = field(
        default=None, metadata={"help": "The width of queries and keys; None: that of the embeddings."}
    )
    bottleneck_dim: int = field(default=34, metadata={"help": "The width of the generator's bottleneck."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout in the bottleneck, in training only."})

    def __post_init__(self):
        super().__post_init__()
        if self.attention_dim is not None:
            check_int(self, "attention_dim", minimum=1)
        check_dropout(self)
