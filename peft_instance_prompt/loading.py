# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Loading: an adapter's folder is refused whole, or it is loaded whole, and nothing else of the model is changed.

PEFT and transformers load what fits and let the rest pass: tensors that are missing keep their random start, and a tensor
that is named like one of the base model overwrites it. So [`guard_loading`] extends `PeftModel.from_pretrained`,
`PeftModel.load_adapter` and the `load_adapter` of transformers' models. These look at the folder first and note what its
config says of its weights; the tuner compares that with the tensors, by [`check_arrival`], when the adapter is in its place
and nothing has been loaded; and whatever fails is undone. Adapters of other packages are let pass.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper, load_peft_weights
from safetensors import SafetensorError, safe_open

from .attaching import undone_on_error
from .saving import PREFIX, digest, embedding_names


if TYPE_CHECKING:
    from .config import InstancePromptConfig

SHOWN = 3  # how many names an error tells of each kind


class Arrival(NamedTuple):
    """What is known of the weights that are on their way into a model.

    Attributes:
        source (`str`): Where they come from.
        sha256 (`str`, *optional*): Their digest, by the config that they were saved with.
        embeddings (`Sequence[str]`): Which embeddings of the base model are among them, by that config.
        weights (`Mapping[str, torch.Tensor]`, *optional*): The weights, where they have been read already.
    """

    source: str
    sha256: str | None
    embeddings: Sequence[str]
    weights: Mapping[str, torch.Tensor] | None = None

    @classmethod
    def of(cls, source: Any, config: InstancePromptConfig, weights: Mapping | None = None) -> Arrival:
        return cls(str(source), config.weights_sha256, config.saved_embedding_layers or (), weights)


_arrival: ContextVar[Arrival | None] = ContextVar("arrival", default=None)


@contextmanager
def announced(arrival: Arrival) -> Iterator[None]:
    token = _arrival.set(arrival)
    try:
        yield
    finally:
        _arrival.reset(token)


# ---------------------------------------------------------------------------------------------------------------- files


def read_kind(folder: Path) -> str | None:
    """The `peft_type` that a folder's config names; None if it has no config.

    Raises:
        ValueError: The config is no JSON object with a `peft_type`.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no adapter's config: {error!r}.") from error
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{file} is no adapter's config: its `peft_type` must be a text, got {kind!r}.")
    return kind


def check_files(folder: Path) -> None:
    """Raise a ValueError if an adapter's folder has no weights, or none that can be read. What is no folder is let pass.

    What is no regular file is refused unread: a pipe or a device may never come to an end.
    """
    if not folder.is_dir():  # a repository on the hub
        return
    files = [folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME]
    file = next((file for file in files if file.exists()), None)  # the one that PEFT takes
    if file is None:
        raise ValueError(f"The adapter folder {folder} has no weights: {files[0].name} is missing.")
    if not file.is_file():
        raise ValueError(f"The adapter's weights {file} are no regular file.")
    if file is files[0]:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except SafetensorError as error:
            raise ValueError(f"The adapter's weights {file} are not a readable safetensors file: {error}.") from error


def find_config(config_cls: type, model_id: Any, **kwargs: Any) -> InstancePromptConfig | None:
    """The config in a folder or on the hub; None if it is of another package.

    Args:
        config_cls (`type`): The base class of the configs that are wanted.
        model_id (`str`): The folder or the repository.
        **kwargs: As for [`~peft.PeftConfig.from_pretrained`].

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    folder = Path(model_id, kwargs.get("subfolder") or "")
    kind = read_kind(folder)
    kind = kind or PeftConfig._get_peft_type(model_id, **PeftConfig._split_kwargs(kwargs)[0])
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    own = cls is not None and issubclass(cls, config_cls)
    return cls.from_pretrained(model_id, **kwargs) if own else None


# -------------------------------------------------------------------------------------------------------------- tensors


