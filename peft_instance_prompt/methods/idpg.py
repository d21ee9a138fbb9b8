# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""IDPG (https://arxiv.org/abs/2204.04497): a bottleneck turns a vector of the instance into the prompt of each depth."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm

from ..checks import check_choice, check_dropout, check_int
from ..engine.stack import StackInfo
from ..generator import INPUT, Instances, PromptGenerator, Source, Weights, chosen_layers
from ..nn.phm import phm_linear
from ..nn.pooling import rms_norm
from ..registry import register_method
from .bottleneck import BottleneckConfig
from .instance_vector import POOLINGS, InstanceVectorConfig, find_pooling, instance_vector, vector_width


# The five settings of the paper's tables.
PRESETS: dict[str, dict[str, Any]] = {
    "s-phm": {"multi_layer": False, "projection": "phm"},
    "s-dnn": {"multi_layer": False, "projection": "dense"},
    "m-phm": {"multi_layer": True, "projection": "phm"},
    "m-dnn": {"multi_layer": True, "projection": "dense"},
    "m-phm-glove": {
        "multi_layer": True,
        "projection": "phm",
        "phm_n": 4,
        "instance_source": "instance_embeds",
        "instance_embeds_dim": 300,
        "depth_input": "instance",
    },
}


@dataclass
class IDPGConfig(InstanceVectorConfig, BottleneckConfig):
    """Configuration of [`IDPGModel`], instance-dependent prompt generation (NAACL 2022, https://arxiv.org/abs/2204.04497).

    A bottleneck turns a vector M(x) of the instance into `num_virtual_tokens` prompt vectors:
    `u = dropout(gelu(M(x) W1 + b1))`, `p = u W2 + b2`. S-IDPG does so at the input; M-IDPG, the default, also adds such vectors to
    the prompt's states at the input of each further layer. [`IDPGConfig.preset`] gives the settings of the paper's tables.

    Deviations from the paper: by default the adapter starts as a near no-op, and the generator's input is divided by its
    root mean square (`init_weights`; `"paper"` does neither). M(x) is computed without dropout, in training too. The paper has no
    causal models; in these, the last instruction token takes the place of the paper's first token.

    Args:
        num_virtual_tokens (`int`): The number l of prompt vectors. Defaults to 5, the paper's.
        multi_layer (`bool`): `True`, the default, is M-IDPG: the prompt at the input, and an addition to it at the input of
            every further layer (in `layers_to_transform`, 0 stands for the prompt at the input). `False` is S-IDPG: the
            input only.
        bottleneck_dim (`int`, *optional*): The width m. Defaults to the paper's: 16 if `multi_layer`, otherwise 256.
        projection (`str`): `"phm"`, the default: W1 and W2 are sums of Kronecker products; or `"dense"`, the paper's DNN.
        phm_n (`int`): The number n of Kronecker products. It must divide the widths of all vectors that W1 and W2 multiply
            or make. Defaults to 16.
        phm_share_A (`bool`, *optional*): Whether W1 and W2 have the same left factors. Defaults to the values that give the
            paper's parameter counts: `False` if `multi_layer`, otherwise `True`.
        layer_sharing (`str`): What the depths of M-IDPG share: `"bias"`, the default, everything but the output bias b2;
            `"all"` everything; `"none"` nothing. A depth at which vectors have different widths (the input of a model with
            projected embeddings, or with `instance_embeds` of a different width) has matrices of its own.
        depth_input (`str`): What the generator reads between the layers: `"previous"`, the default, the instance's states
            there, pooled as M(x) is; or `"instance"`, M(x) again.
        instance_source (`str`): Where M(x) comes from. `"frozen"`, the default: pooled last hidden states of a plain pass of the
            base model, without prompts, gradient and dropout. `"embeddings"`: the mean of the input embeddings, which costs
            next to nothing. `"instance_embeds"`: the argument of this name of `forward` and `generate`.
        instance_pooling (`str`): How the states are pooled: the `"first"` or the `"last"` instruction token's, or the `"mean"`.
            Defaults to `"auto"`: the last in a causal model, the mean in the encoder of an encoder-decoder model (not all of
            these begin with a special token), otherwise the first.
        instance_embeds_dim (`int`, *optional*): The width k of `instance_embeds`, for `instance_source="instance_embeds"`.
        generator_residual (`bool`): An ablation of appendix A.5: the prompt at the input is M(x) plus the layer norm of p. M(x) must
            have the embeddings' width, and a fresh adapter is no near no-op. Defaults to `False`.
        generator_layer_norm (`bool`): A second ablation: a layer norm ends the generator at the input, behind the residual.
            Defaults to `False`.
        dropout (`float`): The dropout on u, in training only, from 0 to below 1. Defaults to 0.1.
        prompt_position (`str`, *optional*): Filled in when the adapter is made: `"after_first"`, the paper's, or `"before"` if
            the text does not begin with a special token (T5). The paper's appendix A.5.2 finds `"before_separator"` best for
            pairs of sentences.
        condition (`str`): As for all methods, or `"bias"`, the control with W1 = W2 = 0: the prompt is the output bias b2, which
            the paper calls the task prompt and which is the only parameter.

    All fields of [`BottleneckConfig`] and [`InstancePromptConfig`] are inherited.
    """

    conditions = ("instance", "constant", "bias")
    paper = ("IDPG: An Instance-Dependent Prompt Generation Method", "2204.04497")

    num_virtual_tokens: int = 5
    bottleneck_dim: Optional[int] = None
    prompt_position: Optional[Literal["before", "after_first", "end", "before_separator", "after_separator"]] = None
    condition: Literal["instance", "constant", "bias"] = "instance"  # type: ignore[assignment]  # one more than other methods
    multi_layer: bool = True
    projection: Literal["phm", "dense"] = "phm"
    phm_n: int = 16
    phm_share_A: Optional[bool] = None
    layer_sharing: Literal["all", "bias", "none"] = "bias"
    depth_input: Literal["previous", "instance"] = "previous"
    instance_pooling: Literal["auto", "first", "last", "mean"] = "auto"
    generator_residual: bool = False
    generator_layer_norm: bool = False
    dropout: float = 0.1

    def _fill_in(self) -> None:
        super()._fill_in()
        if self.bottleneck_dim is None:
            self.bottleneck_dim = 16 if self.multi_layer else 256
        if self.phm_share_A is None:
            self.phm_share_A = not self.multi_layer

    def _check_fields(self) -> None:
        super()._check_fields()
        check_int(self, "phm_n", minimum=1)
        for name in ("multi_layer", "phm_share_A", "generator_residual", "generator_layer_norm"):
            check_choice(self, name, (True, False))
        check_choice(self, "projection", ("phm", "dense"))
        check_choice(self, "layer_sharing", ("all", "bias", "none"))
        check_choice(self, "depth_input", ("previous", "instance"))
        check_choice(self, "instance_pooling", ("auto", *POOLINGS))
        check_dropout(self)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if not self.multi_layer and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` must be None with `multi_layer=False`, which writes to the input only, got "
                f"{self.layers_to_transform!r}."
            )
        if self.generator_residual and self.condition == "bias":
            raise ValueError(
                "`generator_residual` must be False with `condition='bias'`, which has no M(x), got True."
            )
        layers = self.layers_to_transform
        at_input = layers is None or 0 in ([layers] if isinstance(layers, int) else layers)
        for name in ("generator_residual", "generator_layer_norm"):
            if getattr(self, name) and not at_input:
                raise ValueError(
                    f"`{name}` acts on the prompt at the input, so `layers_to_transform` must hold 0 or be None, got {layers!r}."
                )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> IDPGConfig:
        """A setting of the paper.

        Args:
            name (`str`): `"s-phm"`, `"s-dnn"`, `"m-phm"`, `"m-dnn"`, or `"m-phm-glove"`, which needs `instance_embeds` of
                width 300.
            **overrides: Other values for the preset's fields, and any further fields, such as `task_type`.

        Raises:
            ValueError: No preset has this name.

        Example:

        ```py
        >>> IDPGConfig.preset("s-phm", task_type="CAUSAL_LM").bottleneck_dim
        256
        ```
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {list(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})


class IDPGGenerator(PromptGenerator):
    """Instance-dependent prompt generation (NAACL 2022, https://arxiv.org/abs/2204.04497): a bottleneck turns a vector of the
    instance into the prompt at the input and, in the multi-layer variant, into additions to it at the further layers.

    With M(x) (k) the vector of the instance: `u = dropout(gelu(M(x) W1 + b1))`, `p = u W2 + b2`, reshaped to (l, d). Over D depths
    it has, dense, `k m + m + m l d` weights and `D l d` output biases; PHM divides `k m` and `m l d` by n and adds `n^3` for each set
    of left factors. With `condition="bias"`, p is b2, the only parameter.

    The ablations act on the prompt at the input, with layer norms N and N': `p <- M(x) + N(p)` with `generator_residual`, then
    `p <- N'(p)` with `generator_layer_norm`.

    Attributes:
        W1, b1, W2, b2 (`nn.Parameter`): Shapes (R, k, m), (R, 1, m), (R, m, l d) and (D, 1, l d), with a row for each group of
            depths that share it. With PHM, the left factors `A1` and `A2` (R, n, n, n) and the right ones `B1` (R, n, k/n, m/n) and
            `B2` (R, n, m/n, l d/n) instead of the matrices; with shared left factors there is no `A2`. W1, or `B1` and an `A1` that is
            not shared, are divided by `down_factor`. Tensors of the input whose
            shapes differ from those between the layers have the suffix `_input`.
        constant (`nn.Parameter`): Shape (R, 1, k). With `condition="constant"`: M(x).
        residual_norm, residual_norm_bias, norm, norm_bias (`nn.Parameter`): Shape (1, 1, e). Weight and bias of N and N'.
    """

    adds = True
    feeds_constant = False

    def __init__(self, config: IDPGConfig, info: StackInfo):
        super().__init__(config, info, depths=depths_of(config, info))
        self.pool = find_pooling(config.instance_pooling, info)
        self.dropout = nn.Dropout(config.dropout)
        self.down_factor = config.factor_of(info.hidden_size)
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
        """Add the parameters from x (k) to p but its bias: W1, b1 and W2."""
        m, n, factor = config.bottleneck_dim, config.phm_n, self.down_factor
        if config.projection == "phm":
            own = 1.0 if config.phm_share_A else factor  # W2 has a shared one, too
            self._add("A1", {depth: (n, n, n) for depth in widths}, keys, std=0.05 / own)
            self._add("B1", {depth: (n, k // n, m // n) for depth, (k, _) in widths.items()}, keys, std=0.05 / factor)
            if not config.phm_share_A:
                self._add("A2", {depth: (n, n, n) for depth in widths}, keys, std=0.05)
            self._add("B2", {depth: (n, m // n, out // n) for depth, (_, out) in widths.items()}, keys, std=0.05)
        else:
            self._add("W1", {depth: (k, m) for depth, (k, _) in widths.items()}, keys, std=0.02 / factor)
            self._add("W2", {depth: (m, out) for depth, (_, out) in widths.items()}, keys, std=0.02)
        self._add("b1", {depth: (1, m) for depth in widths}, keys, std=0.05 if config.projection == "phm" else 0.0)

    def _add(self, role: str, shapes: Mapping[int, tuple[int, ...]], keys: Mapping[int, Hashable], std: float) -> None:
        """Add a role's parameters ~ N(0, std^2): a tensor for each shape that depths have, with a row for each of their keys."""
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
                    f"`phm_n` must divide `bottleneck_dim` {config.bottleneck_dim} and the widths {sorted(widths)} of the vectors "
                    f"that the generator reads and writes in {info.layers_name!r}, got {config.phm_n}; these do: "
                    f"{[n for n in range(1, common + 1) if common % n == 0]}."
                )

    def encode(self, source: Source) -> torch.Tensor | None:
        if self.constant_condition or self.biases_only:
            return None
        return instance_vector(self.config, source, self.pool)  # (G, k)

    def index_at(self, depth: int) -> dict[str, int]:
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
        """The bottleneck's input (G, 1, k) at a depth."""
        if self.constant_condition:
            x = W["constant"].expand(len(instances.mask), -1, -1)  # (G, 1, k)
        elif depth == INPUT or self.config.depth_input == "instance":
            x = instances.vector[:, None]  # (G, 1, k)
        else:
            x = self.pool(instances.states, instances.mask)[:, None]  # (G, 1, d)
        return x if self.paper else rms_norm(x)

    def _bottleneck(self, x: torch.Tensor, W: Weights) -> torch.Tensor:
        """u W2 (G, 1, l * d), of x (G, 1, k)."""
        x = x * (self.down_factor ** (2 if "A2" in W else 1))  # the matrix W1, or both its factors, are divided by it
        if "W1" in W:
            return self.dropout(gelu(x @ W["W1"] + W["b1"])) @ W["W2"]  # (G, 1, l * d)
        u = self.dropout(gelu(phm_linear(x, W["A1"], W["B1"], W["b1"])))  # (G, 1, m)
        return phm_linear(u, W.get("A2", W["A1"]), W["B2"])  # (G, 1, l * d)


def depths_of(config: IDPGConfig, info: StackInfo) -> list[int]:
    """The depths at which prompts are generated. Layer 0 stands for the input embeddings."""
    layers = chosen_layers(config, info) if config.multi_layer else [0]
    return [INPUT if layer == 0 else layer for layer in layers]


def widths_of(config: IDPGConfig, info: StackInfo, depth: int) -> tuple[int, int]:
    """At a depth: the width of the generator's input, and that of its l vectors together."""
    previous = depth != INPUT and config.depth_input == "previous"
    read = info.hidden_size if previous else vector_width(config, info)
    return read, config.num_virtual_tokens * (info.embedding_size if depth == INPUT else info.hidden_size)


IDPGModel = register_method("idpg", IDPGConfig, IDPGGenerator)
