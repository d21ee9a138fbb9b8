# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Before an adapter is attached: checks of its config and its name, and the tensors that it will have."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, Optional, Union

import psutil
import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.mixed_model import PeftMixedModel
from peft.peft_model import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, PeftType, TaskType
from torch import nn

from .config import InstanceConfig
from .engine.layer import InstancePromptLayer
from .engine.stack import StackInfo, Tree, below, tree_of
from .generator import InstanceGenerator


# The sizes of the adapter's stack that a config keeps.
SIZES = ("hidden_size", "num_layers", "vocab_size")
LONGEST_NAME = 255  # bytes in the name of a folder
PREFIX = "base_model.model."  # what PEFT puts before the names of a base model's modules
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # PEFT cannot wrap them


def check_adapter_name(name: str) -> None:
    """Raise a ValueError if no adapter can be called `name`: PEFT uses it as the name of a module and of a folder."""
    reserved = name == "__base__" or hasattr(nn.ModuleDict(), name) if isinstance(name, str) else True
    if reserved or not name or any(mark in name for mark in "./\\") or not name.isprintable():
        raise ValueError(
            f"An adapter cannot be named {name!r}: the name must be a text that can be printed, not empty, without '.', '/' and "
            "'\\', and none of '__base__' and the attributes of a module dict, such as 'keys' or 'training'."
        )
    if (size := len(name.encode())) > LONGEST_NAME:
        raise ValueError(
            f"An adapter's name can have up to {LONGEST_NAME} bytes, since it is saved in a folder of that name; "
            f"{name[:20]!r}... has {size}."
        )


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


def check_tensor_names(adapter_names: Iterable[str], keys: Iterable[str]) -> None:
    """Raise a ValueError if PEFT could not tell which adapter a tensor belongs to.

    Args:
        adapter_names (`Iterable[str]`): The names of all adapters. PEFT looks for `.NAME.` in the names
            of tensors. If the name of another adapter's tensor contains it, PEFT leaves that tensor out of the other file.
        keys (`Iterable[str]`): The new adapter's tensors, by their names in its file.
    """
    parts = {part for key in keys for part in key.split(".")}
    if clash := sorted({"base_model", "model", *parts}.intersection(adapter_names)):
        raise ValueError(f"An adapter cannot be named {clash[0]!r}: a part of its tensors' names is called so.")


def check_modules_to_save(config: PeftConfig, tree: Tree, layers: nn.Module, added: Collection[str]) -> None:
    """Raise a ValueError if `modules_to_save` names a module that PEFT cannot copy.

    Args:
        config (`PeftConfig`): The config. PEFT takes each module whose name *ends* with one of its `modules_to_save`.
        tree (`dict`): The base model's [`tree_of`].
        layers (`nn.ModuleList`): The stack's layers. A copy of a layer would have its hooks, and a copy of the stack the adapters in
            it.
        added (`Collection[str]`): The names of the modules that the adapter adds.
    """
    if not config.modules_to_save:
        return
    written = set(layers.children())
    parts = [
        f"{name}.{part}"
        for name, module in tree.items()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        for part, _ in module.named_modules()
        if part
    ]
    for wanted in config.modules_to_save:
        if any(name.endswith(wanted) for name in (*added, *parts)):
            raise ValueError(
                f"`modules_to_save` must name modules of the base model; {wanted!r} names a part of an adapter."
            )
        for name, module in tree.items():
            if not name.endswith(wanted):
                continue
            if isinstance(module, (*CONTAINERS, BaseTunerLayer)) or not written.isdisjoint(module.modules()):
                raise ValueError(
                    "`modules_to_save` must name modules that can be copied, such as a head: no lists, no adapters, and "
                    f"nothing that holds the layers which prompts are written between; {wanted!r} names {name!r}, a "
                    f"{type(module).__name__}."
                )


def make_generator(config: InstanceConfig, info: StackInfo) -> InstanceGenerator:
    """The generator of an adapter, without values: on the device `"meta"`.

    Raises:
        ValueError: The product of its sizes is no 64-bit number.
    """
    try:
        with torch.device("meta"):
            return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].generator_cls(config, info)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"An adapter of this size cannot be made ({sizes(config)}): {reason}.") from error


class Expected(NamedTuple):
    """A tensor of an adapter's file: its shape, None for a size that is not known, and whether it holds whole numbers."""

    shape: Sequence[int | None]
    whole: bool


def expected_tensors(
    config: InstanceConfig, generators: Mapping[str, Sequence[InstanceGenerator]], tree: Tree | None = None
) -> dict[str, Expected]:
    """The tensors of an adapter's file, by name.

    Args:
        config (`InstanceConfig`): The adapter's config.
        generators (`Mapping[str, Sequence[InstanceGenerator]]`): By the name of each stack, a generator without values. Several,
            where the base model is not known: a size that differs between them is not known either.
        tree (`dict`, *optional*): The base model's [`tree_of`], for the tensors of `modules_to_save` and of saved embeddings. Without it, no
            such tensors are among those expected.
    """
    expected = {}
    for stack, guesses in generators.items():
        path = PREFIX + generator_path(config, stack)
        first, *others = [generator.state_dict() for generator in guesses]
        for name in set(first).intersection(*others):
            sizes = zip(*(tensors[name].shape for tensors in (first, *others)))
            shape = [found[0] if len(set(found)) == 1 else None for found in sizes]
            expected[f"{path}.{name}"] = Expected(shape, is_whole(first[name]))
    for module_name, module in saved_modules(config, tree).items() if tree is not None else ():
        for name, tensor in module.state_dict().items():
            expected[f"{PREFIX}{module_name}.{name}"] = Expected(tensor.shape, is_whole(tensor))
    return expected