def check_tensors(
    source: str,
    expected: Mapping[str, Sequence[int | None]],
    found: Mapping[str, torch.Tensor],
    beside: Collection[str] = (),
    sha256: str | None = None,
) -> None:
    """Raise a ValueError if an adapter's tensors are not those that are expected.

    Args:
        source (`str`): Where they come from; for the message.
        expected (`Mapping[str, Sequence[int | None]]`): Their names and shapes; None for a size that is not known.
        found (`Mapping[str, torch.Tensor]`): The tensors.
        beside (`Collection[str]`): Names of tensors that may be there as well, in any shape.
        sha256 (`str`, *optional*): The [`digest`] that they must have.
    """
    surplus = found.keys() - expected.keys() - set(beside)
    shapes = [
        f"{name!r} {as_text(found[name].shape)} where {as_text(shape)} is asked for"
        for name, shape in expected.items()
        if name in found and not fits(found[name].shape, shape)
    ]
    broken = [name for name, tensor in found.items() if not tensor.float().isfinite().all()]
    kinds = {
        "lack {} tensor(s) that the config asks for, such as {}": map(repr, sorted(expected.keys() - found.keys())),
        "hold {} tensor(s) that the config does not know, such as {}": map(repr, sorted(surplus)),
        "hold {} tensor(s) of another shape, such as {}": shapes,
        "hold {} tensor(s) with NaN or infinity, such as {}": map(repr, sorted(broken)),
    }
    complaints = []
    for text, names in kinds.items():
        if names := list(names):
            complaints.append(text.format(len(names), ", ".join(names[:SHOWN])))
    misfit = f"The weights in {source} {'; they '.join(complaints)}." if complaints else ""
    if sha256 is not None and digest(found) != sha256:
        raise ValueError(
            f"{source} is being rewritten: these are not the weights that its {CONFIG_NAME} was saved with. Load it again "
            f"later; if you have changed them yourself, remove `weights_sha256` from the config. {misfit}".strip()
        )
    if misfit:
        raise ValueError(misfit)


def as_text(shape: Sequence[int | None]) -> str:
    return "({})".format(", ".join("any" if size is None else str(size) for size in shape))


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(size in (None, found) for size, found in zip(wanted, shape))


def names_of(tuner_cls: type, model: torch.nn.Module, adapter_name: str) -> dict[str, str]:
    """The tensors of an adapter: `{its name in the model: its name in the adapter's file}`."""
    names = {key: tuner_cls._remove_adapter_name_from_key(key, adapter_name) for key in model.state_dict()}
    names = {key: name for key, name in names.items() if key != name}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, key in module.adapter_state_dict_load_map(adapter_name).items():
                names[f"{name}.{key}"] = f"{name}.{saved}"
    return names


