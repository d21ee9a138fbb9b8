# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import gelu

from ...generator import INPUT, Instances, PromptGenerator, Source, Weights, chosen_layers
from ...nn.phm import phm_linear
from ...nn.pooling import first_token, last_token, mean_pool, rms_norm
from ..instance_vector import instance_vector, vector_width


if TYPE_CHECKING:
    from ...engine.stack import StackInfo
    from .config import IDPGConfig


class IDPGGenerator(PromptGenerator):
    """The generator of IDPG, for all depths (https://arxiv.org/abs/2204.04497).

    With M(x) (k) the vector of the instance: `u = dropout(gelu(M(x) W1 + b1))`, `p = u W2 + b2`, reshaped to (l, d). With D
    depths it has, dense, `k m + m + m l d` weights and `D l d` output biases; PHM divides `k m` and `m l d` by n and
    adds `n^3` for each set of left factors.

    Attributes:
        W1, b1, W2, b2 (`nn.Parameter`): Shapes (R, k, m), (R, 1, m), (R, m, l d) and (D, 1, l d), with a row for each group of
            depths that share it. With PHM, the left factors `A1` and `A2` (R, n, n, n) and the right ones `B1` (R, n, k/n, m/n) and
            `B2` (R, n, m/n, l d/n) in place of the matrices; where these share their left factors, there is no `A2`.
            At the input, where widths may differ from those between the layers, tensors of other shapes have the suffix `_input`.
        constant (`nn.Parameter`): Shape (R, 1, k). With `condition="constant"`: M(x).
    """

    adds = True
    feeds_constant = False

    def __init__(self, config: IDPGConfig, info: StackInfo):
        super().__init__(config, info, depths=depths_of(config, info))
        pooling = config.instance_pooling
        if pooling == "auto":
            pooling = "last" if info.causal else "mean" if info.encoder_of_pair else "first"
        self.pool = {"first": first_token, "last": last_token, "mean": mean_pool}[pooling]
        self.dropout = nn.Dropout(config.dropout)
        self.rows: dict[int, dict[str, int]] = {depth: {} for depth in self.depths}

        m, n = config.bottleneck_dim, config.phm_n
        widths = {depth: widths_of(config, info, depth) for depth in self.depths}  # k and l d of each depth
        own = config.layer_sharing == "none"
        keys = {depth: (pair, depth if own else None) for depth, pair in widths.items()}
        if config.projection == "phm":
            self._add("A1", {depth: (n, n, n) for depth in widths}, keys, std=0.05)
            self._add("B1", {depth: (n, k // n, m // n) for depth, (k, _) in widths.items()}, keys, std=0.05)
            if not config.phm_share_A:
                self._add("A2", {depth: (n, n, n) for depth in widths}, keys, std=0.05)
            self._add("B2", {depth: (n, m // n, out // n) for depth, (_, out) in widths.items()}, keys, std=0.05)
        else:
            self._add("W1", {depth: (k, m) for depth, (k, _) in widths.items()}, keys, std=0.02)
            self._add("W2", {depth: (m, out) for depth, (_, out) in widths.items()}, keys, std=0.02)
        self._add("b1", {depth: (1, m) for depth in widths}, keys, std=0.05 if config.projection == "phm" else 0.0)
        shared = config.layer_sharing == "all"
        keys_of_bias = {depth: None if shared else depth for depth in widths}
        self._add("b2", {depth: (1, out) for depth, (_, out) in widths.items()}, keys_of_bias, std=0.02)
        if self.constant_condition:
            self._add("constant", {depth: (1, k) for depth, (k, _) in widths.items()}, keys, std=1.0)

        self.zero_at_start(*(p for name, p in self.named_parameters() if name[:2] in ("W2", "B2", "b2")))
        if config.init_weights is False:
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)

    def _add(self, role: str, shapes: Mapping[int, tuple[int, ...]], keys: Mapping[int, Hashable], std: float) -> None:
        """Add a role's parameters ~ N(0, std^2): a tensor for each shape among the depths, with a row for each key among those."""
        for shape in dict.fromkeys(shapes.values()):
            depths = [depth for depth in self.depths if shapes[depth] == shape]
            rows = list(dict.fromkeys(keys[depth] for depth in depths))
            name = role if self.depths[-1] in depths else f"{role}_input"
            self.register_parameter(name, nn.Parameter(torch.randn(len(rows), *shape) * std))
            for depth in depths:
                self.rows[depth][name] = rows.index(keys[depth])

    @classmethod
    def check(cls, config: IDPGConfig, info: StackInfo) -> None:
        if config.projection == "phm":
            widths = {k for depth in depths_of(config, info) for k in widths_of(config, info, depth)}
            common = math.gcd(config.bottleneck_dim, *widths)
            if common % config.phm_n:
                raise ValueError(
                    f"`phm_n` must divide `bottleneck_dim` {config.bottleneck_dim} and the widths {sorted(widths)} of what "
                    f"the generator reads and writes for {info.layers_name!r}, got {config.phm_n}; these do: "
                    f"{[n for n in range(1, common + 1) if common % n == 0]}."
                )

    def encode(self, source: Source) -> torch.Tensor | None:
        return None if self.constant_condition else instance_vector(self.config, source, self.pool)  # (G, k)

    def rows_at(self, depth: int) -> dict[str, int]:
        return self.rows[depth]

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        W = {name.removesuffix("_input"): weight for name, weight in weights.items()}
        G, l = len(instances.mask), self.num_slots
        if self.constant_condition:
            x = W["constant"].expand(G, -1, -1)  # (G, 1, k)
        elif depth == INPUT or self.config.depth_input == "instance":
            x = instances.vector[:, None]  # (G, 1, k)
        else:
            x = self.pool(instances.states, instances.mask)[:, None]  # (G, 1, d)
        x = (x if self.paper else rms_norm(x)).to(W["b2"].dtype)
        if "W1" in W:
            u = self.dropout(gelu(x @ W["W1"] + W["b1"]))  # (G, 1, m)
            p = u @ W["W2"]  # (G, 1, l * d)
        else:
            u = self.dropout(gelu(phm_linear(x, W["A1"], W["B1"], W["b1"])))  # (G, 1, m)
            p = phm_linear(u, W.get("A2", W["A1"]), W["B2"])  # (G, 1, l * d)
        return (p + W["b2"]).reshape(G, l, -1)  # (G, l, d)


def depths_of(config: IDPGConfig, info: StackInfo) -> list[int]:
    """Where prompts are generated: the input of the first layer is the input embeddings."""
    layers = chosen_layers(config, info) if config.multi_layer else [0]
    return [INPUT if layer == 0 else layer for layer in layers]


def widths_of(config: IDPGConfig, info: StackInfo, depth: int) -> tuple[int, int]:
    """The width of the generator's input at a depth, and that of its l vectors together."""
    previous = depth != INPUT and config.depth_input == "previous"
    read = info.hidden_size if previous else vector_width(config, info)
    return read, config.num_virtual_tokens * (info.embedding_size if depth == INPUT else info.hidden_size)
