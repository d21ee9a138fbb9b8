# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What vLLM loads. Its entry point calls [`register`] in each of its processes.

Three doors look whether a folder of ours is named: `--lora-modules`, `--additional-config`, and vLLM's loader of LoRA folders. Where none
is, each returns vLLM's own result, and nothing else of vLLM is touched. Where one is, the engine's configuration names our scheduler and
our worker's methods, has no LoRA unless a LoRA is named, too, and the front end's calls are extended.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import points
from .adapters import is_own
from .package import read_kind


KEY = "instance_prompt"


def register() -> None:
    """Install the doors. A second call changes nothing."""
    for function in (from_cli_args, create_engine_config, from_local_dir):
        try:
            points.extend({function.__name__: function}, points.DOORS)
        except (ImportError, AttributeError) as error:  # another release: it serves everything but our folders
            logging.getLogger("vllm").warning("Instance prompts are not served: %s.", error)


def is_own_folder(folder: str) -> bool:
    """Whether a folder holds an adapter of this package; not if its config cannot be read, which is said when it is loaded."""
    try:
        return is_own(read_kind(Path(folder)))
    except (OSError, ValueError):
        return False


def from_cli_args(original: Callable, cls: type, args: Any) -> Any:
    """`--lora-modules`: a folder of ours among them asks for instance prompts, and one that is not for LoRA beside them."""
    engine_args = original(cls, args)
    modules = {module.name: module.path for module in getattr(args, "lora_modules", None) or ()}
    additional = engine_args.additional_config
    given = additional.get(KEY, {}) if isinstance(additional, dict) else None
    if not modules or not isinstance(given, dict):  # what is no object is refused later
        return engine_args
    from vllm.lora.utils import get_adapter_absolute_path

    own = {name: path for name, path in modules.items() if is_own_folder(get_adapter_absolute_path(path))}
    if own:
        beside = {"lora": True} if len(own) < len(modules) else {}
        engine_args.additional_config = {**additional, KEY: {**given, **beside, "folders": own}}
    return engine_args


def create_engine_config(original: Callable, args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Make the configuration of an engine for instance prompts, or refuse it before anything is loaded."""
    if not (isinstance(args.additional_config, dict) and KEY in args.additional_config):
        return original(args, *rest, **kwargs)
    from .release import untested_release

    if (complaint := untested_release()) is not None:
        raise ValueError(complaint)
    from . import complaints, front_calls
    from .internals import logger

    beside = bool(complaints.settings(args.additional_config).get("lora"))
    # LoRA would wrap every linear layer, and limit the adapters of a batch; on the CPU it switches compilation off.
    wanted, args.enable_lora = args.enable_lora, beside
    try:
        vllm_config = original(args, *rest, **kwargs)
    finally:
        args.enable_lora = wanted
    complaints.check(vllm_config)
    complaints.take_over(vllm_config)
    points.extend(front_calls.FUNCTIONS, points.FRONT)
    front_calls.front_of(vllm_config).read_named()
    logger.info("Instance prompts are served%s.", ", and LoRA beside them" if beside else "; LoRA is off")
    return vllm_config


def from_local_dir(original: Callable, cls: type, lora_path: str, *args: Any, **kwargs: Any) -> Any:
    """A folder of ours in an engine that serves LoRA only."""
    if is_own_folder(lora_path):
        from .release import untested_release

        raise ValueError(
            untested_release()
            or f"{lora_path} holds an instance-prompt adapter, which this engine was not started for: name one at the start "
            "(`--lora-modules`), or start it with `--additional-config '{\"instance_prompt\": {}}'`."
        )
    return original(cls, lora_path, *args, **kwargs)
