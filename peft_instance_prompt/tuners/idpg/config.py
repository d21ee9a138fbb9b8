# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from ...checks import check_choice, check_dropout, check_int
from ..instance_vector import InstanceVectorConfig


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
class IDPGConfig(InstanceVectorConfig):
    """Configuration of [`IDPGModel`], instance-dependent prompt generation (NAACL 2022, https://arxiv.org/abs/2204.04497).

    A vector M(x) of the instance goes through a bottleneck to `num_virtual_tokens` prompt vectors:
    `u = dropout(gelu(M(x) W1 + b1))`, `p = u W2 + b2`. S-IDPG does so at the input; M-IDPG (the default) also adds such
    vectors to the prompt's states between the layers. [`IDPGConfig.preset`] gives the settings of the paper's tables.

    Deviations from the paper: by default the adapter starts as a near no-op, and the generator's input is divided by its
    root mean square (`init_weights`; `"paper"` does neither). M(x) is computed without dropout, also in training. Causal
    models, which the paper does not have, take the last instruction token where the paper takes the first token.

    Args:
        num_virtual_tokens (`int`): The number l of prompt vectors. Defaults to 5, the paper's.
        multi_layer (`bool`): `True`, the default, is M-IDPG: the prompt at the input and an addition to it at the input of
            every further layer (in `layers_to_transform`, 0 stands for the prompt at the input). `False` is S-IDPG: the
            input only.
        bottleneck_dim (`int`, *optional*): The width m. Defaults to the paper's, 16 if `multi_layer`, else 256.
        projection (`str`): `"phm"`, the default: W1 and W2 are sums of Kronecker products; or `"dense"`, the paper's DNN.
        phm_n (`int`): The number n of Kronecker products. It must divide the widths of all vectors that are multiplied.
            Defaults to 16.
        phm_share_A (`bool`, *optional*): Whether W1 and W2 have the same left factors. Defaults to the values that give the
            paper's parameter counts: `False` if `multi_layer`, else `True`.
        layer_sharing (`str`): What the depths of M-IDPG share: `"bias"`, the default, everything but the output bias b2;
            `"all"` everything; `"none"` nothing. Depths at which the vectors have other widths (the input of a model with
            projected embeddings, or with `instance_embeds` of another width) have matrices of their own.
        depth_input (`str`): What the generator reads between the layers: `"previous"`, the default, the instance's state
            there, pooled as M(x) is; or `"instance"`, M(x) again.
        instance_source (`str`): The source of M(x): `"frozen"`, the default, the last hidden states of a pass of the base model
            without prompts, gradient and dropout, before the actual one; `"embeddings"`, the mean of the input embeddings,
            which costs nothing; or `"instance_embeds"`, a vector that is given to `forward` and `generate` under this name.
        instance_pooling (`str`): Which of the states: the `"first"` or the `"last"` instruction token's, or the `"mean"`.
            Defaults to `"auto"`: the last in a causal model, the mean in the encoder of an encoder-decoder model (not all
            of which have a first token of their own), else the first.
        instance_embeds_dim (`int`, *optional*): The width k of the given vectors, for `instance_source="instance_embeds"`.
        generator_residual (`bool`): An ablation of the paper: the prompt at the input is M(x) plus the layer norm of p, which needs
            an M(x) of the embeddings' width. It is there from the start, so a fresh adapter is no near no-op. Defaults to `False`.
        generator_layer_norm (`bool`): Another: the prompt at the input is what the generator makes, residual and all, after
            a layer norm. Defaults to `False`.
        dropout (`float`): The dropout on u, in training only. Defaults to 0.1.
        prompt_position (`str`, *optional*): Defaults to `"after_first"`, the paper's, or to `"before"` where the text does not begin
            with a special token (T5). Filled in when the adapter is made. In its appendix the paper finds `"before_separator"`
            best for pairs of sentences.
        condition (`str`): As for all methods, or `"bias"`: the control with W1 = W2 = 0. The prompt is the output bias b2, which the
            paper calls the task prompt, and nothing else is there to be trained.

    The fields that all methods have are those of [`InstancePromptConfig`].
    """

    conditions = ("instance", "constant", "bias")
    paper = ("IDPG: An Instance-Dependent Prompt Generation Method", "2204.04497")

    num_virtual_tokens: int = field(default=5, metadata={"help": "The number of prompt vectors per instance."})
    bottleneck_dim: Optional[int] = field(
        default=None, metadata={"help": "The width of the bottleneck; None: 16 if `multi_layer`, else 256."}
    )
    prompt_position: Optional[Literal["before", "after_first", "end", "before_separator", "after_separator"]] = field(
        default=None,
        metadata={
            "help": "'before' the first token, 'after_first', at the 'end', 'before_separator' or 'after_separator'; None: "
            "'after_first' if it is a special token."
        },
    )
    condition: Literal["instance", "constant", "bias"] = field(  # type: ignore[assignment]  # one more than the others have
        default="instance",
        metadata={"help": "'instance', or a control: 'constant', or 'bias' for output biases only."},
    )
    multi_layer: bool = field(default=True, metadata={"help": "M-IDPG (every layer) or S-IDPG (the input only)."})
    projection: Literal["phm", "dense"] = field(default="phm", metadata={"help": "The kind of the two matrices."})
    phm_n: int = field(default=16, metadata={"help": "The number of Kronecker products of a PHM matrix."})
    phm_share_A: Optional[bool] = field(
        default=None, metadata={"help": "Whether both PHM matrices share A; None: only if not `multi_layer`."}
    )
    layer_sharing: Literal["all", "bias", "none"] = field(
        default="bias", metadata={"help": "What depths share: 'all', all but the output 'bias', or 'none'."}
    )
    depth_input: Literal["previous", "instance"] = field(
        default="previous", metadata={"help": "What is read between layers: 'previous' states, or M(x) ('instance')."}
    )
    instance_pooling: Literal["auto", "first", "last", "mean"] = field(
        default="auto",
        metadata={"help": "How states are pooled: 'first' or 'last' instruction token, 'mean', 'auto'."},
    )
    generator_residual: bool = field(
        default=False, metadata={"help": "Whether the prompt at the input is M(x) plus the layer norm of p."}
    )
    generator_layer_norm: bool = field(
        default=False, metadata={"help": "Whether a layer norm ends the generator at the input."}
    )
    dropout: float = field(default=0.1, metadata={"help": "The dropout in the bottleneck, in training only."})

    def __post_init__(self):
        if self.bottleneck_dim is None:
            self.bottleneck_dim = 16 if self.multi_layer else 256
        if self.phm_share_A is None:
            self.phm_share_A = not self.multi_layer
        super().__post_init__()
        check_int(self, "phm_n", minimum=1)
        for name in ("multi_layer", "phm_share_A", "generator_residual", "generator_layer_norm"):
            check_choice(self, name, (True, False))
        check_choice(self, "projection", ("phm", "dense"))
        check_choice(self, "layer_sharing", ("all", "bias", "none"))
        check_choice(self, "depth_input", ("previous", "instance"))
        check_choice(self, "instance_pooling", ("auto", "first", "last", "mean"))
        check_dropout(self)
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
        for name in ("generator_residual", "generator_layer_norm"):
            if (
                getattr(self, name)
                and layers is not None
                and 0 not in ([layers] if isinstance(layers, int) else layers)
            ):
                raise ValueError(
                    f"`{name}` acts on the prompt at the input, so `layers_to_transform` must hold 0 or be None, got {layers!r}."
                )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> IDPGConfig:
        """A setting of the paper.

        Args:
            name (`str`): `"s-phm"`, `"s-dnn"`, `"m-phm"`, `"m-dnn"`, or `"m-phm-glove"`, which wants `instance_embeds` of
                width 300.
            **overrides: Fields to set otherwise, and `task_type`.

        Raises:
            ValueError: There is no such preset.

        Example:

        ```py
        >>> IDPGConfig.preset("s-phm", task_type="CAUSAL_LM").bottleneck_dim
        256
        ```
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {list(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})
