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

"""What one forward pass of a stack needs between its hooks, kept in context variables: threads do not see each other's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import slots
from .cache import SlotCache, SlotTable, length
from .calls import forward_args, layer_cache
from .groups import Group
from .masks import hide
from .scope import latest_request


if TYPE_CHECKING:
    from .layer import InstancePromptLayer


@contextmanager
def no_trace() -> Iterator[None]:
    """Forget, in the end, passes and requests that an interrupt broke off: after a KeyboardInterrupt torch runs no hooks."""
    tokens = [(variable, variable.set(variable.get())) for variable in (current_pass, latest_request)]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


@dataclass
class Pass:
    """One forward pass of a stack, between its hooks.

    Attributes:
        owner (`InstancePromptLayer`): The layer whose hooks these are.
        attention (`str`): The name of the stack's attention implementation.
        cache (`SlotCache`, *optional*): The cache with the slots of an earlier pass, if this one goes on from it.
        layout (`Layout`, *optional*): Where the slots stand, if this pass opened some.
        table (`SlotTable`, *optional*): Which positions are slots, be they opened in this pass or before it.
        groups (`list[Group]`): The rows that have an adapter.
        as_tuple (`bool`): Whether the caller wants a tuple.
        runs (`dict`): How often each layer has run, for layers that are run several times.
        masks (`dict`): The masks that were made for layers which do not see all slots.
    """

    owner: InstancePromptLayer
    attention: str = "eager"
    cache: SlotCache | None = None
    layout: slots.Layout | None = None
    table: SlotTable | None = None
    groups: list[Group] = field(default_factory=list)
    as_tuple: bool = False
    runs: dict[int, int] = field(default_factory=dict)
    masks: dict[tuple, tuple[Any, Any]] = field(default_factory=dict)


current_pass: ContextVar[Pass | None] = ContextVar("instance_prompt_pass", default=None)
# The stacks that run without prompts. A model that a hook of such a stack calls still has its own.
frozen_stacks: ContextVar[tuple] = ContextVar("instance_prompt_frozen", default=())


def hide_late_slots(
    step: Pass, layer: nn.Module, depth: int, states: torch.Tensor, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a layer with a mask that hides the slots which it does not see yet."""
    names = forward_args(layer)
    if "attention_mask" not in names:
        raise ValueError(f"Slots cannot be hidden from {type(layer).__name__}, which takes no `attention_mask`.")
    place = names.index("attention_mask")
    mask = args[place] if place < len(args) else kwargs.get("attention_mask")
    cache = layer_cache(args, kwargs)
    num_queries, seen, start = states.shape[1], 0, 0
    num_keys = num_queries
    if cache is not None:
        seen = length(cache, depth)
        num_keys, start = cache.get_mask_sizes(num_queries, depth)
    # Layers of one kind share their mask. The mask is kept beside the one made of it, so that its id is not used again.
    stage = sum(depth < level for level in step.table.levels)
    key = (id(mask), stage, num_keys, start)
    if key not in step.masks:
        hidden = step.table.hidden_at(depth, start, num_keys).to(states.device)  # (B, num_keys)
        made = hide(mask, hidden, num_queries, seen, start, step.owner.info.causal, step.attention, states.dtype)
        step.masks[key] = mask, made
    made = step.masks[key][1]
    if place < len(args):
        return (*args[:place], made, *args[place + 1 :]), kwargs
    return args, {**kwargs, "attention_mask": made}


def run_frozen(stack: nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """The last hidden states (B, S, d) of the stack without prompts, gradient and dropout."""
    token = frozen_stacks.set((*frozen_stacks.get(), stack))
    # Not the linear layers, which drop nothing: bitsandbytes repacks its own when it sees them in evaluation on a CPU, and no
    # gradient passes through them any more.
    training = [module for module in stack.modules() if module.training and not isinstance(module, nn.Linear)]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            return stack(**{**kwargs, "return_dict": True}).last_hidden_state
    finally:
        frozen_stacks.reset(token)
        for module in training:
            module.training = True


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
    for module in stack.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, InContext):
            module._gradient_checkpointing_func = InContext(checkpoint)
