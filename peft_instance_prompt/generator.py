# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The contract between the engine and a method: a generator turns instances into prompt vectors, or into edits of their tokens.

A generator never sees rows, padding, responses or slots. It sees G instances, each with the states of its own instruction tokens.
A [`PromptGenerator`] returns l vectors for each, which the engine puts into slots; an [`EditGenerator`] returns what the engine adds to
these states.

Shapes: G instances, n instruction tokens, l prompt vectors, D depths, w the width of the states (d of the layers, e of the embeddings), k
the width of an instance vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn

from .config import InstanceConfig
from .engine.slots import Layout
from .engine.stack import StackInfo
from .nn.pooling import rms
from .text_start import TextStart


INPUT = -1  # the depth of the input embeddings; layers count from 0


class Instances(NamedTuple):
    """The input of a generator at one depth.

    Attributes:
        states (`torch.Tensor`): Shape (G, n, w). The input of the layer, or the input embeddings, at the instruction's tokens.
        mask (`torch.BoolTensor`): Shape (G, n). False where an instance has fewer tokens.
        base_state (`torch.Tensor`): Shape (G, 1, w), detached. The state that a fresh prompt copies: that of the first token, or, for slots
            behind the instruction of a causal model, that of the last instruction token. Empty, (G, 0, w), for an [`EditGenerator`].
        vector (`torch.Tensor`, *optional*): Shape (G, ...). The output of [`PromptGenerator.encode`]. Default: none.
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
        instance_embeds (`torch.Tensor`, *optional*): Shape (G, k). The instance vectors that the caller gave.
        frozen_states (`Callable`): Returns the last hidden states (G, n, d) of a plain pass: without prompts, gradients and dropout. The
            plain pass runs at most once per call of the model.
        task_ids (`torch.LongTensor`, *optional*): Shape (G,). The tasks that the caller gave.
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


# The tensors that `generate` reads at one depth, by name: (a, b) for one adapter, or (G, a, b), one entry per instance.
Weights = Mapping[str, torch.Tensor]


class InstanceGenerator(nn.Module):
    """Base class of the generators of all methods. A method derives from [`PromptGenerator`] or [`EditGenerator`].

    Every parameter that the generator reads at a depth is an attribute of the generator itself. Its first dimension goes over the depths
    that do not share it; two or more dimensions follow: a matrix is (D, a, b), a vector (D, 1, a). [`index_at`] says which entry of each
    parameter belongs to a depth. The generator gets these entries as `weights`, and computes with `@`, `+` and `*`, which broadcast: in a
    mixed batch, each weight has a dimension over the instances in front. Parameters that only `encode` reads lie in submodules.

    Args:
        config (`InstanceConfig`): The adapter's config.
        info (`StackInfo`): Facts about the stack.
        depths (`Iterable[int]`, *optional*): Where the adapter writes. Defaults to the config's `layers_to_transform`.

    Attributes:
        depths (`tuple[int]`): Where the adapter writes: layer numbers, and `INPUT` for the input embeddings.
        num_slots (`int`): l, the number of slots of an instance. 0: the adapter has none.
        edits (`bool`): Whether the adapter adds to the states of the instruction's tokens.
        first_visible_layer (`int`): The first layer that sees the slots. Defaults to 0. Layers below it run as if there were no slots:
            their attention does not see the slots, and the slots move no position ids.
        places_by_vector (`bool`): Whether `place` reads the output of `encode`. Defaults to False.
        from_text (`bool`): Whether the prompt begins as a text, `init_text`.
        defines (`str`): The name of the method that a subclass defines.
    """

    num_slots = 0
    edits = False
    first_visible_layer = 0
    places_by_vector = False
    from_text = False
    defines = "forward"

    def __init__(self, config: Any, info: StackInfo, depths: Iterable[int] | None = None):
        super().__init__()
        self.config = config
        self.causal = info.causal
        self.depths: tuple[int, ...] = tuple(sorted(chosen_layers(config, info) if depths is None else depths))
        self._index: dict[int, dict[str, int]] = {}

    def zero_at_start(self, *last: nn.Parameter) -> None:
        """Start the generated part at zero if `init_weights=True`. Call it at the end of `__init__`.

        Args:
            last (`nn.Parameter`): The last matrix and its bias, whose zeros make the generated part zero.
        """
        if self.config.init_weights is True:
            for parameter in last:
                nn.init.zeros_(parameter)

    # ------------------------------------------------------------------------------------------- what a method defines

    @classmethod
    def check(cls, config: Any, info: StackInfo) -> None:
        """Raise a ValueError if the config does not fit the stack. The tuner calls it before it changes the model."""

    def begin(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Called once, after the generator is made. `embed` returns the stack's input embeddings (n, e) for token ids (n,)."""

    def encode(self, source: Source) -> torch.Tensor | None:
        """One or several vectors (G, ...) for each instance, made once, before the stack runs. None, the default: not needed.

        The engine calls it for one adapter at a time, so it may read the generator's own parameters.
        """
        return None

    def index_at(self, depth: int) -> dict[str, int]:
        """The index along the first dimension of each parameter that the generator reads at a depth, by name.

        Default: that of the depth, or 0 for a parameter with one entry, which all depths share.
        """
        at = self.depths.index(depth)
        return {name: at if len(p) > 1 else 0 for name, p in self.named_parameters(recurse=False)}

    def rows_at(self, depth: int) -> dict[str, int]:
        """The name of [`index_at`] up to 0.2.0. Generators that define this one work as before."""
        return self.index_at(depth)

    # --------------------------------------------------------------------------------------------- what the engine calls

    def forward(self, instances: Instances, depth: int, weights: Weights | None = None) -> torch.Tensor:
        """The output of one depth: prompt vectors (G, l, w), or edits (G, n, w).

        Args:
            instances (`Instances`): The instances.
            depth (`int`): The layer, or `INPUT`.
            weights (`Mapping[str, torch.Tensor]`, *optional*): The parameters of this depth, by name. Default: the generator's own.
        """
        raise NotImplementedError

    def weights(
        self, depth: int, unbound: Mapping[str, tuple[torch.Tensor, ...]] | None = None
    ) -> dict[str, torch.Tensor]:
        """The parameters of one depth, by name; taken from `unbound`, the output of `unbind`, if it is given."""
        index = self._full_index_at(depth).items()
        return {name: (getattr(self, name) if unbound is None else unbound[name])[at] for name, at in index}

    def unbind(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """The parameters that the generator reads at its depths, unbound along their first dimension.

        Its backward is cheaper than that of indexing.
        """
        names = {name for depth in self.depths for name in self._full_index_at(depth)}
        return {name: getattr(self, name).unbind(0) for name in names}

    def _replicate_for_data_parallel(self) -> PromptGenerator:
        for depth in self.depths:
            self._full_index_at(depth)  # a replica has no parameters from which to find the index
        return super()._replicate_for_data_parallel()

    def _full_index_at(self, depth: int) -> dict[str, int]:
        if depth not in self._index:  # found once, since a batch of many adapters asks often
            self._index[depth] = {**self.rows_at(depth), **self.text_row(depth)}
        return self._index[depth]

    def text_row(self, depth: int) -> dict[str, int]:
        """The name of the buffer with the states of `init_text` at a depth, and their index in it; empty without a text."""
        return {}

    @property
    def activation_coefficients(self) -> nn.Parameter | None:
        """The coefficients (D, 1, 12) of learned rational activations. None, the default: the method has none."""
        return None

    @property
    def signature(self) -> tuple:
        """Generators with equal signatures differ only in their weights, and run together in a mixed batch."""
        shared = {"init_text", *(field.name for field in fields(InstanceConfig))}
        own = sorted({field.name for field in fields(self.config)} - shared)
        read = [(name, repr(getattr(self.config, name))) for name in own]
        return type(self), self.from_text, self.depths, tuple(read), tuple(p.dtype for p in self.parameters())


class PromptGenerator(TextStart, InstanceGenerator):
    """Base class of the generators of prompt vectors, which the engine writes into slots.

    Args:
        config (`InstancePromptConfig`): The adapter's config.
        info (`StackInfo`): Facts about the stack.
        depths (`Iterable[int]`, *optional*): Where prompts are generated. Defaults to the config's `layers_to_transform`.

    Attributes:
        adds (`bool`): Whether the vectors are added to the states in the slots of a layer's input. False, the default: they replace these
            states. At `INPUT` they always replace them.
        copies_last (`bool`): Whether `base_state` is that of the last instruction token, since the slots stand behind it and the next
            token is predicted at the last slot.
        paper (`bool`): Whether the generated part is the whole prompt, added to no state: `init_weights="paper"`.
        constant_condition (`bool`): Whether all instances get the same prompts: `condition="constant"`.
        feeds_constant (`bool`): Whether the base class provides the constant: l learned states (D, l, w), which `generate` gets in place
            of the instance's. Defaults to True. A method with `encode`, or with a cheaper constant, sets it to False and provides its own.

    Raises:
        TypeError: With `feeds_constant`, the class defines `encode` or reads states of several widths.
    """

    adds = False
    feeds_constant = True
    defines = "generate"

    def __init__(self, config: Any, info: StackInfo, depths: Iterable[int] | None = None):
        super().__init__(config, info, depths)
        self.num_slots: int = config.num_virtual_tokens
        self.paper: bool = config.init_weights == "paper"
        self.copies_last: bool = info.causal and config.prompt_position == "end"
        self.add_text(config, self.depths, info)
        self.constant_condition: bool = config.condition == "constant"
        if self.constant_condition and self.feeds_constant:
            widths = {info.embedding_size if depth == INPUT else info.hidden_size for depth in self.depths}
            if len(widths) > 1 or type(self).encode is not InstanceGenerator.encode:
                raise TypeError(
                    f"{type(self).__name__} must set `feeds_constant = False` and learn a constant of its own for "
                    f"`condition='constant'`, as it has `encode` or reads states of several widths: {sorted(widths)}."
                )
            self.constant = nn.Parameter(torch.randn(len(self.depths), self.num_slots, *widths))  # (D, l, w)

    # ------------------------------------------------------------------------------------------- what a method defines

    def place(self, mask: torch.Tensor, vector: torch.Tensor | None) -> Placement:
        """Where the slots stand. Default: behind the instruction if `prompt_position="end"`, else before it, and all are used.

        Args:
            mask (`torch.BoolTensor`): Shape (G, n). False where an instance has fewer tokens.
            vector (`torch.Tensor`, *optional*): Shape (G, ...). The output of `encode`.
        """
        at_end = self.config.prompt_position == "end"
        return Placement(mask.new_full((len(mask), self.num_slots), at_end))  # (G, l)

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        """The generated part of the prompt at one depth: (G, l, w), or (l, w) or (1, l, w) if it is the same for all instances.

        Args:
            instances (`Instances`): The instances.
            depth (`int`): The layer, or `INPUT`.
            weights (`Mapping[str, torch.Tensor]`): The parameters of this depth, by name.
        """
        raise NotImplementedError

    def adds_at(self, depth: int) -> bool:
        """Whether the vectors of a depth are added to the states in the slots. Default: if the method `adds`, at every layer."""
        return self.adds and depth != INPUT

    def start(self, instances: Instances, depth: int) -> torch.Tensor | None:
        """The state (G, 1, w) to which the generated part is added, in units of this state's root mean square. None: there is none."""
        return None if self.paper else instances.base_state

    def token_weights(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor | None:
        """The share (G, l, n) of each token in each prompt vector; the shares of a vector sum to 1. Only tools read them.

        None, the default, if the vectors of this depth are not weighted means over tokens, as with `condition="constant"`.
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
        """Attach the gradient of a discrete choice of position. Default: there is none.

        The engine calls it if one adapter has the whole batch, with one instance per row. The sequences of a packed batch get a row each,
        with zeros behind shorter ones.

        Args:
            widened (`torch.Tensor`): Shape (B, N, e). The input embeddings with the prompt vectors in their places.
            prompts (`torch.Tensor`): Shape (B, l, e). The output of `forward` for `INPUT`.
            embeds (`torch.Tensor`): Shape (B, S, e). The input embeddings without the prompt vectors.
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
        """The prompt vectors (G, l, w) of one depth: `p = start + rms(start) * generated`.

        The start is that of `init_text`, or the method's. If the method `adds`, `start +` is left out, since the states in the slots
        already contain it.

        The first token is the attention sink of a causal model. A second copy of its state changes next to nothing, so an adapter whose
        `generated` begins at zero begins as a near no-op; any other vector would do great harm. The papers have no such term, and
        `init_weights="paper"` leaves it out.

        Args:
            instances (`Instances`): The instances.
            depth (`int`): The layer, or `INPUT`.
            weights (`Mapping[str, torch.Tensor]`, *optional*): The parameters of this depth, by name. Default: the generator's own.
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
            if not self.adds_at(depth):
                generated = start + generated
        return generated.expand(len(instances.mask), -1, -1)  # (G, l, w)


class EditGenerator(InstanceGenerator):
    """Base class of the generators of edits, which the engine adds to the states of the instruction's tokens.

    Which tokens these are depends on their role in the text, see `engine/scope.py`. An edit of a token must depend on this token's own
    state only: in generation, the instruction may come in several parts.
    """

    edits = True
    defines = "edit"

    def edit(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        """What is added to each state: (G, n, w). Where `instances.mask` is False it is not read.

        Args:
            instances (`Instances`): The instances; their states are the layer's input at all n columns of their rows.
            depth (`int`): The layer.
            weights (`Mapping[str, torch.Tensor]`): The parameters of this depth, by name.
        """
        raise NotImplementedError

    def adds_at(self, depth: int) -> bool:
        """True: edits are added to the states."""
        return True

    def forward(self, instances: Instances, depth: int, weights: Weights | None = None) -> torch.Tensor:
        return self.edit(instances, depth, self.weights(depth) if weights is None else weights)  # (G, n, w)


def chosen_layers(config: Any, info: StackInfo) -> list[int]:
    """The layers in a config's `layers_to_transform`; all layers of the stack if it is None."""
    layers = config.layers_to_transform
    return list(range(info.num_layers)) if layers is None else [layers] if isinstance(layers, int) else list(layers)


def stack_weights(of_adapters: Iterable[Weights]) -> dict[str, torch.Tensor]:
    """The weights (G, a, b) of several adapters with equal signatures; `of_adapters` has one entry per instance."""
    of_each = list(of_adapters)
    return {name: torch.stack([weights[name] for weights in of_each]) for name in of_each[0]}  # (G, a, b)
