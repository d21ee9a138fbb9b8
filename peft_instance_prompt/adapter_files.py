# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""An adapter's folder: a reader gets an adapter as it was saved, or a refusal before anything of the model is changed.

Saving. PEFT and transformers write the files to their final places, one after the other. [`guard_saving`] extends their
`save_pretrained`: they write into a folder within the folder, the config gets the digest of the weights, and then each file takes the
place of the old one, the config last. In the moment between, and for good if the writer is killed then, the digest does not match.

Loading. PEFT and transformers load the tensors that fit and ignore the rest: missing tensors keep their random start, and one that is
named like a tensor of the base model overwrites it. [`guard_loading`] extends their three ways to load: they read the folder and
compare it with the expected tensors first. PEFT then reads it once more, and what it got is compared before it is loaded.

Adapters of other packages are saved and loaded as before.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.config import PeftConfig, PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.peft_model import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from .attaching import PREFIX, Expected, check_adapter_name, embedding_names, expected_for, is_whole, prepare
from .config import InstanceConfig
from .files import kind_of, read_kind, staged
from .guards import check_free, is_loading, mark_as_loading, settle, taken_out_on_error


SHOWN = 3  # how many names an error tells of each kind
# What a `PeftModel` for a task adds to the `modules_to_save` of its adapters.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


# ------------------------------------------------------------------------------------------------------------- reading


def check_files(folder: Path) -> None:
    """Raise a ValueError if an adapter's folder has no weights, or none that can be read. A name that is no folder passes.

    A file that is no regular file is refused unread: a pipe or a device may never end.
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


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the types, shapes and bytes of tensors. Not over their names and devices, which loading changes."""
    parts = []
    for tensor in weights.values():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # (bytes,)
        part = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        part.update(data.data)
        parts.append(part.hexdigest())
    return hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest()


