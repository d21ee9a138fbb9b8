# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Behind the front end: the engine core, which schedules requests, and its workers, which run the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import internals
from .adapters import Store, describe_base
from .hooks import filled
from .plan import make_plan


# ---------------------------------------------------------------------------------------------------------- the engine core


@dataclass
class Keys:
    """The adapters of an engine core, by key.

    Attributes:
        resident (`set[str]`): Those that the workers have loaded.
        leaving (`set[str]`): Those that are unloaded when the last request with them ends.
    """

    resident: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)


def keys_of(core: Any) -> Keys:
    """The keys of an engine core, which holds them itself."""
    if not hasattr(core, "instance_prompts"):
        core.instance_prompts = Keys()
    return core.instance_prompts


def load_instance_prompt(core: Any, key: str, folder: str) -> str:
    """Load an adapter into all workers. Returns a complaint, which is empty if all have loaded it."""
    keys = keys_of(core)
    release(core)
    if key not in keys.resident:
        answers = internals.call_workers(core, load_into, key, folder)
        if complaint := next(filter(None, answers), ""):
            internals.call_workers(core, drop_from, key)
            return complaint
    keys.resident.add(key)
    keys.leaving.discard(key)
    return ""


def remove_instance_prompt(core: Any, key: str) -> None:
    """Unload an adapter, at once or when the last request with it ends."""
    keys_of(core).leaving.add(key)
    release(core)


def release(core: Any) -> None:
    """Unload the leaving adapters that no request has."""
    keys = keys_of(core)
    for key in keys.leaving - internals.keys_in_use(core) if keys.leaving else ():
        internals.call_workers(core, drop_from, key)
        keys.resident.discard(key)
        keys.leaving.discard(key)


def admit(original: Callable, core: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Extends `EngineCore.add_request`: fail a request whose adapter is not resident."""
    placed = internals.placed_of(request)
    if placed is not None:
        if placed.key not in keys_of(core).resident:
            reason = f"The adapter of request {request.request_id} was unloaded before the request came."
            return internals.fail_request(core, request, reason)
        request.lora_request = None  # the engine then treats it as a request to the base model
    return original(core, request, *args, **kwargs)


# --------------------------------------------------------------------------------------------------------------- the worker


def load_into(runner: Any, key: str, folder: str) -> str:
    """Load an adapter into a worker. Returns a complaint, which is empty if it is loaded."""
    try:
        if not hasattr(runner, "instance_prompts"):
            with internals.known_to_models(runner.vllm_config):
                info = describe_base(runner.model_config.hf_config)
            runner.instance_prompts = Store(info, internals.find_layers(runner, info.num_layers), runner.device)
        runner.instance_prompts.load(key, folder)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def drop_from(runner: Any, key: str) -> None:
    """Unload an adapter from a worker."""
    if hasattr(runner, "instance_prompts"):
        runner.instance_prompts.generators.pop(key, None)


def model_forward(original: Callable, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Extends `GPUModelRunner._model_forward`: run a step that has slots to write eagerly, with hooks."""
    store = getattr(runner, "instance_prompts", None)
    if store is None or not store.generators:
        return original(runner, *args, **kwargs)
    plan = make_plan(internals.prefills(runner), store.generators, runner.device)
    if not plan:
        return original(runner, *args, **kwargs)
    with internals.eagerly(), filled(store.layers, plan):
        return original(runner, *args, **kwargs)
