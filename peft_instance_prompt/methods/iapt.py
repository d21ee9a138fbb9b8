# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""IAPT (https://arxiv.org/abs/2405.18203): each layer's prompt is generated from that layer's own input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Optional

import torch
from torch import nn

from ..checks import check_choice, check_int
from ..engine.stack import StackInfo
from ..generator import Instances, PromptGenerator, Weights
from ..nn.init import fan_in_uniform
from ..nn.pooling import attention_pool, rms
from ..nn.rational import FIXED_ACTIVATIONS, GELU_FITS, gelu_coefficients, rational
from ..registry import register_method
from .accumulation import AccumulatingConfig
from .bottleneck import BottleneckConfig


@dataclass
class IAPTConfig(BottleneckConfig, AccumulatingConfig):
    """Configuration of [`IAPTModel`], instruction-aware prompt tuning (https://arxiv.org/abs/2405.18203).

    At every layer the prompt vectors are generated anew from that layer's own input at the instruction's tokens:
    down-projection, self-attention pooling to `num_virtual_tokens` vectors, activation, up-projection.

    Deviations from the paper, none of them with `init_weights="paper"`: by default the slots stand behind the instruction in a causal
    language model (`prompt_position`), a prompt vector begins as a copy of a state (`init_weights`), the activation is not learned
    (`activation`), each slot has a learned vector of its own (`slot_vectors`), the prompt vectors are added to the states in the
    slots where these can read the instruction (`accumulate`), and the down-projection moves slower than the other weights
    (`down_factor`). No public source gives `bottleneck_dim` and which layers share their projections, so both are options with
    defaults of our own.

    Args:
        num_virtual_tokens (`int`): The number l of prompt vectors per layer. Defaults to 4, the paper's.
        bottleneck_dim (`int`): The width m of the generator. Defaults to 16. With m = 320, 2 * d * m * L is the 84 M
            parameters that the paper reports for LLaMA-2 7B.
        activation (`str`, *optional*): A fixed one, `"gelu"`, `"relu"`, `"silu"` or `"tanh"`; or the paper's `"rational"`, which
            has 12 learned coefficients per layer, starts as GELU, and trains far worse if these have the learning rate of the other
            weights. Defaults to `"gelu"`, with `init_weights="paper"` to `"rational"`.
        activation_fit (`str`): The fit of GELU that a rational activation starts from: `"wide"`, the default, is within 4.9e-3
            of GELU on [-10, 10]; `"tight"` within 1.2e-4 on [-3, 3].
        share_layers (`int`): The number of consecutive layers that share their two projections; each layer has its own
            pooling and activation. Defaults to 1: no sharing.
        slot_vectors (`bool`, *optional*): Whether each slot has a learned vector, drawn from a standard normal distribution, that
            is added to what it pools. Without it all slots pool nearly the same at the start, get nearly the same gradient, and stay
            alike. Defaults to `True`, with `init_weights="paper"` to `False`.
        prompt_position (`str`, *optional*): Filled in when the adapter is made: in a causal language model `"end"`, where the slots
            read all of the instruction; elsewhere, and with `init_weights="paper"` or `init_text`, `"before"`.
        condition (`str`): As for all methods. With `accumulate`, the slots of the control `"constant"` read the text, too, through the
            model's own attention: it tells what the *generator* gains by reading the instance.

    Raises:
        ValueError: `slot_vectors` is `True` with `init_weights="paper"`.

    All fields of [`BottleneckConfig`], [`AccumulatingConfig`] and [`InstancePromptConfig`] are inherited.
    """

    paper = ("IAPT: Instruction-Aware Prompt Tuning for Large Language Models", "2405.18203")
    old_defaults: ClassVar[dict[int, dict[str, Any]]] = {
        1: {"slot_vectors": False, "activation": "rational", "prompt_position": "before"}
    }

    prompt_position: Optional[Literal["before", "after_first", "end", "before_separator", "after_separator"]] = None
    activation: Optional[Literal["rational", "gelu", "relu", "silu", "tanh"]] = None
    activation_fit: Literal["wide", "tight"] = "wide"
    share_layers: int = 1
    down_factor: Optional[float] = None
    slot_vectors: Optional[bool] = None

    def _fill_in(self) -> None:
        super()._fill_in()
        paper = self.init_weights == "paper"
        if self.slot_vectors is None:
            self.slot_vectors = not paper
        if self.activation is None:
            self.activation = "rational" if paper else "gelu"

    def _check_fields(self) -> None:
        super()._check_fields()
        check_choice(self, "slot_vectors", (True, False))
        check_choice(self, "activation", ("rational", *FIXED_ACTIVATIONS))
        check_choice(self, "activation_fit", tuple(GELU_FITS))
        check_int(self, "share_layers", minimum=1)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.init_weights == "paper" and self.slot_vectors:
            raise ValueError(
                "`slot_vectors` must be False or None with `init_weights='paper'`, the paper's form, got True."
            )

    def default_position(self, infos: Sequence[StackInfo]) -> str:
        starts_before_text = self.init_weights == "paper" or self.init_text is not None
        causal_lm = all(info.causal_lm or (info.undeclared and self.task_type == "CAUSAL_LM") for info in infos)
        return "end" if causal_lm and not starts_before_text else "before"


