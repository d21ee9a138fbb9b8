# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Extensions of the front end's calls, by the names of `points.FRONT`. They are put in place once an engine asks for instance prompts.

Each gets vLLM's method first. A request that names none of our adapters goes on to it as it came.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from . import internals
from .complaints import asked, serves_lora
from .front_end import FrontEnd, Steps


FRONT_ENDS: dict[int, FrontEnd] = {}  # by the identity of the configuration, which a front end keeps alive


def front_of(vllm_config: Any) -> FrontEnd:
    """The front end of an engine that serves instance prompts."""
    # `setdefault` is atomic: several threads process requests.
    return FRONT_ENDS.get(id(vllm_config)) or FRONT_ENDS.setdefault(id(vllm_config), FrontEnd(vllm_config))


def front_end(vllm_config: Any) -> FrontEnd | None:
    """As [`front_of`]; None if the engine serves none."""
    return front_of(vllm_config) if asked(vllm_config.additional_config) else None


# ---------------------------------------------------------------------------------------------------------------- requests


def validate_lora(original: Callable, processor: Any, lora_request: Any) -> None:
    front = front_end(processor.vllm_config)
    if front is None or lora_request is None or lora_request.lora_int_id not in front.residents:
        original(processor, lora_request)


def process_inputs(original: Callable, processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(processor, *args, **kwargs)
    if (front := front_end(processor.vllm_config)) is not None:
        front.widen(request)
    return request


def named_in(original: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The `lora_request` of a call."""
    return inspect.signature(original).bind(*args, **kwargs).arguments.get("lora_request")


def add_request(original: Callable, engine: Any, *args: Any, **kwargs: Any) -> Any:
    front, named = front_end(engine.vllm_config), named_in(original, (engine, *args), kwargs)
    if front is None or named is None or named.lora_int_id in front.loras:
        return original(engine, *args, **kwargs)
    if (resident := front.find(named)) is None:
        add(front, engine, named)
        resident = front.find(named)
    with front.arriving(resident) as arrived:
        name = original(engine, *args, **kwargs)
        arrived(engine, named, name)
    return name


async def add_request_async(original: Callable, engine: Any, *args: Any, **kwargs: Any) -> Any:
    front, named = front_end(engine.vllm_config), named_in(original, (engine, *args), kwargs)
    if front is None or named is None or named.lora_int_id in front.loras:
        return await original(engine, *args, **kwargs)
    if (resident := front.find(named)) is None:
        await add_async(front, engine, named)
        resident = front.find(named)
    with front.arriving(resident) as arrived:
        queue = await original(engine, *args, **kwargs)
        arrived(engine, named, queue.request_id)
    return queue


# ---------------------------------------------------------------------------------------------------------------- adapters


def drive(engine: Any, steps: Steps) -> None:
    """Make each call of the workers."""
    answer = None
    while True:
        try:
            method, *args = steps.send(answer)
        except StopIteration:
            return
        answer = engine.collective_rpc(method, args=tuple(args))


async def drive_async(engine: Any, steps: Steps) -> None:
    """As [`drive`], with an asynchronous engine."""
    answer = None
    while True:
        try:
            method, *args = steps.send(answer)
        except StopIteration:
            return
        answer = await engine.collective_rpc(method, args=tuple(args))


def add(front: FrontEnd, engine: Any, named: Any) -> bool:
    """Load the adapter that a `LoRARequest` names. False if it is a LoRA."""
    if (adapter := front.read(named)) is None:
        front.loras.add(named.lora_int_id)
    else:
        drive(engine, front.install(named, adapter))
        drive(engine, front.release(engine))
    return adapter is not None


async def add_async(front: FrontEnd, engine: Any, named: Any) -> bool:
    """As [`add`]. Streams go on while the folder is read, or downloaded."""
    if (adapter := await asyncio.to_thread(front.read, named)) is None:
        front.loras.add(named.lora_int_id)
    else:
        async with front.lock:
            await drive_async(engine, front.install(named, adapter))
            await drive_async(engine, front.release(engine))
    return adapter is not None


def add_lora(original: Callable, engine: Any, lora_request: Any) -> bool:
    front = front_end(engine.vllm_config)
    return front is not None and add(front, engine, lora_request) or original(engine, lora_request)


async def add_lora_async(original: Callable, engine: Any, lora_request: Any) -> bool:
    front = front_end(engine.vllm_config)
    try:
        return (
            front is not None and await add_async(front, engine, lora_request) or await original(engine, lora_request)
        )
    except internals.VLLMValidationError as error:
        if (why := refusals.get()) is not None:
            why.append(error)
        raise


def remove_lora(original: Callable, engine: Any, lora_id: int) -> bool:
    front = front_end(engine.vllm_config)
    if front is not None and front.remove(lora_id):
        drive(engine, front.release(engine))
        return True
    return (front is None or serves_lora(engine.vllm_config)) and original(engine, lora_id)


async def remove_lora_async(original: Callable, engine: Any, lora_id: int) -> bool:
    front = front_end(engine.vllm_config)
    if front is not None and front.remove(lora_id):
        async with front.lock:
            await drive_async(engine, front.release(engine))
        return True
    return (front is None or serves_lora(engine.vllm_config)) and await original(engine, lora_id)


def list_loras(original: Callable, engine: Any) -> set[int]:
    front = front_end(engine.vllm_config)
    others = original(engine) if front is None or serves_lora(engine.vllm_config) else set()
    return set(others) | set(front.residents if front is not None else ())


async def list_loras_async(original: Callable, engine: Any) -> set[int]:
    front = front_end(engine.vllm_config)
    others = await original(engine) if front is None or serves_lora(engine.vllm_config) else set()
    return set(others) | set(front.residents if front is not None else ())


# ----------------------------------------------------------------------------------------------------------------- servers

# The refusals of adapters, for the server: it would report any error of `add_lora` as its own.
refusals: ContextVar[list[Exception] | None] = ContextVar("instance_prompt_refusals", default=None)


async def load_lora_adapter(original: Callable, models: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    why: list[Exception] = []
    token = refusals.set(why)
    try:
        result = await original(models, request, *args, **kwargs)
    finally:
        refusals.reset(token)
    if why:
        return internals.refusal(why[0])
    if (named := models.lora_requests.get(request.lora_name)) is not None and isinstance(result, str):
        named.load_inplace = False  # done: vLLM 0.32 would leave it to each request
    return result


async def unload_lora_adapter(original: Callable, models: Any, request: Any) -> Any:
    named = models.lora_requests.get(request.lora_name)
    result = await original(models, request)
    front = front_end(models.engine_client.vllm_config)
    if front is not None and named is not None and named.lora_int_id in front.residents and isinstance(result, str):
        front.unloaded.add(named.lora_int_id)  # a request that has passed the check of its name does not load it again
        await models.engine_client.remove_lora(named.lora_int_id)
    return result


BEAMS = (
    "Beam search sends the text so far as the prompt, which an adapter would read as the instruction at each step: leave it out, or use "
    "transformers' `generate`."
)


def maybe_get_adapters(original: Callable, serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    named = original(serving, request, *args, **kwargs)
    # Without an engine there are no adapters: `OpenAIModelRegistry`.
    engine = getattr(serving.models, "engine_client", None)
    front = front_end(engine.vllm_config) if engine is not None else None
    if front is not None and named is not None and named.lora_int_id in front.residents:
        if getattr(request, "use_beam_search", False):
            raise internals.VLLMValidationError(BEAMS, parameter="use_beam_search")
        if getattr(request, "echo", False):
            raise internals.VLLMValidationError(
                "`echo` is not served with an instance-prompt adapter, whose slots are no text: leave it out.",
                parameter="echo",
            )
    return named


def beam_search(original: Callable, llm: Any, *args: Any, **kwargs: Any) -> Any:
    named = named_in(original, (llm, *args), kwargs)
    front = front_end(llm.llm_engine.vllm_config)
    for one in named if isinstance(named, (list, tuple)) else [named]:
        if front is not None and one is not None and (front.find(one) or front.read(one)):
            raise internals.VLLMValidationError(BEAMS)
    return original(llm, *args, **kwargs)


def count_adapters(original: Callable, logger: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """vLLM's metric of running and waiting adapters, which it makes for LoRA only."""
    original(logger, vllm_config, *args, **kwargs)
    if front_end(vllm_config) is not None and logger.gauge_lora_info is None:
        internals.add_gauge(logger, vllm_config.scheduler_config.max_num_seqs)


FUNCTIONS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        *(validate_lora, process_inputs),
        *(add_request, add_lora, remove_lora, list_loras),
        *(add_request_async, add_lora_async, remove_lora_async, list_loras_async),
        *(load_lora_adapter, unload_lora_adapter, maybe_get_adapters, beam_search, count_adapters),
    )
}
