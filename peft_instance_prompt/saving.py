# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Saving: whoever reads a folder while it is written, or after the writer was killed, finds whole files that belong together.

PEFT and transformers write an adapter's files to their final places, one after the other, and have no hook around that. So
[`guard_saving`] extends their `save_pretrained`: they write into a folder within the folder, the config gets the digest of
the weights, and then each file takes the place of the old one, the config last. In the moment between, and for good if the
writer is killed then, the digest does not match, and `loading` refuses the folder. Adapters of other packages are
saved as before.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file

from .folder import PREFIX, digest, embedding_names, read_kind


STAGE = ".saving-"
LEFT_OVER = 3600  # seconds after which the files of a killed writer are removed


@contextmanager
def staged(folder: str | os.PathLike, *kept: str) -> Iterator[Path]:
    """A new folder to write into. When the block ends, each of its files replaces that of `folder`, a config after the weights.

    Args:
        folder (`str`): The folder. It is created if it is missing.
        *kept (`str`): Files of `folder` that are to be changed and not written anew; they are copied first.

    Raises:
        ValueError: `folder` is a file.
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
    """When a file's turn is. An adapter's config comes right after its weights: between, the adapter cannot be loaded."""
    return file.parent, file.name == CONFIG_NAME, file.name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


def seal(folder: Path, embeddings: list[str]) -> None:
    """Write two facts about the finished weights into the config beside them: their digest, and the embeddings among them.

    Args:
        folder (`Path`): A folder in which an adapter was just saved.
        embeddings (`list[str]`): The base model's [`embedding_names`].
    """
    weights = load_peft_weights(str(folder), device="cpu")
    # Of a resized embedding that is one of `modules_to_save`, PEFT saves the original and a second copy as well.
    doubles = {key for key in weights if {"original_module", "modules_to_save"} & set(key.split("."))}
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if doubles and file.is_file():
        weights = {key: tensor for key, tensor in weights.items() if key not in doubles}
        save_file(
            weights, file.with_suffix(".new"), metadata={"format": "pt"}
        )  # the tensors may lie in the file itself
        os.replace(file.with_suffix(".new"), file)
    names = [key.removeprefix(PREFIX) for key in weights]
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["weights_digest"] = digest(weights)
    config["saved_embedding_layers"] = [
        e for e in embeddings if any(name.startswith(e + ".") for name in names)
    ] or None
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def guard_saving(config_cls: type[PeftConfig]) -> None:
    """Make `save_pretrained` of `PeftModel` and of transformers' models save adapters with a `config_cls` as said above."""
    from peft.peft_model import PeftModel
    from transformers import PreTrainedModel

    for owner in (PeftModel, PreTrainedModel):
        owner.save_pretrained = _guarded(owner.save_pretrained, config_cls, native=owner is PreTrainedModel)


def _guarded(save: Any, config_cls: type[PeftConfig], native: bool) -> Any:
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        # A base model within a PeftModel knows the adapters' configs, but is saved without them.
        saves_adapters = not native or getattr(self, "_hf_peft_config_loaded", False)
        configs: dict[str, Any] = (getattr(self, "peft_config", None) or {}) if saves_adapters else {}
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        # To the hub, transformers uploads from within `save_pretrained`. Without a digest, nothing is compared in loading.
        kinds = {config.peft_type.value for config in configs.values() if isinstance(config, config_cls)}
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