class IAPTGenerator(PromptGenerator):
    """Instruction-aware prompt tuning (https://arxiv.org/abs/2405.18203): the prompt of each layer is generated from that
    layer's own input, by self-attention pooling and a bottleneck.

    With H (n, d) the input of a layer at the instruction's tokens and s (l, m) the vectors of the slots: `z = H W_down`,
    `A = softmax over tokens (z W_pool)`, `p = g(A^T z + s) W_up`. It has 2*d*m*L weights in its projections, l*m*L each in its pools
    and in the slots' vectors, and 12*L in rational activations.

    Attributes:
        down, up (`nn.Parameter`): Shapes (Lg, d, m) and (Lg, m, d), with a row for each group of layers that share them.
            `down` is W_down divided by `down_factor`.
        pool (`nn.Parameter`): Shape (L, m, l).
        slot (`nn.Parameter`): Shape (L, l, m). With `slot_vectors`.
        activation (`nn.Parameter`): Shape (L, 1, 12), the coefficients of [`rational`]. A fixed activation has none.
        constant (`nn.Parameter`): Shape (L, l, m). With `condition="constant"`, instead of `down`, `pool` and `slot`.
    """

    feeds_constant = False

    def __init__(self, config: IAPTConfig, info: StackInfo):
        super().__init__(config, info)
        d, m, l, L = info.hidden_size, config.bottleneck_dim, config.num_virtual_tokens, len(self.depths)
        groups = -(-L // config.share_layers)  # rounded up
        self.adds: bool = config.accumulates([info])
        self.down_factor = config.factor_of(d)
        self.up = fan_in_uniform(groups, m, d)
        if self.constant_condition:
            self.constant = nn.Parameter(torch.randn(L, l, m))
        else:
            self.down = fan_in_uniform(groups, d, m, factor=self.down_factor)
            self.pool = fan_in_uniform(L, m, l)
            if config.slot_vectors:
                self.slot = nn.Parameter(torch.randn(L, l, m))
        if config.activation == "rational":
            self.activation = nn.Parameter(gelu_coefficients(config.activation_fit).repeat(L, 1, 1))
        self.zero_at_start(self.up)

    @property
    def activation_coefficients(self) -> nn.Parameter | None:
        return getattr(self, "activation", None)

    def index_at(self, depth: int) -> dict[str, int]:
        layer = self.depths.index(depth)
        group = layer // self.config.share_layers
        return {name: group if name in ("down", "up") else layer for name, _ in self.named_parameters()}

    def adds_at(self, depth: int) -> bool:
        return self.adds and depth != self.depths[0]

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        if self.constant_condition:
            pooled = weights["constant"]  # (l, m) or (G, l, m)
        else:
            z = self._project(instances.states, weights)  # (G, n, m)
            pooled = attention_pool(z, z @ weights["pool"], instances.mask)  # (G, l, m)
            if "slot" in weights:
                pooled = pooled + weights["slot"]
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
        z = states.to(dtype) @ (weights["down"] * self.down_factor)  # (G, n, m)
        # Residual streams hold huge activations, so states are normalised; after the projection, which saves a copy of them.
        return z if self.paper else z / rms(states).to(dtype)


IAPTModel = register_method("iapt", IAPTConfig, IAPTGenerator)
