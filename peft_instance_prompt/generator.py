# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The contract between the engine and a method: a generator turns instances into prompt vectors.

A generator never sees rows, padding, responses or slots. It sees G instances, each with the states of its own instruction tokens,
and returns l vectors for each. The engine finds the instances and puts the vectors in their places.

Shapes: G instances, n instruction tokens, l prompt vectors, w the width of the states (d of the layers, e of the embeddings), k
the width of a vector of the instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn

from .config import InstancePromptConfig
from .engine.layout import Layout
from .engine.stack import StackInfo
from .nn.pooling import rms
from .text_start import TextStart


# The fields of all configs that `encode`, `place` and `generate` go by; a method's own count, too.
READ = ("num_virtual_tokens", "bottleneck_dim", "prompt_position", "separator_id", "init_weights", "condition")
INPUT = -1  # the depth of the input embeddings; layers count from 0


class Instances(NamedTuple):
    """The input of a generator at one depth.

    Attributes:
        states (`torch.Tensor`): Shape (G, n, w). The input of the layer, or the input embeddings, at the instruction's tokens.
        mask (`torch.BoolTensor`): Shape (G, n). False where an instance has fewer tokens.
        base_state (`torch.Tensor`): Shape (G, 1, w), detached. The state that a fresh prompt copies: the first token's, or,
            behind the instruction of a causal model, the last instruction token's.
        vector (`torch.Tensor`, *optional*): Shape (G, ...). The output of [`PromptGenerator.encode`].
    """

    states: torch.Tensor
    mask: torch.Tensor
    base_state: torch.Tensor
    vector: torch.Tensor | None = None


@dataclass(frozen=True)
class Source:
    """The input of [`PromptGenerator.encode`], before the stack runs.

    Attributes:
        token_ids (`torch.LongTensor`, *optional*): Shape (G, n). None if the model was called with embeddings.
        embeds (`torch.Tensor`): Shape (G, n, e). The input embeddings.
        mask (`torch.BoolTensor`): Shape (G, n). False where an instance has fewer tokens.
        instance_embeds (`torch.Tensor`, *optional*): Shape (G, k). The caller's vectors of the instances.
        frozen_states (`Callable`): Returns the last hidden states (G, n, d) of the stack without prompts, gradient and dropout.
            The pass is run at most once per call of the model.
        task_ids (`torch.LongTensor`, *optional*): Shape (G,). The caller's tasks of the instances.
    """

    token_ids: torch.Tensor | None
    embeds: torch.Tensor
    mask: torch.Tensor
    instance_embeds: torch.Tensor | None
    frozen_states: Callable[[], torch.Tensor]
    task_ids: torch.Tensor | None = None


class Placement(NamedTuple):
    """Where the slots of each instance stand, and which of them are used.

    Attributes:
        behind (`torch.BoolTensor`): Shape (G, l). True for slots behind the instruction, False for those before it.
        used (`torch.BoolTensor`, *optional*): Shape (G, l). False for slots that are not used. Default: all are.
    """

    behind: torch.Tensor
    used: torch.Tensor | None = None

    @property
    def live(self) -> torch.Tensor | None:
        """The name of `used` up to 0.2.0."""
        return self.used


# The tensors that `generate` reads at one depth, by name: each (a, b) of one adapter, or (G, a, b), one per instance.
Weights = Mapping[str, torch.Tensor]


