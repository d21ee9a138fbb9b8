# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The methods of vLLM that the plugin extends or calls, with the parameters that it knows them by.

They are compared before anything is loaded. A method with other parameters is refused by name: what it does may have changed, too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any


ENGINES = {"": "vllm.v1.engine.llm_engine:LLMEngine", "_async": "vllm.v1.engine.async_llm:AsyncLLM"}
MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
ARGS = "vllm.engine.arg_utils:EngineArgs"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

# What looks whether a folder of ours is named, and returns vLLM's own result where none is.
DOORS = {
    "from_cli_args": (f"{ARGS}.from_cli_args", "args"),
    "create_engine_config": (f"{ARGS}.create_engine_config", "self ..."),
    "from_local_dir": ("vllm.lora.peft_helper:PEFTHelper.from_local_dir", "lora_path ..."),
}
# By the function of `front_calls` that extends it, in a process whose engine serves our adapters: the method and its parameters. "..."
# stands for any others.
FRONT = {
    "validate_lora": ("vllm.v1.engine.input_processor:InputProcessor._validate_lora", "self lora_request"),
    "process_inputs": ("vllm.v1.engine.input_processor:InputProcessor.process_inputs", "self request_id prompt params ..."),
    **{f"add_request{end}": (f"{cls}.add_request", "self request_id prompt params ... lora_request ...") for end, cls in ENGINES.items()},
    **{f"add_lora{end}": (f"{cls}.add_lora", "self lora_request") for end, cls in ENGINES.items()},
    **{f"remove_lora{end}": (f"{cls}.remove_lora", "self lora_id") for end, cls in ENGINES.items()},
    **{f"list_loras{end}": (f"{cls}.list_loras", "self") for end, cls in ENGINES.items()},
    "load_lora_adapter": (f"{MODELS}.load_lora_adapter", "self request base_model_name"),
    "unload_lora_adapter": (f"{MODELS}.unload_lora_adapter", "self request"),
    "maybe_get_adapters": (
        "vllm.entrypoints.serve.engine.serving:BaseServing._maybe_get_adapters",
        "self request supports_default_mm_loras",
    ),
    "beam_search": (
        "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search",
        "self prompts params lora_request ...",
    ),
    "count_adapters": ("vllm.v1.metrics.loggers:PrometheusStatLogger.__init__", "self vllm_config ..."),
}  # fmt: skip
# What the scheduler overrides and calls.
CORE = {
    "add_request": (f"{SCHEDULER}.add_request", "self request"),
    "hit": (f"{SCHEDULER}._get_local_prefix_cache_hit", "self request ..."),
    "chunk": (f"{SCHEDULER}._reserve_prefill_lookahead", "self request num_computed_tokens num_new_tokens"),
    "update": (f"{SCHEDULER}.update_from_output", "self scheduler_output model_runner_output"),
    "hashes": ("vllm.v1.request:Request.update_block_hashes", "self"),
    "hasher": ("vllm.v1.request:Request.__init__", "self request_id ... block_hasher ..."),
    "finish": (f"{SCHEDULER}.finish_requests", "self request_ids finished_status"),
    "evict": ("vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks", "self block_ids"),
    "rpc": (f"{ENGINES['']}.collective_rpc", "self method timeout args kwargs"),
    "rpc_async": (f"{ENGINES['_async']}.collective_rpc", "self method timeout args kwargs"),
}


def find(where: str) -> tuple[type, str]:
    """The class and the name of a method, from `module:Class.method`."""
    module, path = where.split(":")
    owner, name = path.split(".")
    return getattr(importlib.import_module(module), owner), name


def of_runner(runner: Any) -> Iterator[tuple[Callable, str]]:
    """The methods of a model runner that a worker extends, and their parameters."""
    yield runner.sample_tokens, "grammar_output"
    if not hasattr(runner, "model_state"):
        yield runner._model_forward, "input_ids positions intermediate_tensors inputs_embeds model_kwargs"
        return
    state = runner.model_state
    yield runner.execute_model, "scheduler_output ... is_profile ..."
    yield state.add_request, "req_index new_req_data"
    yield state.remove_request, "req_id"
    yield state.prepare_inputs, "input_batch req_states"


def of_front_end() -> Iterator[tuple[Callable, str]]:
    """The methods of the front end and the scheduler that are extended or called, and their parameters."""
    for where, wanted in (*DOORS.values(), *FRONT.values(), *CORE.values()):
        owner, name = find(where)
        yield getattr(owner, name), wanted


def changed(points: Iterator[tuple[Callable, str]]) -> str | None:
    """A complaint about the first method with other parameters than the known ones."""
    for method, wanted in points:
        found = list(inspect.signature(method).parameters)
        if not fits(found, wanted):
            return (
                f"vLLM's {method.__qualname__} takes ({', '.join(found)}), but this package knows it with ({wanted.replace(' ', ', ')}): "
                "install a release of vLLM that it was tested with."
            )
    return None


def fits(found: list[str], wanted: str) -> bool:
    """Whether parameters are those of a text such as `"self request ... priority"`."""
    rest, loose = iter(found), False
    for word in wanted.split():
        if word == "...":
            loose = True
        elif loose:
            if word not in rest:  # takes the others away
                return False
            loose = False
        elif next(rest, None) != word:
            return False
    return loose or next(rest, None) is None


MARK = "__instance_prompt__"


def extend(functions: Mapping[str, Callable], where: Mapping[str, tuple[str, str]]) -> None:
    """Replace methods by `function(original, *args, **kwargs)`, whose `args` begin with the class or the instance."""
    for key, function in functions.items():
        owner, name = find(where[key][0])
        held = inspect.getattr_static(owner, name)
        bound = isinstance(held, classmethod)
        original = held.__func__ if bound else held
        if not hasattr(original, MARK):
            setattr(owner, name, classmethod(wrap(original, function)) if bound else wrap(original, function))


def wrap(original: Callable, function: Callable) -> Callable:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(original)
        async def extended(*args: Any, **kwargs: Any) -> Any:
            return await function(original, *args, **kwargs)
    else:

        @functools.wraps(original)
        def extended(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

    setattr(extended, MARK, True)
    return extended
