# Copyright 2026-present the peft_instance_prompt authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What a method's generator is: a module that turns an instance into prompt vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from .nn.pooling import last_index, rms
from .slots import Layout
from .stack import StackInfo


INPUT = -1  # the depth of the input embeddings; layers count from 0


class Instance(NamedTuple):
    """What a generator may know of the rows that it makes prompts for.

    Attributes:
        mask (`torch.BoolTensor`): Shape (B, N). The instruction tokens among the positions of `states`.
        first (`torch.LongTensor`): Shape (B,). The position of each row's first token that is not padding.
        vector (`torch.Tensor`, *optional*): Shape (B, k). What the method's encoder says of the instance.
        token_ids (`torch.LongTensor`, *optional*): Shape (B, S). The ids of the tokens.
    """

    mask: torch.Tensor
    first: torch.Tensor
    vector: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None


@dataclass
class Source:
    """What an encoder may read before the stack runs. Shapes: B rows, S tokens, width e of the embeddings, d of the stack.

    Attributes:
        input_ids (`torch.LongTensor`, *optional*): Shape (B, S); None if the model was called with embeddings.
        embeds (`torch.Tensor`): Shape (B, S, e). The input embeddings.
        mask (`torch.BoolTensor`): Shape (B, S). The instruction tokens.
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        instance_embeds (`torch.Tensor`, *optional*): Shape (B, k). Vectors that the caller gave.
        frozen_pass (`Callable`): Gives the last hidden states (B, S, d) of the stack without prompts, without gradient
            and without dropout; run at most once per call.
        rows (`torch.LongTensor`, *optional*): Shape (B,). Which rows of the batch these are; None for all.
    """

    input_ids: torch.Tensor | None
    embeds: torch.Tensor
    mask: torch.Tensor
    tokens: torch.Tensor
    instance_embeds: torch.Tensor | None
    frozen_pass: Callable[[], torch.Tensor]
    rows: torch.Tensor | None = None


class PromptGenerator(nn.Module):
    """Base class of the generators.

    Args:
        config (`InstancePromptConfig`): The adapter's config.
        info (`StackInfo`): The stack that it is made for.

    Attributes:
        depths (`tuple[int]`): Where `forward` is called: layer numbers, and `INPUT` for the input embeddings.
        adds (`bool`): Whether its vectors are added to what stands in the slots of a layer's input, and do not replace
            it. At `INPUT` they always replace.
        visible_from (`int`): The first layer in which the slots are seen. The layers below run as if there were none: they
            are hidden from attention there, and take no place in the count of positions.
    """

    adds = False
    visible_from = 0

    def __init__(self, config: Any, info: StackInfo):
        super().__init__()
        self.config = config
        self.num_slots: int = config.num_virtual_tokens
        layers = config.layers_to_transform
        layers = range(info.num_layers) if layers is None else [layers] if isinstance(layers, int) else layers
        self.depths: tuple[int, ...] = tuple(sorted(layers))
        self.causal = info.causal

    @classmethod
    def check(cls, config: Any, info: StackInfo) -> None:
        """Raise a ValueError if the config does not fit the stack. Called before anything of the model is changed."""

    def begin(self, embeddings: torch.Tensor) -> None:
        """Called once, when the generator has been made, with the stack's table of input embeddings (V, e)."""

    def encode(self, source: Source) -> torch.Tensor | None:
        """The instance vector (B, k), made once per instance before the stack runs; None if the method needs none."""
        return None

    def place(self, source: Source, instance: Instance) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where the slots stand: the token before which each stands (B, l), and which are live (B, l) or None for all."""
        if self.config.prompt_position != "end":
            before = instance.first + (self.config.prompt_position == "after_first")  # (B,)
        elif self.causal:
            before = last_index(instance.mask) + 1  # (B,)
        else:
            before = last_index(source.tokens)  # (B,), the end token
        return before[:, None].expand(-1, self.num_slots), None  # (B, l)

    def anchor_index(self, instance: Instance) -> torch.Tensor:
        """The token (B,) that prompt vectors which begin as a near no-op are copies of.

        It is the first one, but for slots that the next token is predicted at: these go on from the last instruction token.
        """
        at_end = self.causal and self.config.prompt_position == "end"
        return last_index(instance.mask) if at_end else instance.first

    def forward(self, states: torch.Tensor, instance: Instance, depth: int) -> torch.Tensor:
        """The prompt vectors for one depth.

        Args:
            states (`torch.Tensor`): Shape (B, N, d). The input of layer `depth`, or the input embeddings (B, S, e).
            instance (`Instance`): The rows, with positions that count in `states`.
            depth (`int`): The layer, or `INPUT`.

        Returns:
            `torch.Tensor`: Shape (B, l, d) or (B, l, e).
        """
        raise NotImplementedError

    def attach(
        self, widened: torch.Tensor, prompts: torch.Tensor, embeds: torch.Tensor, instance: Instance, layout: Layout
    ) -> torch.Tensor:
        """Give gradients to what is known of the instance and stands in no number of `widened`: where the slots stand.

        Called where one adapter has the whole batch.

        Args:
            widened (`torch.Tensor`): Shape (B, N, e). The input embeddings with the prompt vectors in their places.
            prompts (`torch.Tensor`): Shape (B, l, e). What `forward` gave for `INPUT`.
            embeds (`torch.Tensor`): Shape (B, S, e). The input embeddings without them.
            instance (`Instance`): The rows, with positions that count in `embeds`.
            layout (`Layout`): Where slots and tokens stand.

        Returns:
            `torch.Tensor`: `widened`, with the same values.
        """
        return widened

    def reads(self, states: torch.Tensor, instance: Instance, depth: int) -> torch.Tensor | None:
        """How much each prompt vector reads of each position of `states`: (B, l, N), of which each row sums to 1.

        For looking at only. None if the vectors of this depth are no weighted means over tokens.
        """
        return None

    def parameters_at(self, depth: int) -> Sequence[str]:
        """The names of the parameters that `forward` reads at this depth; a mixed batch stacks these over adapters."""
        return [name for name, _ in self.named_parameters()]

    @property
    def signature(self) -> tuple:
        """Generators with equal signatures differ in their weights only, and can run together in a mixed batch."""
        skip = {"response_template", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
        fields = sorted((name, repr(value)) for name, value in self.config.to_dict().items() if name not in skip)
        return type(self), tuple(fields)


def anchored(generated: torch.Tensor, states: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """`p = a + rms(a) * generated`, with `a` the state of the row's first token at this depth, detached.

    The first token is the attention sink of a causal model: a second copy of its state changes next to nothing, so an
    adapter whose `generated` starts at zero starts as a near no-op, where any other vector does great harm. The papers
    have no such term; `init_weights="paper"` does without it.

    Args:
        generated (`torch.Tensor`): Shape (B, l, d).
        states (`torch.Tensor`): Shape (B, N, d).
        first (`torch.LongTensor`): Shape (B,).

    Returns:
        `torch.Tensor`: Shape (B, l, d), in the dtype of `generated`.
    """
    anchor = state_at(states, first).to(generated.dtype)  # (B, 1, d)
    return anchor + rms(anchor) * generated  # (B, l, d)


def state_at(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The state (B, 1, d) of one token per row, detached."""
    return states.gather(1, index[:, None, None].expand(-1, 1, states.shape[-1])).detach()  # (B, 1, d)


