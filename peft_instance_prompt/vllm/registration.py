# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What vLLM's entry point calls in each of its processes: a few of its calls are extended, once.

front end     `--enable-lora` is for adapters of this package: requests that name one get slots, and the engine has no LoRA
engine core   keeps an adapter while requests have it, and lets no request in whose adapter is gone
worker        runs steps with a plan with hooks
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from . import internals
from .adapters import Store, describe_base
from .hooks import filled
from .plan import make_plan
from .request import FrontEnd, Steps


MARK = "__instance_prompt__"


def register() -> None:
    """Extend vLLM. A second call changes nothing."""
    if (complaint := internals.untested_release()) is not None:
        internals.logger.warning("%s", complaint)
        return
    for function in (
        *(create_engine_config, make_client, process_inputs),
        *(add_request, add_lora, remove_lora, list_loras),
        *(add_request_async, add_lora_async, remove_lora_async, list_loras_async),
        *(load_lora_adapter, unload_lora_adapter, maybe_get_adapters, beam_search),
        *(admit, model_forward),
    ):
        for owner, name in internals.POINTS[function.__name__]:
            extend(owner, name, function)
    internals.add_utilities(load_instance_prompt, remove_instance_prompt)


def extend(owner: type, name: str, function: Callable) -> None:
    """Let `function(original, *args, **kwargs)` stand for a method; the arguments begin with `self`, unless it is static."""
    original = getattr(owner, name)
    if hasattr(original, MARK):
        return
    if inspect.iscoroutinefunction(function):

        @functools.wraps(original)
        async def extended(*args: Any, **kwargs: Any) -> Any:
            return await function(original, *args, **kwargs)
    else:

        @functools.wraps(original)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

    setattr(extended, MARK, True)
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(extended) if static else extended)


# ------------------------------------------------------------------------------------------------------------ the front end


def create_engine_config(original: Callable, args: Any, *rest: Any, **kwargs: Any) -> Any:
    internals.set_defaults(args)
    return original(args, *rest, **kwargs)


def make_client(original: Callable, *args: Any, vllm_config: Any, **kwargs: Any) -> Any:
    return original(*args, vllm_config=internals.without_lora(vllm_config), **kwargs)


def front_end(processor: Any) -> FrontEnd:
    """The front end of an engine, which lives as long as its `InputProcessor`."""
    if not hasattr(processor, "instance_prompts"):
        processor.instance_prompts = FrontEnd(processor.vllm_config)
    return processor.instance_prompts


