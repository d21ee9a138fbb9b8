# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Extend vLLM's calls. vLLM's entry point calls [`register`] in each of its processes.

front end     `--enable-lora` admits our adapters: requests that name one get slots, and the engine itself has no LoRA
engine core   keeps an adapter while requests have it, and fails requests whose adapter is gone
worker        runs steps that have a plan with hooks
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from . import internals
from .core import admit, load_instance_prompt, model_forward, remove_instance_prompt
from .front_end import FrontEnd, Steps


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
    """Replace a method by `function(original, *args, **kwargs)`, whose `args` begin with `self` unless the method is static."""
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
    # `setdefault` is atomic: several threads process requests.
    return vars(processor).setdefault("instance_prompts", FrontEnd(processor.vllm_config))


def process_inputs(original: Callable, processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(processor, *args, **kwargs)
    front_end(processor).widen(request)
    return request


def drive(engine: Any, steps: Steps) -> Any:
    """Make each call of the engine core, and return the generator's result."""
    answer = None
    while True:
        try:
            call = steps.send(answer)
        except StopIteration as done:
            return done.value
        answer = internals.call_core(engine.engine_core, *call)


async def drive_async(engine: Any, steps: Steps) -> Any:
    """As [`drive`], with an asynchronous client."""
    answer = None
    while True:
        try:
            call = steps.send(answer)
        except StopIteration as done:
            return done.value
        answer = await internals.call_core(engine.engine_core, *call)


def own(engine: Any) -> FrontEnd:
    """The front end of an engine."""
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
        if (why := refusals.get()) is not None:
            why.append(error)
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


# The refusals of adapters, for the server: it would report any error of `add_lora` as its own.
refusals: ContextVar[list[Exception] | None] = ContextVar("instance_prompt_refusals", default=None)


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
    "Beam search sends the text so far as the prompt, from which an adapter would make a different prompt at each step: leave it out, "
    "or use transformers' `generate`."
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
