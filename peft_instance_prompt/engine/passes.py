# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The forward state of one pass of a stack. It is in a context variable, so that threads do not see each other's passes."""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .batch import Group
from .cache import SlotCache
from .layout import CachedText, Layout, SlotTable
from .stack import StackInfo, walk


@dataclass
class Pass:
    """One forward pass of a stack.

    Attributes:
        stack (`nn.Module`): The stack.
        info (`StackInfo`, *optional*): Facts about the stack, by which the hooks of its layers know their pass. None: no hook works.
        plain (`bool`): Whether this is a plain pass, without prompts.
        attention (`str`): The name of the stack's attention implementation.
        cache (`SlotCache`, *optional*): The cache with slots of an earlier pass, if this pass continues from it.
        layout (`Layout`, *optional*): Where the slots stand, if this pass opened any.
        table (`SlotTable`, *optional*): Which positions are slots, opened by this pass or an earlier one.
        text (`CachedText`, *optional*): What the cache that this pass fills is to keep of the text.
        groups (`list[Group]`): The adapter groups.
        segment_ids (`torch.LongTensor`, *optional*): Shape (B, N). The segment id of each position, if rows are packed: positions of
            different segments do not see each other.
        as_tuple (`bool`): Whether the caller wants a tuple.
        runs (`dict`): By the id of a layer: how many times it has run, less 1. ALBERT runs its layers several times.
        ran (`set[int]`): The depths whose hooks have run.
        states (`dict[int, torch.Tensor]`, *optional*): If it is a dict, it collects the input (B, N, d) of each layer, by depth.
        masks (`dict`): The masks made for layers that do not see all positions, with the masks that they replace.
    """

    stack: nn.Module
    info: StackInfo | None = None
    plain: bool = False
    attention: str = "eager"
    cache: SlotCache | None = None
    layout: Layout | None = None
    table: SlotTable | None = None
    text: CachedText | None = None
    groups: list[Group] = field(default_factory=list)
    segment_ids: torch.Tensor | None = None
    as_tuple: bool = False
    runs: dict[int, int] = field(default_factory=dict)
    ran: set[int] = field(default_factory=set)
    states: dict[int, torch.Tensor] | None = None
    masks: dict[tuple, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def late_layers(self) -> tuple[int, ...]:
        """The layers, except the stack's first, from which on some slots are seen."""
        return () if self.table is None else self.table.late_layers

    @property
    def concerns_layers(self) -> bool:
        """Whether the layers' hooks have work: slots to fill, tokens to edit, positions to hide, or states to collect."""
        return bool(self.groups) or self.segment_ids is not None or self.states is not None or bool(self.late_layers)


current_pass: ContextVar[Pass | None] = ContextVar("instance_prompt_pass", default=None)


class InContext:
    """A checkpoint function whose recomputation sees the context variables of the forward pass.

    For releases of transformers whose checkpoints hold a layer's hooks: these run again when backward recomputes the layer, long after
    the pass is over and perhaps in a different thread.
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