class Ready(NamedTuple):
    """What running several adapters together needs of them, made once for all depths.

    Attributes:
        shell (`nn.Module`): What [`shell_of`] makes of the first.
        weights (`dict[PromptGenerator, dict[str, nn.Parameter]]`): The parameters of each, by name.
    """

    shell: nn.Module
    weights: dict[PromptGenerator, dict[str, nn.Parameter]]

    @classmethod
    def of(cls, generators: Sequence[PromptGenerator]) -> Ready:
        return cls(
            shell_of(generators[0]), {generator: dict(generator.named_parameters()) for generator in generators}
        )


def run_together(
    generators: Sequence[PromptGenerator],
    states: torch.Tensor,
    instance: Instance,
    depth: int,
    ready: Ready | None = None,
) -> torch.Tensor:
    """The prompt vectors of rows that have different adapters of one signature, in one batched call.

    Args:
        generators (`Sequence[PromptGenerator]`): The adapter of each of B rows, or one for all of them.
        states, instance, depth: As in [`PromptGenerator.forward`].
        ready (`Ready`, *optional*): Made here if it is not given.

    Returns:
        `torch.Tensor`: Shape (B, l, d).
    """
    model = generators[0]
    if all(generator is model for generator in generators):
        return model(states, instance, depth)
    shell, weights = Ready.of(generators) if ready is None else ready
    names = model.parameters_at(depth)
    stacked = {n: torch.stack([weights[generator][n] for generator in generators]) for n in names}  # (B, *shape)

    def one_row(weights: dict[str, torch.Tensor], states: torch.Tensor, instance: Instance) -> torch.Tensor:
        row = Instance(*(None if field is None else field[None] for field in instance))
        # no tensor of a generator has two names, and to look for such ones at each depth takes time
        return torch.func.functional_call(shell, weights, (states[None], row, depth), tie_weights=False)[0]  # (l, d)

    batched = Instance(*(None if field is None else 0 for field in instance))
    return torch.func.vmap(one_row, in_dims=(0, 0, batched))(stacked, states, instance)  # (B, l, d)


def shell_of(module: nn.Module, made: dict[int, nn.Module] | None = None) -> nn.Module:
    """A copy that shares all tensors, for `functional_call`: it puts its tensors into the module that it is given, where
    another thread, which runs the same adapter, would find them."""
    made = {} if made is None else made
    shell = made[id(module)] = module.__new__(type(module))
    # A module that uses another's tensors, as PHM layers can, keeps it in a tuple.
    known = {k: tuple(made.get(id(x), x) for x in v) for k, v in module.__dict__.items() if isinstance(v, tuple)}
    shell.__dict__ = {**module.__dict__, **known, "_parameters": dict(module._parameters)}
    shell._modules = {name: shell_of(child, made) for name, child in module._modules.items()}
    return shell


def names_in(module: nn.Module, *parts: str) -> list[str]:
    """The names of the parameters of some of a module's parts."""
    return [name for part in parts for name, _ in module.get_submodule(part).named_parameters(prefix=part)]