def generator_path(config: InstanceConfig, stack: str) -> str:
    """Where the generator of a stack lies in the base model; below it come the adapters' names, but not in a file."""
    prefix = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix
    return f"{stack}.{prefix.removesuffix('_')}.{prefix}generator".removeprefix(".")


def saved_modules(config: InstanceConfig, tree: Tree) -> dict[str, nn.Module]:
    """The modules of a base model that are saved in full with an adapter, by name: its `modules_to_save`, and embeddings."""
    ends = tuple(config.modules_to_save or ())
    kept = config.saved_embedding_layers or ()
    embeddings = set(embedding_names(tree[""]) if kept else ()).intersection(kept)
    found: dict[str, Any] = {}
    inside: tuple[str, ...] = ()  # what lies in adapters is no module of the base model
    for name, module in tree.items() if ends or embeddings else ():
        if name.startswith(inside):
            continue
        wrapped = isinstance(module, AuxiliaryTrainingWrapper)
        if wrapped or isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
        if name in embeddings or name.endswith(ends):
            found[name] = module.original_module if wrapped else module
    return found


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def embedding_names(model: torch.nn.Module) -> list[str]:
    """The names of a base model's input embeddings and of its head, without the copies that adapters have of them."""
    layers = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):  # no model of transformers, or one without
            continue
    return [
        name
        for name, module in model.named_modules()
        if any(module is layer for layer in layers) and not isinstance(module, AuxiliaryTrainingWrapper)
    ]


def sizes(config: InstanceConfig) -> str:
    """The sizes of an adapter that its config sets, for messages."""
    return ", ".join(f"`{name}` {getattr(config, name)}" for name in config.sized_by)


def check_memory(generator: InstanceGenerator, config: InstanceConfig, width: int) -> None:
    """Raise a ValueError if an adapter and one prompt that it generates are larger than this machine's memory.

    Args:
        generator (`InstanceGenerator`): From [`make_generator`].
        config (`InstanceConfig`): The config that it was made from.
        width (`int`): The width of a prompt vector.
    """
    prompt = 4 * width * generator.num_slots
    size = prompt + sum(tensor.nbytes for tensor in chain(generator.parameters(), generator.buffers()))
    if size > (memory := psutil.virtual_memory().total):
        raise ValueError(
            f"An adapter of this size cannot be made ({sizes(config)}): with one prompt it takes {size / 2**30:,.0f} GiB, and "
            f"this machine has {memory / 2**30:,.0f}."
        )


def matches(names: Union[str, Sequence[str]], info: StackInfo) -> bool:
    """Whether `names` mean a stack: a regular expression, or names or ends of names, of the stack or of its list of layers."""
    own = (info.name, info.layers_name)
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in own)
    return any(name == wanted or name.endswith("." + wanted) for name in own for wanted in names)


def check_sizes(config: InstanceConfig, info: StackInfo) -> None:
    """Raise a ValueError if the adapter was made for a stack of another size."""
    for name in SIZES:
        wanted, found = getattr(config, name, None), getattr(info, name)
        if wanted is not None and wanted != found:
            raise ValueError(
                f"The adapter was made for a base model with `{name}` {wanted}, but this one has {found}: "
                f"it does not fit {info.layers_name!r}."
            )
    layers = config.layers_to_transform
    layers = [layers] if isinstance(layers, int) else layers or []
    if outside := [number for number in layers if number >= info.num_layers]:
        raise ValueError(f"`layers_to_transform` must lie in 0..{info.num_layers - 1} for this model, got {outside}.")


def check_task(config: InstanceConfig, infos: Sequence[StackInfo], model: Optional[nn.Module] = None) -> None:
    """Raise a ValueError if the model is not made for the config's task, or PEFT cannot wrap it for that task."""
    task = config.task_type
    pair = any(info.encoder_of_pair or info.decoder_of_pair for info in infos)
    causal_lm = any(info.causal_lm for info in infos)
    undeclared = any(info.undeclared for info in infos)
    wrong = {
        TaskType.CAUSAL_LM: not (causal_lm or undeclared),
        TaskType.SEQ_2_SEQ_LM: not pair,
        TaskType.SEQ_CLS: causal_lm,
        TaskType.TOKEN_CLS: causal_lm,
        TaskType.QUESTION_ANS: causal_lm,
    }
    if wrong.get(task, False):
        kind = (
            "a causal language model"
            if causal_lm
            else "an encoder-decoder model"
            if pair
            else "a causal stack without a head that is known"
            if undeclared
            else "an encoder, a classifier or a model without causal attention"
        )
        raise ValueError(f"`task_type` {task!s} does not fit the base model, which is {kind}.")
    # PEFT takes it from the base model.
    if task == TaskType.CAUSAL_LM and model is not None and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type` {task!s} needs a base model that generates, and {type(model).__name__} has no "
            "`prepare_inputs_for_generation`. Leave `task_type` out: the labels that its forward gets tell the instruction."
        )


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
        attached: list[tuple[str, Any]] = [
            pair for pair in below(tree_of(model), "").items() if isinstance(pair[1], kinds)
        ]
        for name, module in reversed(attached):
            parent, _, own = name.rpartition(".")
            if module in active:
                module._active_adapter = active[module]
                adapters = getattr(module, module.adapter_layer_names[0])
                if adapter_name in adapters:
                    del adapters[adapter_name]
            elif isinstance(module, InstancePromptLayer):
                remove_layer(model, name, module)
            else:
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
