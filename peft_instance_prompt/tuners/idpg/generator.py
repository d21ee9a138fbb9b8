# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

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
    adds `n^3` for each set of left factors. With `condition="bias"`, the control with W1 = W2 = 0, p is b2 and the biases are all.

    The ablations act on the prompt at the input, with layer norms N: `p <- M(x) + N(p)` with `generator_residual`, then `p <- N'(p)`
    with `generator_layer_norm`.

    Attributes:
        W1, b1, W2, b2 (`nn.Parameter`): Shapes (R, k, m), (R, 1, m), (R, m, l d) and (D, 1, l d), with a row for each group of
            depths that share it. With PHM, the left factors `A1` and `A2` (R, n, n, n) and the right ones `B1` (R, n, k/n, m/n) and
            `B2` (R, n, m/n, l d/n) in place of the matrices; where these share their left factors, there is no `A2`.
            At the input, where widths may differ from those between the layers, tensors of other shapes have the suffix `_input`.
        constant (`nn.Parameter`): Shape (R, 1, k). With `condition="constant"`: M(x).
        residual_norm, residual_norm_bias, norm, norm_bias (`nn.Parameter`): Shape (1, 1, e). Weight and bias of N and N'.
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
        self.biases_only: bool = config.condition == "bias"

        widths = {depth: widths_of(config, info, depth) for depth in self.depths}  # k and l d of each depth
        own = config.layer_sharing == "none"
        keys = {depth: (pair, depth if own else None) for depth, pair in widths.items()}
        if not self.biases_only:
            self._add_matrices(config, widths, keys)
        shared = config.layer_sharing == "all"
        keys_of_bias = {depth: None if shared else depth for depth in widths}
        self._add("b2", {depth: (1, out) for depth, (_, out) in widths.items()}, keys_of_bias, std=0.02)
        if self.constant_condition:
            self._add("constant", {depth: (1, k) for depth, (k, _) in widths.items()}, keys, std=1.0)

        self.zero_at_start(*(p for name, p in self.named_parameters() if name[:2] in ("W2", "B2", "b2")))
        if config.init_weights is False:
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)
        for role, wanted in (("residual_norm", config.generator_residual), ("norm", config.generator_layer_norm)):
            for name, value in ((role, 1.0), (f"{role}_bias", 0.0)) if wanted else ():
                self.register_parameter(name, nn.Parameter(torch.full((1, 1, info.embedding_size), value)))
                self.rows[INPUT][name] = 0

    def _add_matrices(
        self, config: IDPGConfig, widths: Mapping[int, tuple[int, int]], keys: Mapping[int, Hashable]
    ) -> None:
        """Add what turns x (k) into p without its bias: W1, b1 and W2."""
        m, n = config.bottleneck_dim, config.phm_n
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
        if config.generator_residual and (width := vector_width(config, info)) != info.embedding_size:
            raise ValueError(
                f"`generator_residual` needs vectors of the instance as wide as the embeddings of {info.layers_name!r}, which have "
                f"{info.embedding_size}; those of `instance_source={config.instance_source!r}` have {width}."
            )
        if config.projection == "phm" and config.condition != "bias":
            widths = {k for depth in depths_of(config, info) for k in widths_of(config, info, depth)}
            common = math.gcd(config.bottleneck_dim, *widths)
            if common % config.phm_n:
                raise ValueError(
                    f"`phm_n` must divide `bottleneck_dim` {config.bottleneck_dim} and the widths {sorted(widths)} of what "
                    f"the generator reads and writes for {info.layers_name!r}, got {config.phm_n}; these do: "
                    f"{[n for n in range(1, common + 1) if common % n == 0]}."
                )

    def encode(self, source: Source) -> torch.Tensor | None:
        if self.constant_condition or self.biases_only:
            return None
        return instance_vector(self.config, source, self.pool)  # (G, k)

    def rows_at(self, depth: int) -> dict[str, int]:
        return self.rows[depth]

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        W = {name.removesuffix("_input"): weight for name, weight in weights.items()}
        x = None if self.biases_only else self._read(instances, depth, W).to(W["b2"].dtype)  # (G, 1, k)
        p = W["b2"] if x is None else self._bottleneck(x, W) + W["b2"]  # (G, 1, l * d), or (1, l * d) of one adapter
        p = p.unflatten(-1, (self.num_slots, -1)).flatten(-3, -2)  # (G, l, d) or (l, d)
        if "residual_norm" in W:
            p = x + layer_norm(p, p.shape[-1:]) * W["residual_norm"] + W["residual_norm_bias"]
        if "norm" in W:
            p = layer_norm(p, p.shape[-1:]) * W["norm"] + W["norm_bias"]
        return p

    def _read(self, instances: Instances, depth: int, W: Weights) -> torch.Tensor:
        """What the bottleneck reads at a depth, (G, 1, k)."""
        if self.constant_condition:
            x = W["constant"].expand(len(instances.mask), -1, -1)  # (G, 1, k)
        elif depth == INPUT or self.config.depth_input == "instance":
            x = instances.vector[:, None]  # (G, 1, k)
        else:
            x = self.pool(instances.states, instances.mask)[:, None]  # (G, 1, d)
        return x if self.paper else rms_norm(x)

    def _bottleneck(self, x: torch.Tensor, W: Weights) -> torch.Tensor:
        """u W2 (G, 1, l * d), of x (G, 1, k)."""
        if "W1" in W:
            return self.dropout(gelu(x @ W["W1"] + W["b1"])) @ W["W2"]  # (G, 1, l * d)
        u = self.dropout(gelu(phm_linear(x, W["A1"], W["B1"], W["b1"])))  # (G, 1, m)
        return phm_linear(u, W.get("A2", W["A1"]), W["B2"])  # (G, 1, l * d)


def depths_of(config: IDPGConfig, info: StackInfo) -> list[int]:
    """Where prompts are generated: the input of the first layer is the input embeddings."""
    layers = chosen_layers(config, info) if config.multi_layer else [0]
    return [INPUT if layer == 0 else layer for layer in layers]


def widths_of(config: IDPGConfig, info: StackInfo, depth: int) -> tuple[int, int]:
    """The width of the generator's input at a depth, and that of its l vectors together."""
    previous = depth != INPUT and config.depth_input == "previous"
    read = info.hidden_size if previous else vector_width(config, info)
    return read, config.num_virtual_tokens * (info.embedding_size if depth == INPUT else info.hidden_size)
