# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""An adapter's folder: whether its files can be read, and whether its tensors are the expected ones.

Loading, saving and `python -m peft_instance_prompt` share these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open


PREFIX = "base_model.model."  # what PEFT puts before the names of a base model's modules
SHOWN = 3  # how many names an error tells of each kind


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
    """SHA-256 over the types, shapes and bytes of tensors; their names and devices do not count.

    Loading renames tensors and moves them to another device before this package sees them.
    """
    parts = []
    for tensor in weights.values():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # (bytes,)
        part = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        part.update(data.data)
        parts.append(part.hexdigest())
    return hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest()


def check_tensors(
    source: str,
    expected: Mapping[str, Sequence[int | None]],
    found: Mapping[str, torch.Tensor],
    beside: Collection[str] = (),
    expected_digest: str | None = None,
    whole: Collection[str] = (),
) -> None:
    """Raise a ValueError if an adapter's tensors are not those that are expected.

    Args:
        source (`str`): Where they come from; for the message.
        expected (`Mapping[str, Sequence[int | None]]`): Their names and shapes; None for a size that is not known.
        found (`Mapping[str, torch.Tensor]`): The tensors.
        beside (`Collection[str]`): Names of tensors that may be there as well, in any shape.
        expected_digest (`str`, *optional*): The [`digest`] that they must have.
        whole (`Collection[str]`): Names of expected tensors that hold whole numbers. The others hold floating-point numbers.
    """
    surplus = found.keys() - expected.keys() - set(beside)
    shapes = [
        f"{name!r} {as_text(found[name].shape)} where {as_text(shape)} is asked for"
        for name, shape in expected.items()
        if name in found and not fits(found[name].shape, shape)
    ]
    types = [
        f"{name!r} {str(found[name].dtype).removeprefix('torch.')}"
        for name in expected
        if name in found and (is_whole if name in whole else torch.is_floating_point)(found[name]) is False
    ]
    broken = [name for name, tensor in found.items() if not is_finite(tensor)]
    kinds = {
        "lack {} tensor(s) that the config asks for, such as {}": map(repr, sorted(expected.keys() - found.keys())),
        "hold {} tensor(s) that the config does not know, such as {}": map(repr, sorted(surplus)),
        "hold {} tensor(s) of another shape, such as {}": shapes,
        "hold {} tensor(s) of another type of numbers, such as {}": types,
        "hold {} tensor(s) with NaN or infinity, such as {}": map(repr, sorted(broken)),
    }
    complaints = []
    for text, names in kinds.items():
        if names := list(names):
            complaints.append(text.format(len(names), ", ".join(names[:SHOWN])))
    misfit = f"The weights in {source} {'; they '.join(complaints)}." if complaints else ""
    if expected_digest is not None and digest(found) != expected_digest:
        raise ValueError(
            f"{source} is being rewritten: these are not the weights that its {CONFIG_NAME} was saved with. Load it again "
            "later. If the writer was stopped, or you have changed the weights yourself, and the config is right for them, "
            f"remove `weights_digest` from it. {misfit}".strip()
        )
    if misfit:
        raise ValueError(misfit)


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def is_finite(tensor: torch.Tensor) -> bool:
    return bool(
        (tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all()
    )  # torch has no `isfinite` for 8-bit floats


def as_text(shape: Sequence[int | None]) -> str:
    return "({})".format(", ".join("any" if size is None else str(size) for size in shape))


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(size in (None, found) for size, found in zip(wanted, shape))


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
