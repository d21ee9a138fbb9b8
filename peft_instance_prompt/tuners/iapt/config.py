# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...checks import check_choice, check_int
from ...config import InstancePromptConfig
from ...nn.rational import FIXED_ACTIVATIONS, GELU_FITS


@dataclass
class IAPTConfig(InstancePromptConfig):
    """Configuration of [`IAPTModel`], instruction-aware prompt tuning (https://arxiv.org/abs/2405.18203).

    At every layer the prompt vectors are generated anew from that layer's own input, over the instruction's tokens:
    down-projection, self-attention pooling to `num_virtual_tokens` vectors, learned activation, up-projection.

    Deviations from the paper: by default the adapter starts as a near no-op (`init_weights`). `bottleneck_dim` and the
    scheme by which layers share their projections could not be recovered from public sources, so they are options with
    defaults of our own.

    Args:
        num_virtual_tokens (`int`): The number of prompt vectors per layer. Defaults to 4, the paper's.
        bottleneck_dim (`int`): The width m of the generator. Defaults to 16. With m = 320, 2 * d * m * L comes to the
            84 M parameters that are reported for LLaMA-2 7B.
        activation (`str`): `"rational"`, the default, has 12 learned coefficients per layer and starts at GELU; or a fixed
            one: `"gelu"`, `"relu"`, `"silu"`, `"tanh"`.
        activation_fit (`str`): Which fit of GELU a rational activation starts from: `"wide"`, the default, is within 4.9e-3
            of it on [-10, 10]; `"tight"` within 1.2e-4 on [-3, 3].
        share_layers (`int`): How many consecutive layers share their two projections; pooling and activation stay each
            layer's own. Defaults to 1: none.

    The fields that all methods have are those of [`InstancePromptConfig`].
    """

    paper = ("IAPT: Instruction-Aware Prompt Tuning for Large Language Models", "2405.18203")

    activation: Literal["rational", "gelu", "relu", "silu", "tanh"] = field(
        default="rational", metadata={"help": "'rational' (learned), or a fixed 'gelu', 'relu', 'silu' or 'tanh'."}
    )
    activation_fit: Literal["wide", "tight"] = field(
        default="wide", metadata={"help": "The fit of GELU that a rational activation starts from."}
    )
    share_layers: int = field(
        default=1, metadata={"help": "How many consecutive layers share their down- and up-projection."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_choice(self, "activation", ("rational", *FIXED_ACTIVATIONS))
        check_choice(self, "activation_fit", tuple(GELU_FITS))
        check_int(self, "share_layers", minimum=1)
