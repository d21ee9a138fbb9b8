# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Loading: an adapter's folder is refused whole, or it is loaded whole, and nothing else of the model is changed.

PEFT and transformers load the tensors that fit and ignore the rest: missing tensors keep their random start, and a tensor that
is named like one of the base model overwrites it. So [`guard_loading`] extends `PeftModel.from_pretrained`,
`PeftModel.load_adapter` and the `load_adapter` of transformers' models. These look at the folder first and note what its
config says of its weights. The tuner compares that with the tensors, by [`check_arrival`], when the adapter is in its place
and nothing has been loaded. A failed load is undone. Adapters of other packages are loaded as before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, AuxiliaryTrainingWrapper, load_peft_weights

from .attaching import undone_on_error
from .folder import PREFIX, check_files, check_tensors, digest, embedding_names, is_whole, read_kind


if TYPE_CHECKING:
    from peft.peft_model import PeftModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers import PreTrainedModel

    from .config import InstancePromptConfig


class Arrival(NamedTuple):
    """Weights that are about to be loaded into a model.

    Attributes:
        source (`str`): Where they come from.
        digest (`str`, *optional*): Their digest, from the config that they were saved with.
        embeddings (`Sequence[str]`): The embeddings of the base model among them, from that config.
        weights (`Mapping[str, torch.Tensor]`, *optional*): The weights, if they have been read already.
    """

    source: str
    digest: str | None
    embeddings: Sequence[str]
    weights: Mapping[str, torch.Tensor] | None = None

    @classmethod
    def of(cls, source: Any, config: InstancePromptConfig, weights: Mapping | None = None) -> Arrival:
        return cls(str(source), config.weights_digest, config.saved_embedding_layers or (), weights)


_arrival: ContextVar[Arrival | None] = ContextVar("arrival", default=None)


@contextmanager
def announced(arrival: Arrival) -> Iterator[None]:
    token = _arrival.set(arrival)
    try:
        yield
    finally:
        _arrival.reset(token)


def is_loading() -> bool:
    """Whether an adapter is being made whose weights are about to be loaded."""
    return _arrival.get() is not None


def find_config(config_cls: type, model_id: Any, **kwargs: Any) -> InstancePromptConfig | None:
    """The config in a folder or on the hub; None if it belongs to another package.

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


def names_of(
    tuner_cls: type[BaseTuner],
    model: PeftModel | PreTrainedModel,
    adapter_name: str,
    keys: Iterable[str] | None = None,
) -> dict[str, str]:
    """The tensors of an adapter: `{its name in the model: its name in the adapter's file}`.

    Args:
        tuner_cls (`type[BaseTuner]`): The tuner.
        model (`PreTrainedModel` or `PeftModel`): The model.
        adapter_name (`str`): The adapter's name.
        keys (`Iterable[str]`, *optional*): The names of the model's tensors, if they are known already.
    """
    keys = [key for key in (model.state_dict() if keys is None else keys) if f".{adapter_name}." in key]
    names = {key: tuner_cls._remove_adapter_name_from_key(key, adapter_name) for key in keys}
    names = {key: name for key, name in names.items() if key != name}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for saved, key in module.adapter_state_dict_load_map(adapter_name).items():
                names[f"{name}.{key}"] = f"{name}.{saved}"
    return names


def take_config(config: InstancePromptConfig) -> None:
    """Clear the fields of a config that describe a file, before an adapter is made from it.

    Raises:
        ValueError: It does not belong to the announced weights: it was rewritten before it was read.
    """
    arrival = _arrival.get()
    if arrival is not None and arrival.digest != config.weights_digest:
        raise ValueError(f"{arrival.source} is being rewritten: its {CONFIG_NAME} was replaced. Load it again later.")
    config.weights_digest = config.saved_embedding_layers = None


def check_arrival(
    tuner_cls: type[BaseTuner],
    model: PeftModel | PreTrainedModel,
    adapter_name: str,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Raise a ValueError if the weights for an adapter are not exactly its tensors.

    Args:
        tuner_cls (`type[BaseTuner]`): The tuner.
        model (`PreTrainedModel` or `PeftModel`): The model with the adapter in its place.
        adapter_name (`str`): The adapter's name.
        weights (`Mapping[str, torch.Tensor]`, *optional*): The weights. Defaults to those that were announced; nothing is
            checked if none were, or if no folder is being loaded.
    """
    arrival = _arrival.get()
    weights = arrival.weights if weights is None and arrival is not None else weights
    if arrival is None or weights is None:
        return
    tensors = model.state_dict()
    names = names_of(tuner_cls, model, adapter_name, tensors)
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
    whole = {name.removeprefix(optional) for key, name in names.items() if is_whole(tensors[key])}
    check_tensors(arrival.source, expected, found, expected_digest=arrival.digest, whole=whole)


def guard_loading(config_cls: type) -> None:
    """Make the three ways to load an adapter check adapters whose config is a `config_cls`, and undo failures."""
    from peft.peft_model import PeftModel
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
            return build(cls, model, model_id, adapter_name, is_trainable, copy.deepcopy(found), *args, **kwargs)

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
        load_config = kwargs.get("load_config")
        source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
        hub = {**getattr(load_config, "download_kwargs", {}), **(kwargs.get("download_kwargs") or {})}
        hub.update(kwargs.get("adapter_kwargs") or {}, local_files_only=kwargs.get("local_files_only", False))
        found = find_config(config_cls, source, **hub) if peft_config is None and source is not None else peft_config
        if not isinstance(found, config_cls):
            return load_native(self, peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
        weights = adapter_state_dict
        if weights is None:
            check_files(Path(source, hub.get("subfolder") or ""))
            weights = load_peft_weights(source, device="cpu", **PeftConfig._split_kwargs(hub)[0])
        arrival = Arrival.of(source or "the state dict", found, weights)
        # Into a model that lies on disk in part, transformers loads from files only.
        reads = adapter_state_dict is None and "disk" in (getattr(self, "hf_device_map", None) or {}).values()
        with undone_on_error(self), announced(arrival):
            given = None if reads else weights
            info = load_native(self, peft_model_id, adapter_name, copy.deepcopy(found), given, *args, **kwargs)
            if reads:
                again = load_peft_weights(source, device="cpu", **PeftConfig._split_kwargs(hub)[0])
                check_tensors(arrival.source, {}, again, again, digest(weights))
            if arrival.embeddings:
                self.tie_weights()  # transformers puts a new parameter in the place of the one that the head shares
        return info

    PeftModel.from_pretrained = classmethod(from_pretrained)
    PeftModel.load_adapter = load_adapter
    PeftAdapterMixin.load_adapter = load_adapter_native
