# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The state of one forward pass of a stack, in a context variable: threads do not see each other's passes."""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .batch import Group
from .cache import SlotCache
from .layout import Layout, SlotTable
from .stack import walk


if TYPE_CHECKING:
    from .layer import InstancePromptLayer


@dataclass
class Pass:
    """One forward pass of a stack.

    Attributes:
        stack (`nn.Module`): The stack.
        owner (`InstancePromptLayer`, *optional*): The layer whose hooks work in this pass. None: no hook does.
        plain (`bool`): Whether the stack runs without prompts.
        attention (`str`): The name of the stack's attention implementation.
        cache (`SlotCache`, *optional*): The cache with the slots of an earlier pass, if this one goes on from it.
        layout (`Layout`, *optional*): Where the slots stand, if this pass opened some.
        table (`SlotTable`, *optional*): Which positions are slots, opened in this pass or in an earlier one.
        groups (`list[Group]`): The rows that have an adapter.
        stretch (`torch.LongTensor`, *optional*): Shape (B, N). The number of each position's sequence within its row, where rows
            hold several: no position sees those of another.
        as_tuple (`bool`): Whether the caller wants a tuple.
        runs (`dict`): How often each layer has run, for layers that are run several times.
        ran (`set[int]`): The depths whose hook has run.
        states (`dict[int, torch.Tensor]`, *optional*): Collects the input (B, N, d) of each layer, by depth, if it is a dict.
        masks (`dict`): The masks that were made for layers which do not see all slots.
    """

    stack: nn.Module
    owner: InstancePromptLayer | None = None
    plain: bool = False
    attention: str = "eager"
    cache: SlotCache | None = None
    layout: Layout | None = None
    table: SlotTable | None = None
    groups: list[Group] = field(default_factory=list)
    stretch: torch.Tensor | None = None
    as_tuple: bool = False
    runs: dict[int, int] = field(default_factory=dict)
    ran: set[int] = field(default_factory=set)
    states: dict[int, torch.Tensor] | None = None
    masks: dict[tuple, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def late_layers(self) -> tuple[int, ...]:
        """The first layers that see the slots, where these are not the stack's first."""
        return () if self.table is None else self.table.late_layers

    @property
    def concerns_layers(self) -> bool:
        """Whether the hooks of layers have work: there are slots to fill, something to hide, or states to collect."""
        return self.layout is not None or self.stretch is not None or self.states is not None or bool(self.late_layers)


current_pass: ContextVar[Pass | None] = ContextVar("instance_prompt_pass", default=None)


class InContext:
    """A checkpoint function whose recomputation sees the context variables of the forward pass.

    Transformers before 5.23 runs a layer's hooks again when backward recomputes the layer, long after the pass is over
    and perhaps in another thread.
    """

    def __init__(self, checkpoint: Any):
        self.checkpoint = checkpoint

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(partial(copy_context().run, function), *args, **kwargs)


def keep_context(stack: nn.Module) -> None:
    """Wrap the checkpoint functions of a stack's layers.

    That is done in a call, and stays: checkpointing is switched on after an adapter is attached, at whatever module around the layers,
    and a wrapper that one call took away would be missing in another thread's.
    """
    for _, module in walk(stack):
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, InContext):
            setattr(module, "_gradient_checkpointing_func", InContext(checkpoint))


def release_context(stack: nn.Module) -> None:
    """Restore the checkpoint functions of a stack and its layers."""
    for module in stack.modules():
        if isinstance(checkpoint := getattr(module, "_gradient_checkpointing_func", None), InContext):
            module._gradient_checkpointing_func = checkpoint.checkpoint
