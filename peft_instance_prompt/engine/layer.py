# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The layer that is attached to a transformer stack: it holds the adapters and wires the hooks.

    stack forward             open:  embed the tokens, insert the slots, widen mask, positions and token types
    layer forward pre-hook    fill:  write the generated vectors into the slots of this layer's input
    stack forward             close: take the slots out of whatever the stack returns

No module of the base model is replaced. A hook finds this layer through the module that runs, since copies have layers of their own
and `DataParallel` replicas share hooks. `torch.compile` leaves the hooks out and compiles the code between them: a graph for each of
their cases would take long.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..generator import INPUT, InstanceGenerator
from .adapters import Group, group_rows, names_of_rows
from .cache import SlotCache
from .calls import CHECKPOINTS_HOOKS, LayerCall, by_name, cache_of, inputs_of
from .edits import begin_text, resume_edits
from .forward import Pass, attend_to_slots, before_layer, close_slots, current_pass, keep_context, release_context
from .open import in_plain_pass, open_slots, plain_pass, read_text
from .request import CALLERS, LAYERS, Request, check_kinds, current_request, forget, running_call
from .stack import StackInfo, callers, tree_of
from .widen import resume
from .wrap import Generate, GenerateBatch, InitContinuousBatching, MethodWrapper, NotedForward, wrappers