def read_weights(
    model_id: str | os.PathLike, key_mapping: dict[str, str] | None = None, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """The tensors in a folder or on the hub, on the CPU. The arguments are those of `PeftModel.load_adapter`."""
    check_files(Path(model_id, kwargs.get("subfolder") or ""))
    hub = PeftConfig._split_kwargs(kwargs)[0]
    return load_peft_weights(str(model_id), device="cpu", key_mapping=key_mapping, **hub)


# ----------------------------------------------------------------------------------------------------------- comparing


def check_tensors(
    source: str,
    expected: Mapping[str, Expected],
    weights: Mapping[str, torch.Tensor],
    expected_digest: str | None,
    beside: Collection[str] = (),
    needs_prefix: bool = True,
) -> None:
    """Raise a ValueError if the tensors of an adapter's file are not those that are expected.

    Args:
        source (`str`): Where they come from; for the message.
        expected (`Mapping[str, Expected]`): The [`expected_tensors`].
        weights (`Mapping[str, torch.Tensor]`): The tensors.
        expected_digest (`str`, *optional*): The [`digest`] that they must have, from the config that they were saved with.
        beside (`Collection[str]`): Names of tensors that may be there as well, in any shape.
        needs_prefix (`bool`): Whether a tensor without PEFT's prefix would not be loaded, as in a `PeftModel`.
    """
    found = {key if needs_prefix or key.startswith(PREFIX) else PREFIX + key: x for key, x in weights.items()}
    if len(found) < len(weights):
        raise ValueError(f"The weights in {source} hold a tensor under two names.")
    both = [(name, found[name], *expected[name]) for name in sorted(expected.keys() & found.keys())]
    kinds = {
        "lack {} tensor(s) that the config asks for, such as {}": [
            repr(name) for name in sorted(expected.keys() - found.keys())
        ],
        "hold {} tensor(s) that the config does not know, such as {}": [
            repr(name) for name in sorted(found.keys() - expected.keys() - set(beside))
        ],
        "hold {} tensor(s) of another shape, such as {}": [
            f"{name!r} {as_text(tensor.shape)} where {as_text(shape)} is asked for"
            for name, tensor, shape, _ in both
            if not fits(tensor.shape, shape)
        ],
        "hold {} tensor(s) of another type of numbers, such as {}": [
            f"{name!r} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor, _, whole in both
            if not (is_whole if whole else torch.is_floating_point)(tensor)
        ],
        "hold {} tensor(s) with NaN or infinity, such as {}": [
            repr(name) for name in sorted(found) if not is_finite(found[name])
        ],
    }
    complaints = [text.format(len(names), ", ".join(names[:SHOWN])) for text, names in kinds.items() if names]
    misfit = f"The weights in {source} {'; they '.join(complaints)}." if complaints else ""
    if expected_digest is not None and digest(found) != expected_digest:
        raise ValueError(
            f"{source} is being rewritten: these are not the weights that its {CONFIG_NAME} was saved with. Load it again "
            "later. If the writer was stopped, or you have changed the weights yourself, and the config is right for them, "
            f"remove `weights_digest` from it. {misfit}".strip()
        )
    if misfit:
        raise ValueError(misfit)


def is_finite(tensor: torch.Tensor) -> bool:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # torch has no `isfinite` for 8-bit floats
    return bool(wide.isfinite().all())


def as_text(shape: Sequence[int | None]) -> str:
    return "({})".format(", ".join("any" if size is None else str(size) for size in shape))


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(size in (None, found) for size, found in zip(wanted, shape))


# -------------------------------------------------------------------------------------------------------------- saving


def seal(folder: Path, embeddings: list[str]) -> None:
    """Write two facts about the finished weights into the config beside them: their digest, and the embeddings among them.

    Args:
        folder (`Path`): A folder in which an adapter was just saved.
        embeddings (`list[str]`): The base model's [`embedding_names`].
    """
    weights = load_peft_weights(str(folder), device="cpu")
    # If a resized embedding is one of `modules_to_save`, PEFT saves its original and a second copy of it, too.
    doubles = {key for key in weights if {"original_module", "modules_to_save"} & set(key.split("."))}
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if doubles and file.is_file():
        weights = {key: tensor for key, tensor in weights.items() if key not in doubles}
        new = file.with_suffix(".new")  # the tensors may lie in the file itself
        save_file(weights, new, metadata={"format": "pt"})
        os.replace(new, file)
    names = [key.removeprefix(PREFIX) for key in weights]
    saved = [layer for layer in embeddings if any(name.startswith(f"{layer}.") for name in names)]
    config_file = folder / CONFIG_NAME
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.update(weights_digest=digest(weights), saved_embedding_layers=saved or None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def guard_saving() -> None:
    """Make `save_pretrained` of `PeftModel` and of transformers' models save this package's adapters in the way that this file describes."""
    for owner in (PeftModel, PreTrainedModel):
        owner.save_pretrained = _guarded(owner.save_pretrained, native=owner is PreTrainedModel)


def _guarded(save: Any, native: bool) -> Any:
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # A base model within a PeftModel knows the adapters' configs, but is saved without them.
        saves_adapters = not native or getattr(self, "_hf_peft_config_loaded", False)
        configs: dict[str, Any] = (getattr(self, "peft_config", None) or {}) if saves_adapters else {}
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        # transformers uploads to the hub from within `save_pretrained`, before a digest could be written. Loading then compares none.
        kinds = {config.peft_type.value for config in configs.values() if isinstance(config, InstanceConfig)}
        if not kinds or given.get("push_to_hub"):
            return save(self, save_directory, *args, **kwargs)
        base = self if native else self.get_base_model()
        cards = ["README.md", *(f"{name}/README.md" for name in configs)]
        with staged(save_directory, *cards) as stage:
            result = save(self, str(stage), *args, **kwargs)
            for file in stage.rglob(CONFIG_NAME):
                if read_kind(file.parent) in kinds and any(
                    (file.parent / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
                ):
                    seal(file.parent, embedding_names(base))
        return result

    return save_pretrained


# ------------------------------------------------------------------------------------------------------------- loading


def find_config(model_id: Any, **kwargs: Any) -> InstanceConfig | None:
    """The config in a folder or on the hub; None if it belongs to another package.

    A ValueError if there is none, or none that can be read. The arguments are as for [`~peft.PeftConfig.from_pretrained`].
    """
    folder = Path(model_id, kwargs.get("subfolder") or "")
    kind = read_kind(folder)
    kind = kind or PeftConfig._get_peft_type(model_id, **PeftConfig._split_kwargs(kwargs)[0])
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    own = cls is not None and issubclass(cls, InstanceConfig)
    return cls.from_pretrained(model_id, **kwargs) if own else None


def check_fit(
    source: str,
    config: InstanceConfig,
    weights: Mapping[str, torch.Tensor],
    model: nn.Module,
    adapter_name: str,
    task: str | None = None,
    needs_prefix: bool = True,
) -> None:
    """Raise a ValueError if a new adapter does not fit a base model, or has not the weights that its config was saved with.

    `model` is the base model, `task` the one that a `PeftModel` is made for; the others are as for [`check_tensors`].
    """
    check_adapter_name(adapter_name)
    trial = copy.deepcopy(config)
    trial.modules_to_save = [*(trial.modules_to_save or ()), *HEADS.get(task or "", ())]
    names = {*(getattr(model, "peft_config", None) or {}), adapter_name}
    expected = prepare(trial, model, names).expected
    check_tensors(source, expected, weights, config.weights_digest, needs_prefix=needs_prefix)


def check_arrived(model: PeftModel, adapter_name: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Compare once more what PEFT has read, which may be another file by now, before it loads that into an adapter."""
    config = model.peft_config[adapter_name]
    expected = expected_for(config, model.get_base_model())
    found = {key.replace(f".modules_to_save.{adapter_name}.", ".", 1): tensor for key, tensor in weights.items()}
    check_tensors(f"the folder of {adapter_name!r}", expected, found, config.weights_digest)
    settle(config)


def guard_loading() -> None:
    """Make the three ways to load an adapter of this package refuse one that does not fit, before they change anything."""
    check = PeftModel._check_new_adapter_config

    @functools.wraps(check)
    def check_new_adapter_config(self: Any, peft_config: PeftConfig, is_trainable: bool) -> None:
        # Only `load_adapter` calls it, with a config that it has read and makes an adapter of.
        check(self, peft_config, is_trainable=is_trainable)
        if isinstance(peft_config, InstanceConfig):
            mark_as_loading(peft_config)

    read = PeftConfigMixin.from_json_file.__func__

    @functools.wraps(read)
    def from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # PEFT's way to each config file; it asks the result for its method.
        content = read(cls, *args, **kwargs)
        return {**content, "peft_type": kind_of(content)} if "peft_type" in content else content

    PeftConfigMixin.from_json_file = classmethod(from_json_file)
    PeftModel._check_new_adapter_config = check_new_adapter_config
    PeftModel.from_pretrained = classmethod(_guard_from_pretrained(PeftModel.from_pretrained.__func__))
    PeftModel.load_adapter = _guard_load_adapter(PeftModel.load_adapter)
    PeftAdapterMixin.load_adapter = _guard_native(PeftAdapterMixin.load_adapter)


def _guard_from_pretrained(build: Any) -> Any:
    @functools.wraps(build)
    def from_pretrained(
        cls, model, model_id, adapter_name="default", is_trainable=False, config=None, *args, **kwargs
    ):
        found = find_config(model_id, **kwargs) if config is None else config
        if not isinstance(found, InstanceConfig):
            return build(cls, model, model_id, adapter_name, is_trainable, config, *args, **kwargs)
        check_free(model, None, found)
        renamed = {"key_mapping": getattr(model, "_checkpoint_conversion_mapping", None), **kwargs}
        check_fit(str(model_id), found, read_weights(model_id, **renamed), model, adapter_name, found.task_type)
        own = mark_as_loading(copy.deepcopy(found))
        with taken_out_on_error(model, adapter_name):
            return build(cls, model, model_id, adapter_name, is_trainable, own, *args, **kwargs)

    return from_pretrained


def _guard_load_adapter(load: Any) -> Any:
    @functools.wraps(load)
    def load_adapter(self, model_id, adapter_name, *args, **kwargs):
        own = self.peft_config.get(adapter_name)
        if not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[self.peft_type], InstanceConfig) or (own and is_loading(own)):
            return load(self, model_id, adapter_name, *args, **kwargs)  # or `from_pretrained` has compared
        found = find_config(model_id, **kwargs)
        if own is not None and type(found) is not type(own):
            raise ValueError(f"{model_id} holds no adapter of the type {own.peft_type.value}, as {adapter_name!r} is.")
        if found is None:  # PEFT says that the methods cannot be combined
            return load(self, model_id, adapter_name, *args, **kwargs)
        weights, base = read_weights(model_id, **kwargs), self.get_base_model()
        if own is None:
            task = next((config.task_type for config in self.peft_config.values()), None)
            check_fit(str(model_id), found, weights, base, adapter_name, task)
            with taken_out_on_error(base, adapter_name):
                return load(self, model_id, adapter_name, *args, **kwargs)
        try:  # PEFT takes no more than the weights from the folder
            mark_as_loading(own).weights_digest = found.weights_digest
            own.saved_embedding_layers = found.saved_embedding_layers
            check_tensors(str(model_id), expected_for(own, base), weights, own.weights_digest)
            return load(self, model_id, adapter_name, *args, **kwargs)
        finally:
            settle(own)

    return load_adapter


def _guard_native(load: Any) -> Any:
    @functools.wraps(load)
    def load_adapter(
        self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None, *args, **kwargs
    ):
        load_config = kwargs.get("load_config")
        source = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
        hub = {**getattr(load_config, "download_kwargs", {}), **(kwargs.get("download_kwargs") or {})}
        hub.update(kwargs.get("adapter_kwargs") or {}, local_files_only=kwargs.get("local_files_only", False))
        found = find_config(source, **hub) if peft_config is None and source is not None else peft_config
        if not isinstance(found, InstanceConfig):
            return load(self, peft_model_id, adapter_name, peft_config, adapter_state_dict, *args, **kwargs)
        name = adapter_name or "default"
        weights = read_weights(source, **hub) if adapter_state_dict is None else adapter_state_dict
        check_fit(str(source or "the state dict"), found, weights, self, name, needs_prefix=False)
        # Into a model that lies on disk in part, transformers loads from files only.
        reads = adapter_state_dict is None and "disk" in (getattr(self, "hf_device_map", None) or {}).values()
        own = mark_as_loading(copy.deepcopy(found))
        with taken_out_on_error(self, name):
            info = load(self, peft_model_id, name, own, None if reads else weights, *args, **kwargs)
            if reads and digest(read_weights(source, **hub)) != digest(weights):
                raise ValueError(f"{source} is being rewritten: load it again later.")
        if own.saved_embedding_layers:
            self.tie_weights()  # transformers puts a new parameter in the place of the one that the head shares
        settle(own)
        return info

    return load_adapter