def check_arrival(
    tuner_cls: type, model: torch.nn.Module, adapter_name: str, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Raise a ValueError if what is about to be loaded into an adapter is not that adapter, whole and nothing else.

    Args:
        tuner_cls (`type`): The tuner.
        model (`nn.Module`): The model with the adapter in its place, on its own or in a `PeftModel`.
        adapter_name (`str`): The adapter's name.
        weights (`Mapping[str, torch.Tensor]`, *optional*): The weights. Defaults to those that were announced. Nothing is
            checked if none were, or if no folder is being loaded.
    """
    arrival = _arrival.get()
    weights = arrival.weights if weights is None and arrival is not None else weights
    if arrival is None or weights is None:
        return
    names, tensors = names_of(tuner_cls, model, adapter_name), model.state_dict()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeddings = tuple(f"{name}." for name in embedding_names(base) if name in arrival.embeddings)
    names.update({key: key for key in tensors if embeddings and key.removeprefix(PREFIX).startswith(embeddings)})
    # PEFT has given the tensors of `modules_to_save` their names in the model already.
    saved = {key: name for key, name in names.items() if f".modules_to_save.{adapter_name}." in key}
    optional = PREFIX if base is model else ""  # in a PeftModel, what lacks the prefix would not be loaded
    found = {saved.get(key, key).removeprefix(optional): tensor for key, tensor in weights.items()}
    if len(found) < len(weights):
        raise ValueError(f"The weights in {arrival.source} hold a tensor under two names.")
    expected = {name.removeprefix(optional): tensors[key].shape for key, name in names.items()}
    check_tensors(arrival.source, expected, found, sha256=arrival.sha256)


# --------------------------------------------------------------------------------------------------------------- routes


def guard_loading(config_cls: type) -> None:
    """Make the three ways to load an adapter check those whose config is a `config_cls`, and undo what fails."""
    from peft import PeftModel
    from transformers.integrations.peft import PeftAdapterMixin

    build, load, load_native = (
        PeftModel.from_pretrained.__func__,
        PeftModel.load_adapter,
        PeftAdapterMixin.load_adapter,
    )

    @functools.wraps(build)
    def from_pretrained(
        cls, model, model_id, adapter_name="default", is_trainable=False, config=None, *args, **kwargs
    ):
        found = find_config(config_cls, model_id, **kwargs) if config is None else config
        if not isinstance(found, config_cls):
            return build(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)
        check_files(Path(model_id, kwargs.get("subfolder") or ""))
        with undone_on_error(model), announced(Arrival.of(model_id, found)):
            return build(cls, model, model_id, adapter_name, is_trainable, found, *args, **kwargs)

    @functools.wraps(load)
    def load_adapter(self, model_id, adapter_name, *args, **kwargs):
        if not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type], config_cls):
            return load(self, model_id, adapter_name, *args, **kwargs)
        arrival = _arrival.get()  # within `from_pretrained`, of the config that the adapter was made from
        if arrival is None:
            found, own = find_config(config_cls, model_id, **kwargs), self.peft_config.get(adapter_name)
            if own is not None and type(found) is not type(own):
                raise ValueError(
                    f"{model_id} holds no adapter of the type {own.peft_type.value}, as {adapter_name!r} is."
                )
            if found is None:  # PEFT says that the methods cannot be combined
                return load(self, model_id, adapter_name, *args, **kwargs)
            check_files(Path(model_id, kwargs.get("subfolder") or ""))
            arrival = Arrival.of(model_id, found)
        with undone_on_error(self), announced(arrival):
            try:
                return load(self, model_id, adapter_name, *args, **kwargs)
            except KeyError as error:  # PEFT looks the tensors of `modules_to_save` up before it asks the tuner
                if not str(error.args[0]).startswith(PREFIX):
                    raise
                lacks = f"The weights in {model_id} lack {error.args[0]!r}, which `modules_to_save` asks for."
                raise ValueError(lacks) from error

    @functools.wraps(load_native)
    def load_adapter_native(
        self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None, *args, **kwargs
    ):
        given = kwargs.get("load_config")
        source = peft_model_id or getattr(given, "pretrained_model_name_or_path", None)
        hub = {**getattr(given, "download_kwargs", {}), **(kwargs.get("download_kwargs") or {})}
        hub.update(kwargs.get("adapter_kwargs") or {}, local_files_only=kwargs.get("local_files_only", False))
        found = find_config(config_cls, source, **hub) if peft_config is None and source is not None else peft_config
        if not isinstance(found, config_cls):
            return load_native(self, peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
        weights = adapter_state_dict
        if weights is None:
            check_files(Path(source, hub.get("subfolder") or ""))
            weights = load_peft_weights(source, device="cpu", **PeftConfig._split_kwargs(hub)[0])
        arrival = Arrival.of(source or "the state dict", found, weights)
        with undone_on_error(self), announced(arrival):
            info = load_native(self, peft_model_id, adapter_name, found, weights, *args, **kwargs)
            if arrival.embeddings:
                self.tie_weights()  # transformers puts a new parameter in the place of the one that the head shares
        return info

    PeftModel.from_pretrained = classmethod(from_pretrained)
    PeftModel.load_adapter = load_adapter
    PeftAdapterMixin.load_adapter = load_adapter_native
