# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import nn

from ...generator import INPUT, Instance, PromptGenerator, Source, names_in, state_at
from ...nn.phm import PHMLinear
from ...nn.pooling import first_token, last_token, mean_pool, rms, rms_norm
from ...stack import StackInfo
from .config import IDPGConfig


class IDPGGenerator(PromptGenerator):
    """The generator of IDPG, for all depths (https://arxiv.org/abs/2204.04497).

    With M(x) (k) the vector of the instance: `u = dropout(gelu(M(x) W1 + b1))`, `p = u W2 + b2`, reshaped to (l, d). With D
    depths it has, dense, `k m + m + m l d` weights and `D l d` output biases; PHM divides `k m` and `m l d` by n and
    adds `n^3` for each set of left factors.
    """

    adds = True

    def __init__(self, config: IDPGConfig, info: StackInfo):
        super().__init__(config, info)
        self.depths = depths_of(config, self.depths)
        pooling = config.instance_pooling
        if pooling == "auto":
            pooling = "last" if info.causal else "mean" if info.encoder_of_pair else "first"
        self.pool = {"first": first_token, "last": last_token, "mean": mean_pool}[pooling]
        self.paper = config.init_weights == "paper"
        self.constant_input = config.condition == "constant"

        widths = [widths_of(config, info, depth) for depth in self.depths]
        own = config.layer_sharing == "none"
        self.bottleneck_of = numbered([(*pair, depth if own else None) for pair, depth in zip(widths, self.depths)])
        everything = config.layer_sharing == "all"
        self.bias_of = numbered([(pair[1], None if everything else depth) for pair, depth in zip(widths, self.depths)])
        pairs = [widths[self.bottleneck_of.index(i)] for i in range(max(self.bottleneck_of) + 1)]
        sizes = [widths[self.bias_of.index(i)][1] for i in range(max(self.bias_of) + 1)]
        self.bottleneck = nn.ModuleList(Bottleneck(k, out, config) for k, out in pairs)
        self.bias = nn.ParameterList(nn.Parameter(torch.randn(size) * 0.02) for size in sizes)
        if self.constant_input:
            self.constant = nn.ParameterList(nn.Parameter(torch.randn(k)) for k, _ in pairs)

        if config.init_weights is True:
            for last in (*self.bias, *(bottleneck.last for bottleneck in self.bottleneck)):
                nn.init.zeros_(last)
        elif config.init_weights is False:
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)

    @classmethod
    def check(cls, config: IDPGConfig, info: StackInfo) -> None:
        if config.projection == "phm":
            layers = config.layers_to_transform
            layers = range(info.num_layers) if layers is None else [layers] if isinstance(layers, int) else layers
            widths = {k for depth in depths_of(config, layers) for k in widths_of(config, info, depth)}
            common = math.gcd(config.bottleneck_dim, *widths)
            if common % config.phm_n:
                raise ValueError(
                    f"`phm_n` must divide `bottleneck_dim` {config.bottleneck_dim} and the widths {sorted(widths)} of what "
                    f"the generator reads and writes for {info.layers_name!r}, got {config.phm_n}; these do: "
                    f"{[n for n in range(1, common + 1) if common % n == 0]}."
                )

    def encode(self, source: Source) -> torch.Tensor | None:
        kind = self.config.instance_source
        if kind != "instance_embeds" and source.instance_embeds is not None:
            warnings.warn(f"`instance_embeds` are not used by this IDPG adapter, whose `instance_source` is {kind!r}.")
        if self.constant_input:
            return None
        if kind == "instance_embeds":
            given = check_instance_embeds(source.instance_embeds, len(source.mask), self.config.instance_embeds_dim)
            return given.to(source.embeds)  # (B, k)
        if kind == "embeddings":
            return mean_pool(source.embeds, source.mask).detach()  # (B, e)
        return self.pool(source.frozen_pass(), source.mask)  # (B, d)

    def parameters_at(self, depth: int) -> list[str]:
        at = self.depths.index(depth)
        number = self.bottleneck_of[at]
        names = [*names_in(self, f"bottleneck.{number}"), f"bias.{self.bias_of[at]}"]
        return [*names, f"constant.{number}"] if self.constant_input else names

    def forward(self, states: torch.Tensor, instance: Instance, depth: int) -> torch.Tensor:
        at = self.depths.index(depth)
        number, bias = self.bottleneck_of[at], self.bias[self.bias_of[at]]
        if self.constant_input:
            vector = self.constant[number].expand(states.shape[0], -1)  # (B, k)
        elif depth == INPUT or self.config.depth_input == "instance":
            vector = instance.vector  # (B, k)
        else:
            vector = self.pool(states, instance.mask)  # (B, d)
        vector = vector if self.paper else rms_norm(vector)
        generated = self.bottleneck[number](vector.to(bias.dtype)) + bias  # (B, l * d)
        generated = generated.unflatten(-1, (self.num_slots, -1))  # (B, l, d)
        if self.paper:
            return generated
        anchor = state_at(states, self.anchor_index(instance)).to(bias.dtype)  # (B, 1, d)
        generated = rms(anchor) * generated  # (B, l, d)
        # Between the layers the slots hold what has become of the copies of the anchor that they began as.
        return anchor + generated if depth == INPUT else generated


