# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The plain pass, which runs the stack without prompts: for methods that read the bare model's states, and to check the hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..generator import INPUT
from .calls import cache_of
from .passes import Pass, current_pass
from .stack import StackInfo, embed_ids, walk


def run_plain(
    stack: PreTrainedModel, call: dict[str, Any], segment_ids: torch.Tensor | None = None, running: Pass | None = None
) -> torch.Tensor:
    """The last hidden states (B, S, d) of the stack without prompts, gradient and dropout.

    Args:
        stack (`PreTrainedModel`): The stack.
        call (`dict`): Its arguments.
        segment_ids (`torch.LongTensor`, *optional*): Shape (B, S). As in [`Pass`].
        running (`Pass`, *optional*): The pass. Defaults to a plain pass with the `info` of the current one.
    """
    if running is None:
        outer = current_pass.get()
        running = plain_pass(stack, None if outer is None else outer.info)
        running.segment_ids = segment_ids
    token = current_pass.set(running)
    # Linear layers stay in training mode, since they have no dropout, and bitsandbytes repacks its own when they run in evaluation mode
    # on a CPU: no gradient passes through them afterwards.
    training = [module for _, module in walk(stack) if module.training and not isinstance(module, nn.Linear)]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            return stack(**{**call, "return_dict": True}).last_hidden_state
    finally:
        current_pass.reset(token)
        for module in training:
            module.training = True


def plain_pass(stack: PreTrainedModel, info: StackInfo | None) -> Pass:
    """A plain pass. The hooks of the stack that `info` describes work in it."""
    return Pass(stack, info, plain=True, attention=str(stack.config._attn_implementation))


def states_of_text(stack: PreTrainedModel, info: StackInfo, ids: Sequence[int]) -> dict[int, torch.Tensor]:
    """The states (n, w) of a text of n tokens, by depth: the input embeddings, and the input of each layer that runs.

    Args:
        stack (`PreTrainedModel`): The stack.
        info (`StackInfo`): Facts about it, those of the attached layer. Its hooks collect in this context's pass only, so that other
            threads may run the stack meanwhile.
        ids (`Sequence[int]`): The text's token ids.
    """
    tokens = torch.tensor([list(ids)], device=stack.get_input_embeddings().weight.device)  # (1, n)
    running = plain_pass(stack, info)
    running.states = {}
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    run_plain(stack, call, running=running)
    return {
        INPUT: embed_ids(stack, tokens[0]),
        **{depth: state[0] for depth, state in running.states.items()},
    }  # (n, w) each


def in_plain_pass(stack: nn.Module) -> bool:
    """True inside a plain pass of this stack. A different model that one of its hooks calls still gets its prompts."""
    running = current_pass.get()
    return running is not None and running.plain and running.stack is stack


# ------------------------------------------------------------------------------------------- layers without their hooks


def check_hooks_ran(running: Pass, info: StackInfo, call: dict[str, Any], skipped: set[tuple]) -> None:
    """Refuse a stack that runs a layer without its hooks, as `layer.forward(...)` does: the layer's prompts would be lost silently.

    A stack may also skip a layer: by layerdrop, by an early exit, or because the layer reads an image and there is none. To tell the
    two apart, the stack runs once more in each new case, and the layer's parameters are watched: a skipped layer does not use them.

    Args:
        running (`Pass`): The pass, which opened slots.
        info (`StackInfo`): Facts about the stack.
        call (`dict`): Its arguments.
        skipped (`set`): The cases in which the stack is known to skip layers. New ones are added.

    Raises:
        ValueError: A layer ran without the hook that it needs, or it cannot be seen whether it did.
    """
    depths = {depth for group in running.groups for depth in group.model.depths if depth != INPUT}
    depths.update(range(max(running.late_layers, default=0)))
    if running.segment_ids is not None and not running.attention.startswith("flash_attention"):
        depths.update(range(info.num_layers))
    if depths <= running.ran:
        return
    stack = running.stack
    mode = (stack.training, any(getattr(module, "gradient_checkpointing", False) for _, module in walk(stack)))
    missing = {depth for depth in depths - running.ran if (depth, *mode) not in skipped}
    if not missing:
        return
    name = info.layers_name.removeprefix(f"{info.name}.")
    layers: Any = stack.get_submodule(name)  # an `nn.ModuleList`
    lost = missing & depths_without_hook(running, layers, info.num_layers // len(layers), call)
    skipped.update((depth, *mode) for depth in missing - lost)
    if lost:
        number = min(lost) * len(layers) // info.num_layers
        raise ValueError(
            f"The forward hooks of '{name}.{number}' in {type(stack).__name__} did not run, so its prompts are lost: the stack "
            "may call `layer.forward(...)` instead of `layer(...)`. Use a method that writes to the input only."
        )


def depths_without_hook(running: Pass, layers: nn.ModuleList, runs: int, call: dict[str, Any]) -> set[int]:
    """The depths that run without their hook in one more run of the stack: in the same mode, without gradients and without a cache."""
    again = plain_pass(running.stack, running.info)
    again.states = {}
    name, _ = cache_of(call)
    call = {key: value for key, value in call.items() if key != name}
    used = UsedParameters()
    token = current_pass.set(again)
    try:
        with torch.no_grad(), used:
            running.stack(**{**call, "attention_mask": None, "use_cache": False, "return_dict": True})
    finally:
        current_pass.reset(token)
    seen = [used.any_of(layer) for layer in layers]
    # Offloading and other wrappers lend a layer different parameters for its call: then nothing can be seen.
    blind = not used.any_of(running.stack) or any(not seen[depth // runs] for depth in again.ran)
    return {depth for depth in range(len(layers) * runs) if depth not in again.ran and (blind or seen[depth // runs])}


class UsedParameters(TorchFunctionMode):
    """Records which tensors torch's functions get as arguments within the context, in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[int] = set()

    def any_of(self, module: nn.Module) -> bool:
        """Whether a parameter of a module was used."""
        return any(id(parameter) in self.ids for parameter in module.parameters())

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            self.ids.update(map(id, value) if isinstance(value, (list, tuple)) else (id(value),))
        return function(*args, **(kwargs or {}))