def process_inputs(original: Callable, processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(processor, *args, **kwargs)
    front_end(processor).widen(request)
    return request


def drive(engine: Any, steps: Steps) -> Any:
    """Call the engine core for each step."""
    answer = None
    while True:
        try:
            call = steps.send(answer)
        except StopIteration as done:
            return done.value
        answer = internals.call_core(engine.engine_core, *call)


async def drive_async(engine: Any, steps: Steps) -> Any:
    """As [`drive`]."""
    answer = None
    while True:
        try:
            call = steps.send(answer)
        except StopIteration as done:
            return done.value
        answer = await internals.call_core(engine.engine_core, *call)


def own(engine: Any) -> FrontEnd:
    return front_end(engine.input_processor)


def add_request(original: Callable, engine: Any, *args: Any, **kwargs: Any) -> Any:
    named = inspect.signature(original).bind(engine, *args, **kwargs).arguments.get("lora_request")
    if named is not None and engine.vllm_config.lora_config is not None:
        drive(engine, own(engine).prepare(named))
    return original(engine, *args, **kwargs)


async def add_request_async(original: Callable, engine: Any, *args: Any, **kwargs: Any) -> Any:
    named = inspect.signature(original).bind(engine, *args, **kwargs).arguments.get("lora_request")
    if named is not None and engine.vllm_config.lora_config is not None:
        await drive_async(engine, own(engine).prepare(named))
    return await original(engine, *args, **kwargs)


def add_lora(original: Callable, engine: Any, lora_request: Any) -> bool:
    return drive(engine, own(engine).add(lora_request)) or original(engine, lora_request)


async def add_lora_async(original: Callable, engine: Any, lora_request: Any) -> bool:
    try:
        return await drive_async(engine, own(engine).add(lora_request)) or await original(engine, lora_request)
    except internals.VLLMValidationError as error:
        refusals.get().append(error)
        raise


def remove_lora(original: Callable, engine: Any, lora_id: int) -> bool:
    return drive(engine, own(engine).remove(lora_id)) or (
        internals.serves_lora(engine.vllm_config) and original(engine, lora_id)
    )


async def remove_lora_async(original: Callable, engine: Any, lora_id: int) -> bool:
    return await drive_async(engine, own(engine).remove(lora_id)) or (
        internals.serves_lora(engine.vllm_config) and await original(engine, lora_id)
    )


def list_loras(original: Callable, engine: Any) -> set[int]:
    others = original(engine) if internals.serves_lora(engine.vllm_config) else set()
    return set(own(engine).residents) | set(others)


async def list_loras_async(original: Callable, engine: Any) -> set[int]:
    others = await original(engine) if internals.serves_lora(engine.vllm_config) else set()
    return set(own(engine).residents) | set(others)


# Why adapters were refused, for the server, which would call any error of `add_lora` its own.
refusals: ContextVar[list[Exception]] = ContextVar("instance_prompt_refusals")


async def load_lora_adapter(original: Callable, models: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    why: list[Exception] = []
    token = refusals.set(why)
    try:
        result = await original(models, request, *args, **kwargs)
    finally:
        refusals.reset(token)
    return internals.refusal(why[0]) if why else result


async def unload_lora_adapter(original: Callable, models: Any, request: Any) -> Any:
    named = models.lora_requests.get(request.lora_name)
    result = await original(models, request)
    if named is not None and request.lora_name not in models.lora_requests:
        await models.engine_client.remove_lora(named.lora_int_id)
    return result


BEAMS = (
    "Beam search calls the engine with the text so far as the prompt, from which an adapter would make another prompt at each step: "
    "leave it out, or use transformers' `generate`."
)


def maybe_get_adapters(original: Callable, serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    named = original(serving, request, *args, **kwargs)
    if named is not None and named.lora_int_id in own(serving.engine_client).residents:
        if getattr(request, "use_beam_search", False):
            raise internals.VLLMValidationError(BEAMS, parameter="use_beam_search")
        if getattr(request, "echo", False):
            raise internals.VLLMValidationError(
                "`echo` would show the slots, which are no text: leave it out.", parameter="echo"
            )
    return named


def beam_search(original: Callable, llm: Any, *args: Any, **kwargs: Any) -> Any:
    named = inspect.signature(original).bind(llm, *args, **kwargs).arguments.get("lora_request")
    each = named if isinstance(named, (list, tuple)) else [named]
    for one in each:
        if one is not None and drive(llm.llm_engine, own(llm.llm_engine).add(one)):
            raise internals.VLLMValidationError(BEAMS)
    return original(llm, *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------- the engine core


@dataclass
class Keys:
    """The adapters of an engine core, by key.

    Attributes:
        resident (`set[str]`): Those that the workers have.
        leaving (`set[str]`): Those among them that are to go when no request has them any more.
    """

    resident: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)


def keys_of(core: Any) -> Keys:
    if not hasattr(core, "instance_prompts"):
        core.instance_prompts = Keys()
    return core.instance_prompts


def load_instance_prompt(core: Any, key: str, folder: str) -> str:
    """Load an adapter into all workers; return why it cannot be, or an empty text."""
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
    """Unload an adapter, at once or when no request has it any more."""
    keys_of(core).leaving.add(key)
    release(core)


def release(core: Any) -> None:
    """Unload the adapters that are to go and that no request has."""
    keys = keys_of(core)
    for key in keys.leaving - internals.keys_in_use(core) if keys.leaving else ():
        internals.call_workers(core, drop_from, key)
        keys.resident.discard(key)
        keys.leaving.discard(key)


def admit(original: Callable, core: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    placed = internals.placed_of(request)
    if placed is not None:
        if placed.key not in keys_of(core).resident:
            reason = f"The adapter of request {request.request_id} was unloaded before the request came."
            return internals.fail_request(core, request, reason)
        request.lora_request = None  # to the engine it is a request like any other
    return original(core, request, *args, **kwargs)


# --------------------------------------------------------------------------------------------------------------- the worker


def load_into(runner: Any, key: str, folder: str) -> str:
    """Load an adapter into a worker; return why it cannot be, or an empty text."""
    try:
        if not hasattr(runner, "instance_prompts"):
            info = describe_base(internals.base_config(runner))
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
    store = getattr(runner, "instance_prompts", None)
    if store is None or not store.generators:
        return original(runner, *args, **kwargs)
    plan = make_plan(internals.prefills(runner), store.generators, runner.device)
    if not plan:
        return original(runner, *args, **kwargs)
    with internals.eagerly(), filled(store.layers, plan):
        return original(runner, *args, **kwargs)