class Bottleneck(nn.Module):
    """`dropout(gelu(x W1 + b1)) W2`, from (B, k) to (B, out): the output bias is not part of it."""

    def __init__(self, k: int, out: int, config: IDPGConfig):
        super().__init__()
        m, n = config.bottleneck_dim, config.phm_n
        if config.projection == "phm":
            self.down = PHMLinear(k, m, n)
            self.up = PHMLinear(m, out, n, bias=False, share_A_with=self.down if config.phm_share_A else None)
        else:
            self.down, self.up = nn.Linear(k, m), nn.Linear(m, out, bias=False)
            for linear in (self.down, self.up):
                nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(self.down.bias)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def last(self) -> nn.Parameter:
        """The parameter that makes everything zero if it is."""
        return self.up.B if isinstance(self.up, PHMLinear) else self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.dropout(nn.functional.gelu(self.down(x))))  # (B, out)


def depths_of(config: IDPGConfig, layers: Iterable[int]) -> tuple[int, ...]:
    """Where the generator is called: the input of the first layer is the input embeddings."""
    return tuple(INPUT if layer == 0 else layer for layer in sorted(layers)) if config.multi_layer else (INPUT,)


def widths_of(config: IDPGConfig, info: StackInfo, depth: int) -> tuple[int, int]:
    """The width of what the generator reads at a depth, and of the l vectors together that it makes there."""
    read = {
        "frozen": info.output_size,
        "embeddings": info.embedding_size,
        "instance_embeds": config.instance_embeds_dim,
    }[config.instance_source]
    if depth != INPUT and config.depth_input == "previous":
        read = info.hidden_size
    return read, config.num_virtual_tokens * (info.embedding_size if depth == INPUT else info.hidden_size)


def numbered(keys: Sequence[Hashable]) -> list[int]:
    """Equal keys get equal numbers, from 0 in the order of their first occurrence."""
    unique = list(dict.fromkeys(keys))
    return [unique.index(key) for key in keys]


def check_instance_embeds(given: torch.Tensor | None, num_rows: int, width: int) -> torch.Tensor:
    """`instance_embeds` if they are there and have the shape (B, k).

    Raises:
        TypeError: They are no tensor of floats.
        ValueError: They are missing or have another shape.
    """
    if given is None:
        raise ValueError(
            f"This adapter needs `instance_embeds`, a tensor of shape {(num_rows, width)}: pass it to `forward` and "
            "`generate` beside `input_ids`."
        )
    if not isinstance(given, torch.Tensor) or not given.is_floating_point():
        kind = getattr(given, "dtype", type(given).__name__)
        raise TypeError(f"`instance_embeds` must be a tensor of floats, got {kind}.")
    if tuple(given.shape) != (num_rows, width):
        raise ValueError(
            f"`instance_embeds` must have the shape (batch, `instance_embeds_dim`), {(num_rows, width)}, got "
            f"{tuple(given.shape)}."
        )
    return given