class InstancePromptLayer(nn.Module, BaseTunerLayer):
    """Holds one generator per adapter, and inserts their prompt vectors into a transformer stack.

    Args:
        info (`StackInfo`): The stack.
        prefix (`str`): The method's prefix, e.g. `"iapt_"`.
    """

    # Properties of PEFT's base class.
    active_adapters: list[str]
    disable_adapters: bool

    def __init__(self, info: StackInfo, prefix: str):
        super().__init__()
        self.info = info
        self.name = prefix.removesuffix("_")  # as a submodule of the stack
        # PEFT and transformers find a method's weights by the prefix in the attribute's name.
        self.adapter_layer_names = (prefix + "generator",)
        self.add_module(prefix + "generator", nn.ModuleDict())
        self.handles: list[Any] = []
        self.skipped: set[tuple] = set()  # what `check_hooks_ran` found out about the stack's code

    @property
    def generators(self) -> Any:  # an `nn.ModuleDict`, which has no type for its values
        return getattr(self, self.adapter_layer_names[0])

    def path_within(self, name: str) -> str:
        """The layer's name within a module, which is called `name` in the base model."""
        path = f"{self.info.name}.{self.name}".removeprefix(".")
        return path.removeprefix(f"{name}.") if name else path

    def update_layer(self, adapter_name: str, generator: InstanceGenerator) -> None:
        """Add an adapter. When it is in all layers, the tuner activates it, or the one that was active before."""
        self.generators[adapter_name] = generator

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter. Names of adapters that this layer does not have are ignored.

        Raises:
            ValueError: Several of the names are adapters of this layer.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(own := [name for name in names if name in self.generators]) > 1:
            raise ValueError(f"Only one instance-prompt adapter can be active at a time, got {own}.")
        super().set_adapter(names, inference_mode=inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError("Prompts that are generated from the instance cannot be merged into the base weights.")

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[None, None]:
        # There is no base layer, and PEFT would search for its weight for ever. None: loaded tensors stay on their device.
        return None, None

    # ------------------------------------------------------------------------------------------------------ hooks

    def register_hooks(self, model: nn.Module, stack: nn.Module, layers: nn.ModuleList) -> None:
        """Register the hooks on the base model, the stack and its layers."""
        StackForward(stack, self.name).install()
        for name, caller in callers(model, self.info.name).items():
            if not wrappers(caller, NotedForward):
                for wrapper in (NotedForward, Generate, GenerateBatch, InitContinuousBatching):
                    if hasattr(caller, wrapper.method):
                        wrapper(caller).install()
            vars(caller).setdefault(LAYERS, []).append(self.path_within(name))
            if name:
                vars(model).setdefault(CALLERS, []).append(name)
        if self.info.encoder_of_pair:
            for name in self.info.decoders:
                decoder = model.get_submodule(name)
                self.handles.append(decoder.register_forward_pre_hook(attend_to_slots, with_kwargs=True))
        runs = self.info.num_layers // len(layers)
        for number, layer in enumerate(layers):
            depths = range(number * runs, (number + 1) * runs)
            fill = partial(self._fill, self.info, depths)
            self.handles.append(layer.register_forward_pre_hook(fill, with_kwargs=True))

    def remove_hooks(self, model: nn.Module, stack: nn.Module, layers: nn.ModuleList) -> None:
        """Remove the hooks and wrappers. The last layer of this kind also removes those of the base model."""
        for handle in self.handles:
            handle.remove()
        for forward in wrappers(stack, StackForward):
            if forward.name == self.name:
                forward.remove()
        for name, caller in callers(model, self.info.name).items():
            drop_name(caller, LAYERS, self.path_within(name))
            if name:
                drop_name(model, CALLERS, name)
            if LAYERS not in vars(caller):
                for wrapper in wrappers(caller, MethodWrapper):
                    wrapper.remove()
        release_context(stack)

    @torch.compiler.disable
    def open(self, stack: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Before the stack runs: begin a pass, make it the current one, and return the arguments for the stack.

        A cache that was filled with slots or edits is gone on from: in a decoding step [`_go_on`] moves positions and masks, and no layer
        has anything to do but hide late slots (`Pass.concerns_layers`). Any other call begins a text.
        """
        call = by_name(stack, args, kwargs)
        (name, given), as_dict = cache_of(call), call.get("return_dict")
        running = Pass(
            stack,
            self.info,
            attention=str(stack.config._attn_implementation),
            cache=SlotCache.find(given),
            as_tuple=(stack.config.return_dict if as_dict is None else as_dict) is False,
        )
        current_pass.set(running)
        if name is not None and isinstance(given, SlotCache):
            call[name] = given.inner
        if running.cache is not None:
            call = self._go_on(running, running.cache, call, counts_slots=given is not running.cache)
        else:
            groups, names = self.groups_now(current_request(), inputs_of(call))
            if not groups:
                return call
            call = self._begin(running, groups, names, call)
        return {**call, "return_dict": True} if running.as_tuple else call

    def _go_on(self, running: Pass, cache: SlotCache, call: dict[str, Any], counts_slots: bool) -> dict[str, Any]:
        """The arguments for the stack of a pass that goes on from a cache, as every decoding step does."""
        running.table = cache.table
        if running.table.text is not None:
            running.groups = resume_edits(self.groups_now, current_request(), call, cache)
        return resume(self.info, call, cache, counts_slots=counts_slots)

    def _begin(
        self, running: Pass, groups: list[Group], names: list[str | None], call: dict[str, Any]
    ) -> dict[str, Any]:
        """The arguments for the stack of a pass that begins a text: find its scope, encode it, and open its slots."""
        stack, request, tokens = running.stack, current_request(), inputs_of(call)  # (B, S, ...)
        check_kinds(vars(request))
        if not self.info.decoder_of_pair:
            request = request.of_tokens(call.get("input_ids"), call.get("inputs_embeds"))
        text = read_text(stack, self.info, groups, call, request)
        call, running.groups, running.layout = open_slots(stack, self.info, groups, text, request, call)
        running.text = begin_text(groups, names, text, request, self.info)
        filled = cache_of(call)[1]
        if running.layout is not None:
            running.table, running.segment_ids = running.layout.table, running.layout.segment_ids
            running.table.text, running.table.drafts = running.text, request.drafts
        elif running.text is not None and filled is not None:
            running.table = running.text.table(tokens.shape[1], tokens.device)
        if running.table is not None and filled is not None:
            SlotCache(filled, running.table)  # RecurrentGemma does not return it: the caller's own comes back
        if request.opened is not None:
            request.opened(call)
        if CHECKPOINTS_HOOKS and torch.is_grad_enabled() and stack.training:
            keep_context(stack)
        return call

    def groups_now(self, request: Request, tokens: torch.Tensor) -> tuple[list[Group], list[str | None]]:
        """The adapter groups of a batch `tokens` (B, S, ...), and the names of its rows' adapters."""
        if self.disable_adapters:
            return [], [None] * len(tokens)
        now = (self.active_adapters, dict(self.generators._modules))
        active, generators = (request.adapters or {}).get(self, now)
        names = names_of_rows(active, len(tokens), request)
        return group_rows(generators, active, len(tokens), request, tokens.device), names

    # Not recursive: switching the compiler off and on costs more than all other work of this hook in a decoding step.
    @staticmethod
    @torch.compiler.disable(recursive=False)
    def _fill(info: StackInfo, depths: range, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        """Before a layer runs. The pass must be one of this hook's stack: its `info` tells."""
        running = current_pass.get()
        if running is None or running.info is not info or not running.concerns_layers:
            return None
        call = before_layer_uncompiled(running, info, depths, LayerCall(layer, args, kwargs))
        return call.args, call.kwargs

    @torch.compiler.disable
    def close(self, output: Any, call: dict[str, Any]) -> Any:
        """After the stack ran with `call`: return its output without slots."""
        running = current_pass.get()
        assert running is not None  # `open` has set it
        if running.groups:
            check_hooks_ran(running, self.info, call, self.skipped)
        return close_slots(running, self.info, output)


before_layer_uncompiled = torch.compiler.disable(before_layer)


class StackForward(MethodWrapper):
    """The forward of a stack: opens the slots, runs the stack, closes the slots."""

    method = "forward"

    def __init__(self, module: nn.Module, name: str):
        super().__init__(module)
        self.name = name

    @property
    def layer(self) -> Any:
        """The [`InstancePromptLayer`] of the stack. A copy or a replica of the stack has its own."""
        return self.module._modules[self.name]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            refuse_export(self.module)
        return self._opened(args, kwargs)

    @torch.compiler.disable(recursive=False)  # what it calls is compiled
    def _opened(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if in_plain_pass(self.module):
            return self.call_wrapped(*args, **kwargs)
        outer = current_pass.get()
        try:
            call = self.layer.open(self.module, args, kwargs)
            return self.layer.close(self.call_wrapped(**call), call)
        finally:
            current_pass.set(outer)


def drop_name(module: nn.Module, attribute: str, name: str) -> None:
    """Take a name out of a list that is an attribute of a module, and delete the attribute when the list is empty. The name is not
    there if attaching was interrupted before it was noted."""
    names = vars(module).get(attribute, [])
    if name in names:
        names.remove(name)
    if not names:
        vars(module).pop(attribute, None)


def refuse_export(stack: nn.Module) -> None:
    """Raise a ValueError within `torch.export`, which makes one graph for all inputs and cannot leave the hooks out."""
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7 on
    if is_exporting is not None and is_exporting():
        forget(running_call())  # torch runs no hooks here after an error, and the request of this call would stay
        raise ValueError(
            "Instance prompts cannot be exported with `torch.export`: where their slots stand depends on the values of masks and "
            "token ids. Use `torch.compile`, or export the base model after `unload()`."
        )


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
    mode = (
        stack.training,
        any(getattr(module, "gradient_checkpointing", False) for module in tree_of(stack).values()),
    )
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
