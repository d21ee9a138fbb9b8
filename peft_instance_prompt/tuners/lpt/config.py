# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...checks import check_choice, check_dropout
from ..late_prompt import LatePromptConfig


@dataclass
class LPTConfig(LatePromptConfig):
    """Configuration of [`LPTModel`], late prompt tuning (https://arxiv.org/abs/2210.11292).

    The prompt enters at the input of one layer in the middle of the model and stays in the stream from there on. The layers
    below run as if there were no prompt, so that training builds no autograd graph for them.

    Deviations from the paper: by default the adapter starts as a near no-op and the generator reads the layer's states
    divided by their root mean square (`init_weights`).

    Args:
        num_virtual_tokens (`int`): The number of prompt vectors. Defaults to 5, the paper's; for `generator_type="none"`
            the paper has 20.
        bottleneck_dim (`int`): The width m of the generator. Defaults to 128, the paper's.
        generator_type (`str`): `"npg"`, the default, makes all prompt vectors from the state of the first token (encoders)
            or of the last instruction token (causal models); `"appg"` and `"mppg"` make each from the average or the
            maximum of the projected states over its part of the instruction; `"none"` has learned vectors that are the same
            for all instances.
        insertion_layer (`int`, *optional*): The layer k, counted from 0, at whose input the prompt enters. Defaults to half
            the number of layers, as in the paper. With 0 it enters at the first layer, which is prompt tuning: then its
            positions are counted and the tokens' move; otherwise the tokens keep the positions of the base model.
        dropout (`float`): The rate of the dropout on the generated vectors in training, from 0 to below 1. Defaults to
            0.1, the paper's.
        prompt_position (`str`): As for all methods. Where a model reads distances off the columns of its input (ALiBi, tables of
            relative distances) and the prompt is late, it must be `"before"`.

    The fields that all methods have are those of [`InstancePromptConfig`]; `layers_to_transform` is not one of them.
    """

    paper = ("Late Prompt Tuning: A Late Prompt Could Be Better Than Many Prompts", "2210.11292")

    num_virtual_tokens: int = field(default=5, metadata={"help": "The number of prompt vectors per instance."})
    bottleneck_dim: int = field(default=128, metadata={"help": "The width of the generator's bottleneck."})
    generator_type: Literal["npg", "appg", "mppg", "none"] = field(
        default="npg", metadata={"help": "'npg' (one token's state), 'appg', 'mppg' (pooled states), or 'none'."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Dropout on the generated vectors in training."})

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "generator_type", ("npg", "appg", "mppg", "none"))
        check_dropout(self)
