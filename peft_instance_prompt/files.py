# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A folder on this machine: whose adapter it holds, and how its files are replaced together."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME


# Where PEFT itself has a method of the same name: by the `peft_type` and the package in a config file, the `peft_type` here.
RENAMED: dict[tuple[str, str], str] = {}
STAGE = ".saving-"
LEFT_OVER = 3600  # seconds after which the files of a killed writer are removed


def read_kind(folder: Path) -> str | None:
    """The `peft_type` that a folder's config names, as [`kind_of`]; None if it has no config.

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
    kind = kind_of(content) if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{file} is no adapter's config: its `peft_type` must be a text, got {kind!r}.")
    return kind


def kind_of(content: dict[str, Any]) -> Any:
    """The `peft_type` of what a config file holds, under the name that the method has in this process."""
    kind, package = content.get("peft_type"), content.get("import_first")
    return RENAMED.get((kind, package), kind) if isinstance(kind, str) and isinstance(package, str) else kind


@contextmanager
def staged(folder: str | os.PathLike, *kept: str) -> Iterator[Path]:
    """A new folder to write into. When the block ends, each of its files replaces that of `folder`, a config after the weights.

    The files `kept` are to be changed and not written anew; they are copied first. A ValueError if `folder` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"Provided path ({folder}) should be a directory, not a file")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(STAGE + "*"):
        with suppress(FileNotFoundError):  # another writer's, who is done
            if time.time() - old.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=STAGE, dir=folder) as outer:
        stage = Path(outer, "files")  # not `outer`: Trainer takes a folder with weights in it for another adapter's
        stage.mkdir()
        for name in kept:
            if (folder / name).is_file():
                (stage / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, stage / name)
        yield stage
        files = {file: folder / file.relative_to(stage) for file in stage.rglob("*") if file.is_file()}
        for target in files.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        for file in sorted(files, key=_turn):
            os.replace(file, files[file])


def _turn(file: Path) -> tuple[Path, bool, bool]:
    """The order in which files are replaced. An adapter's config follows its weights directly: in between, it cannot be loaded."""
    return file.parent, file.name == CONFIG_NAME, file.name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
