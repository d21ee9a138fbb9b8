# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""PEFT's ways to attach an adapter: they work on a copy of its config, and a failure leaves the model as it was."""

from __future__ import annotations

import copy
import functools
import inspect
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.config import PeftConfig
from peft.mixed_model import PeftMixedModel
from peft.peft_model import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, PeftType
from torch import nn

from .config import InstanceConfig
from .engine.layer import InstancePromptLayer
from .engine.stack import below, tree_of


def check_free(model: nn.Module, adapter_name: str | None, config: PeftConfig | None = None) -> None:
    """Raise a ValueError if a new adapter would take the place of adapters that the model has.

    Args:
        model (`nn.Module`): The model that an adapter is to be attached to.
        adapter_name (`str`, *optional*): The new adapter's name. None: no name is free, as for a `PeftModel` around the model.
        config (`PeftConfig`, *optional*): The new adapter's config.
    """
    wrapped = isinstance(model, (PeftModel, PeftMixedModel, BaseTuner))
    known = getattr(model, "peft_config", None) or {}
    if not wrapped:
        attached = bool(known) and any(isinstance(module, BaseTunerLayer) for module in model.modules())
        if not attached or (adapter_name is not None and adapter_name not in known):
            return  # a base model that another method was unloaded from still has the configs
    types = {PeftType(one.peft_type).value for one in known.values()}
    prompt = isinstance(model, PeftModel) and model._is_prompt_learning
    cure = "take the base model, `get_base_model()`," if prompt else "call `unload()`"
    if config is not None and types == {PeftType(config.peft_type).value}:
        cure = f"add the new one with `add_adapter`, or {cure}"
    raise ValueError(
        f"The model has adapters already, {reprlib.repr(list(known))} of {sorted(types)}, and a new one would take their place: {cure} first."
    )


# An attribute of a config while its adapter is attached or loaded. Such a config is a copy that nobody else has, and may be filled in.
_TAKEN = "_instance_prompt_taken"


def is_taken(config: PeftConfig) -> bool:
    """Whether a config is a copy already, which may be filled in."""
    return _TAKEN in vars(config)


def is_loading(config: PeftConfig) -> bool:
    """Whether weights are about to be loaded into the adapter that has this config."""
    return vars(config).get(_TAKEN) == "loading"


def mark_as_loading(config: Any) -> Any:
    config.__dict__[_TAKEN] = "loading"
    return config


def settle(config: InstanceConfig) -> None:
    """Take the mark off the config of an adapter that is loaded, and clear what describes the file."""
    config.__dict__.pop(_TAKEN, None)
    config.weights_digest = config.saved_embedding_layers = None


def guard_attaching() -> None:
    """Make the classes of `PeftModel` copy a config of this package, and refuse a second wrapper around a model with adapters.

    They refuse if the old or the new method is this package's. PEFT would write the new config over the old one, in a dict that both
    share.
    """
    for cls in (PeftModel, PeftMixedModel, *PeftModel.__subclasses__()):
        for name in ("__init__", "add_adapter"):
            if name in vars(cls):
                setattr(cls, name, _guarded(vars(cls)[name]))


def _guarded(method: Callable) -> Callable:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        model, config = call.arguments.get("model"), call.arguments["peft_config"]
        own = isinstance(config, InstanceConfig)
        if model is not None:
            known = getattr(model, "peft_config", None) or {}
            if own or any(isinstance(one, InstanceConfig) for one in known.values()):
                check_free(model, None, config)
        if not own or is_taken(config):
            return method(*call.args, **call.kwargs)
        # One copy for all: for classifiers, PEFT writes `modules_to_save` into it after it has handed it on.
        call.arguments["peft_config"] = taken = copy.deepcopy(config)
        taken.__dict__[_TAKEN] = "new"
        base = self.get_base_model() if model is None else model
        try:
            with taken_out_on_error(base, call.arguments.get("adapter_name", "default")):
                return method(*call.args, **call.kwargs)
        finally:
            del taken.__dict__[_TAKEN]

    return guarded


def remove_layer(model: Any, name: str, layer: InstancePromptLayer) -> None:
    """Take a layer and its hooks out of the base model."""
    stack_name, _, own = name.rpartition(".")
    stack = model.get_submodule(stack_name)
    layer.remove_hooks(model, stack, model.get_submodule(layer.info.layers_name))
    delattr(stack, own)


@contextmanager
def taken_out_on_error(model: Any, adapter_name: str) -> Iterator[None]:
    """If the block raises, take the adapter that it has added to a base model out again. Older adapters are active as before.

    All refusals come before anything is changed. This is for failures after that, such as an interrupt or a lack of memory.
    """
    kinds = (InstancePromptLayer, ModulesToSaveWrapper)
    modules = tree_of(model).values() if getattr(model, "peft_config", None) else ()  # else it has no adapters
    active = {module: module._active_adapter for module in modules if isinstance(module, kinds)}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    configs = getattr(model, "peft_config", None)  # PEFT writes into a dict that the base model may share
    known = dict(configs or {})
    try:
        yield
    except BaseException:
        if adapter_name in known:  # what has failed was to take an adapter's place, as a hot swap does
            raise
        present: dict[str, Any] = below(tree_of(model), "")
        for name, module in reversed(present.items()):
            if module in active:
                module._active_adapter = active[module]
                adapters = getattr(module, module.adapter_layer_names[0])
                if adapter_name in adapters:
                    del adapters[adapter_name]
            elif isinstance(module, InstancePromptLayer):
                remove_layer(model, name, module)
            elif isinstance(module, ModulesToSaveWrapper):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, module.original_module)
        for parameter, value in trained:
            parameter.requires_grad = value
        if configs is None:
            vars(model).pop("peft_config", None)
        else:
            configs.clear()
            configs.update(known)
        if not known:
            vars(model).pop("_hf_peft_config_loaded", None)  # transformers sets it before it attaches
        raise
