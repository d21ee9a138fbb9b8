# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Before an adapter is attached: find its stacks, fill in its config, refuse what does not fit, and tell the tensors that it will have."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Optional, Union

import psutil
import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, TaskType
from torch import nn

from .config import InstanceConfig
from .engine.calls import check_release, check_understood
from .engine.stack import StackInfo, Tree, below, describe, tree_of
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


class Prepared(NamedTuple):
    """What [`prepare`] finds out: the stacks that an adapter is for, and the tensors that its file has."""

    infos: list[StackInfo]
    expected: dict[str, Expected]


def prepare(config: InstanceConfig, model: nn.Module, adapter_names: Iterable[str]) -> Prepared:
    """Fill in what a config leaves to the base model, and refuse what does not fit before anything of the model is changed.

    Args:
        config (`InstanceConfig`): The config of a new adapter.
        model (`nn.Module`): The base model.
        adapter_names (`Iterable[str]`): The names of all adapters of the model, the new one's among them.

    Returns:
        `Prepared`: The adapter's stacks, and the tensors that its file has.
    """
    check_release()
    if config.trainable_token_indices is not None:
        raise ValueError(
            f"`trainable_token_indices` must be None, got {reprlib.repr(config.trainable_token_indices)}: only LoRA trains single "
            "embeddings. Add the tokens to model and tokenizer before the trainer is made, and train them with "
            "`modules_to_save=['embed_tokens', 'lm_head']`."
        )
    tree = tree_of(model)
    infos = find_targets(config, model, tree)
    for info in infos:
        check_slots(config, info)
        check_understood(tree[info.name], info.name, info.causal, below(tree, info.layers_name))
    check_task(config, infos, model)
    config.complete(model, infos)
    generators = {}
    for info in infos:
        check_fits(config, info)
        generators[info.name] = [generator := make_generator(config, info)]
        added = names_added(generator_path(config, info.name), generator, adapter_names)
        check_modules_to_save(config, tree, tree[info.layers_name], added)
        check_memory(generator, config, info.hidden_size)
    expected = expected_tensors(config, generators, tree)
    check_tensor_names(adapter_names, expected)
    for name in SIZES:
        if hasattr(config, name):
            setattr(config, name, getattr(infos[0], name))
    config.target_modules = [info.layers_name for info in infos]
    return Prepared(infos, expected)


def expected_for(config: InstanceConfig, model: nn.Module) -> dict[str, Expected]:
    """The [`expected_tensors`] of an adapter of a base model, from a config that is filled in."""
    tree = tree_of(model)
    infos = find_targets(config, model, tree)
    return expected_tensors(config, {info.name: [make_generator(config, info)] for info in infos}, tree)


def find_targets(config: InstanceConfig, model: nn.Module, tree: Tree) -> list[StackInfo]:
    """The stacks of a base model that an adapter is for; a ValueError if there are none. `tree` is the model's [`tree_of`]."""
    stacks = describe(model, tree)
    if not stacks:
        raise ValueError(
            f"No transformer stack to put a prompt into was found in {type(model).__name__}: none of its modules takes "
            "`input_ids` and `inputs_embeds`, has a table of embeddings and holds a list of layers. Give your text stack this form."
        )
    targets, excluded = config.target_modules, config.exclude_modules
    infos = [info for info in stacks if (not info.decoder_of_pair if targets is None else matches(targets, info))]
    names = [info.layers_name for info in stacks]
    if not infos and targets is None:
        raise ValueError(
            "The encoder takes audio or images, and its decoder tokens, where a prompt is generated from the start token alone: "
            f"set `target_modules={[info.name or info.layers_name for info in stacks]!r}`."
        )
    if not infos:
        raise ValueError(
            f"Leave `target_modules` out: {targets!r} names none of the stacks that hold prompts here, {names}, and by default "
            "the stack is found. Linear layers hold none."
        )
    infos = [info for info in infos if excluded is None or not matches(excluded, info)]
    if not infos:
        raise ValueError(f"`exclude_modules` {excluded!r} leaves none of the stacks that hold prompts: {names}.")
    return infos


def names_added(path: str, generator: nn.Module, adapter_names: Iterable[str]) -> list[str]:
    """The names of the modules that adapters with such a generator at a [`generator_path`] add to a base model."""
    within = [f".{name}" if name else "" for name, _ in generator.named_modules()]
    return [
        path.rpartition(".")[0],
        path,
        *(f"{path}.{adapter}{name}" for adapter in adapter_names for name in within),
    ]


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


def check_fits(config: InstanceConfig, info: StackInfo) -> None:
    """Raise a ValueError if the adapter was made for a stack of another size, or its method cannot work in this one."""
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
    check_slots(config, info)
    PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].generator_cls.check(config, info)


def check_slots(config: InstanceConfig, info: StackInfo) -> None:
    """Raise a ValueError if the adapter's method has slots, and none can stand in the stack."""
    if info.no_slots and not PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].generator_cls.edits:
        raise ValueError(
            f"{str(config.method).upper()} cannot be used here: {info.no_slots}. PreFT, which edits the instruction, has no slots."
        )


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