class PromptGenerator(TextStart):
    """Base class of the generators.

    Every parameter that `generate` reads is an attribute of the generator itself. It has a first dimension over the depths that do
    not share it, and two or more further ones: a matrix (D, a, b), a vector (D, 1, a). [`index_at`] says which entry of each is read
    at a depth. `generate` gets these entries as `weights`, and computes with `@`, `+` and `*`, which broadcast: in a batch of several
    adapters each weight has a dimension over the instances in front. Parameters that only `encode` reads lie in submodules.

    Args:
        config (`InstancePromptConfig`): The adapter's config.
        info (`StackInfo`): The stack that it is made for.
        depths (`Iterable[int]`, *optional*): Where prompts are generated. Defaults to the config's `layers_to_transform`.

    Attributes:
        depths (`tuple[int]`): Where prompts are generated: layer numbers, and `INPUT` for the input embeddings.
        adds (`bool`): Whether the vectors are added to the states in the slots of a layer's input. False: they replace these
            states. At `INPUT` they always replace.
        first_visible_layer (`int`): The first layer that sees the slots. Those below run as if there were none: the slots are
            hidden from attention there, and take no place in the count of positions.
        num_slots (`int`): l.
        copies_last (`bool`): Whether `base_state` is that of the last instruction token: the slots stand behind it, and the next
            token is predicted at the last of them.
        paper (`bool`): Whether the generated part is the whole prompt, with no state that it is added to: `init_weights="paper"`.
        constant_condition (`bool`): Whether the prompts are to be the same for all instances: `condition="constant"`.
        feeds_constant (`bool`): Whether the base class provides the constant: l learned states (D, l, w), which `generate`
            gets in place of an instance's. A method with `encode`, or with a cheaper constant, sets it to False and provides its
            own.
        places_by_vector (`bool`): Whether `place` reads the output of `encode`.
    """

    adds = False
    first_visible_layer = 0
    feeds_constant = True
    places_by_vector = False

    def __init__(self, config: Any, info: StackInfo, depths: Iterable[int] | None = None):
        super().__init__()
        self.config = config
        self.num_slots: int = config.num_virtual_tokens
        self.paper: bool = config.init_weights == "paper"
        self.causal = info.causal
        self.copies_last: bool = info.causal and config.prompt_position == "end"
        self.depths: tuple[int, ...] = tuple(sorted(chosen_layers(config, info) if depths is None else depths))
        self._index: dict[int, dict[str, int]] = {}
        self.add_text(config, self.depths, info)
        self.constant_condition: bool = config.condition == "constant"
        if self.constant_condition and self.feeds_constant:
            widths = {info.embedding_size if depth == INPUT else info.hidden_size for depth in self.depths}
            if len(widths) > 1 or type(self).encode is not PromptGenerator.encode:
                raise TypeError(
                    f"{type(self).__name__} must set `feeds_constant = False` and learn a constant of its own for "
                    f"`condition='constant'`, as it has `encode` or reads states of several widths: {sorted(widths)}."
                )
            self.constant = nn.Parameter(torch.randn(len(self.depths), self.num_slots, *widths))  # (D, l, w)

    def zero_at_start(self, *last: nn.Parameter) -> None:
        """Let the generated part begin at zero, with `init_weights=True`. Call it at the end of `__init__`.

        Args:
            last (`nn.Parameter`): The last matrix and its bias: if they are zero, the generated part is.
        """
        if self.config.init_weights is True:
            for parameter in last:
                nn.init.zeros_(parameter)

    # ------------------------------------------------------------------------------------------- what a method defines

    @classmethod
    def check(cls, config: Any, info: StackInfo) -> None:
        """Raise a ValueError if the config does not fit the stack. Called before anything of the model is changed."""

    def begin(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Called once, when the generator has been made. `embed` gives the stack's input embeddings (n, e) of token ids (n,)."""

    def encode(self, source: Source) -> torch.Tensor | None:
        """A vector or vectors (G, ...) of each instance, made once per instance before the stack runs. None: not needed.

        Called for one adapter at a time, whose own parameters it may read.
        """
        return None

    def place(self, mask: torch.Tensor, vector: torch.Tensor | None) -> Placement:
        """Where the slots stand.

        Args:
            mask (`torch.BoolTensor`): Shape (G, n). The instruction's tokens.
            vector (`torch.Tensor`, *optional*): Shape (G, ...). The output of `encode`.
        """
        at_end = self.config.prompt_position == "end"
        return Placement(mask.new_full((len(mask), self.num_slots), at_end))  # (G, l)

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        """The generated part for one depth: (G, l, w); or (l, w) or (1, l, w) if it is the same for all instances.

        Args:
            instances (`Instances`): The instances.
            depth (`int`): The layer, or `INPUT`.
            weights (`Mapping[str, torch.Tensor]`): The parameters of this depth, by name.
        """
        raise NotImplementedError

    def index_at(self, depth: int) -> dict[str, int]:
        """The index along the first dimension of each parameter that `generate` reads at a depth, by name.

        Default: that of the depth, or 0 for a parameter with one entry, which all depths share.
        """
        at = self.depths.index(depth)
        return {name: at if len(p) > 1 else 0 for name, p in self.named_parameters(recurse=False)}

    def rows_at(self, depth: int) -> dict[str, int]:
        """The name of [`index_at`] up to 0.2.0. Generators that define this one work as before."""
        return self.index_at(depth)

    def start(self, instances: Instances, depth: int) -> torch.Tensor | None:
        """The state (G, 1, w) that the generated part is added to, in units of its root mean square. None: there is none."""
        return None if self.paper else instances.base_state

    def token_weights(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor | None:
        """The share of each token in each prompt vector, (G, l, n), where each row sums to 1. Only tools read it.

        None if the vectors of this depth are no weighted means over tokens, as with `condition="constant"`.
        """
        return None

    def attach_choice_gradient(
        self,
        widened: torch.Tensor,
        prompts: torch.Tensor,
        embeds: torch.Tensor,
        vector: torch.Tensor | None,
        layout: Layout,
        front: torch.Tensor,
        end: torch.Tensor,
    ) -> torch.Tensor:
        """Give gradients to choices that no number of `widened` shows: the places of the slots.

        Called where one adapter has the whole batch, one instance per row; for a packed batch, with a row per sequence, and zeros
        where a row is shorter.

        Args:
            widened (`torch.Tensor`): Shape (B, N, e). The input embeddings with the prompt vectors in their places.
            prompts (`torch.Tensor`): Shape (B, l, e). The output of `forward` for `INPUT`.
            embeds (`torch.Tensor`): Shape (B, S, e). The input embeddings without them.
            vector (`torch.Tensor`, *optional*): Shape (B, ...). The output of `encode`.
            layout (`Layout`): Where slots and tokens stand.
            front (`torch.LongTensor`): Shape (B,). The token before which the slots before the instruction stand.
            end (`torch.LongTensor`): Shape (B,). The token before which the slots behind it stand; `front <= end`.

        Returns:
            `torch.Tensor`: `widened`, with the same values.
        """
        return widened

    # --------------------------------------------------------------------------------------------- what the engine calls

    def forward(self, instances: Instances, depth: int, weights: Weights | None = None) -> torch.Tensor:
        """The prompt vectors (G, l, w) of one depth: `p = start + rms(start) * generated`, the start being the `init_text`'s or the
        method's. Where they are added to the states in the slots, there is no `start +`, since these states began with it.

        The first token is the attention sink of a causal model. A second copy of its state changes next to nothing, so an adapter
        whose `generated` begins at zero begins as a near no-op, where any other vector does great harm. The papers have no such
        term; with `init_weights="paper"` there is none.

        `instances`, `depth` and `weights` are those of `generate`, the weights by default the generator's own.
        """
        weights = self.weights(depth) if weights is None else weights
        start = self.text_state(weights)  # (l, w) or (G, l, w); below, (G, 1, w)
        start = self.start(instances, depth) if start is None else start
        if self.constant_condition and self.feeds_constant:
            states = weights["constant"].expand(len(instances.mask), -1, -1)  # (G, l, w)
            mask = instances.mask.new_ones(states.shape[:2])  # (G, l)
            instances = Instances(states, mask, instances.base_state)
        generated = self.generate(instances, depth, weights)  # (G, l, w), (1, l, w) or (l, w)
        if start is not None:
            start = start.to(generated.dtype)
            generated = rms(start) * generated  # (G, l, w)
            if depth == INPUT or not self.adds:
                generated = start + generated
        return generated.expand(len(instances.mask), -1, -1)  # (G, l, w)

    def weights(
        self, depth: int, unbound: Mapping[str, tuple[torch.Tensor, ...]] | None = None
    ) -> dict[str, torch.Tensor]:
        """The parameters of one depth, by name; from `unbound` parameters if a pass has made these."""
        index = self._full_index_at(depth).items()
        return {name: (getattr(self, name) if unbound is None else unbound[name])[at] for name, at in index}

    def unbind(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """The parameters that `generate` reads, one tensor per depth. Backward through `unbind` costs less than an index."""
        names = {name for depth in self.depths for name in self._full_index_at(depth)}
        return {name: getattr(self, name).unbind(0) for name in names}

    def _replicate_for_data_parallel(self) -> PromptGenerator:
        for depth in self.depths:
            self._full_index_at(depth)  # a replica has no parameters to ask
        return super()._replicate_for_data_parallel()

    def _full_index_at(self, depth: int) -> dict[str, int]:
        if depth not in self._index:  # found once: a batch of many adapters asks often
            self._index[depth] = {**self.rows_at(depth), **self.text_row(depth)}
        return self._index[depth]

    @property
    def activation_coefficients(self) -> nn.Parameter | None:
        """The coefficients (L, 1, 12) of rational activations, if the method has learned ones."""
        return None

    @property
    def signature(self) -> tuple:
        """Generators with equal signatures differ in their weights only, and run together in a batch of several adapters."""
        own = {field.name for field in fields(self.config)} - {field.name for field in fields(InstancePromptConfig)}
        read = [(name, repr(getattr(self.config, name))) for name in sorted({*READ, *own})]
        return type(self), self.from_text, self.depths, tuple(read), tuple(p.dtype for p in self.parameters())


def chosen_layers(config: Any, info: StackInfo) -> list[int]:
    """The layers of a config's `layers_to_transform`: all of the stack's if it is None."""
    layers = config.layers_to_transform
    return list(range(info.num_layers)) if layers is None else [layers] if isinstance(layers, int) else list(layers)


def stack_weights(of_adapters: Iterable[Weights]) -> dict[str, torch.Tensor]:
    """The weights of several adapters of one signature, one per instance: (G, a, b) each."""
    of_each = list(of_adapters)
    return {name: torch.stack([weights[name] for weights in of_each]) for name in of_each[0]}  # (G, a, b)
