# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""vLLM's names. No other file knows them; what a new release changes is handled here.

Tested: 0.32, with its V1 model runner. The plugin uses:

- the front end: `InputProcessor.process_inputs` makes an `EngineCoreRequest`; `AsyncLLM` and `LLMEngine` add requests;
- the engine core: `EngineCore.add_request` gives a request to the scheduler, and utilities are methods that are called by name;
- the worker: `GPUModelRunner._model_forward` runs the model on a step's flat batch; its decoder's layers take `(hidden_states,
  residual)`, whose sum is the layer's input, or `hidden_states` alone.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import vllm
from torch import nn
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.lora.utils import get_adapter_absolute_path
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ..engine.calls import SWITCH, forward_args
from .plan import Placed, Prefill


# The minor releases that the tests pass on.
TESTED = ((0, 32),)
# The model classes whose layers were compared with those of transformers. The last runs any of transformers' own models.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "TransformersForCausalLM",
)
ENGINE_CALLS = ("add_request", "add_lora", "remove_lora", "list_loras")
# The functions of `registration` and `core`, by name, and the methods that each of them extends.
POINTS: dict[str, list[tuple[type, str]]] = {
    "create_engine_config": [(EngineArgs, "create_engine_config")],
    "make_client": [(EngineCoreClient, "make_client"), (EngineCoreClient, "make_async_mp_client")],
    "process_inputs": [(InputProcessor, "process_inputs")],
    **{name: [(LLMEngine, name)] for name in ENGINE_CALLS},
    **{f"{name}_async": [(AsyncLLM, name)] for name in ENGINE_CALLS},
    **{name: [(OpenAIServingModels, name)] for name in ("load_lora_adapter", "unload_lora_adapter")},
    "maybe_get_adapters": [(BaseServing, "_maybe_get_adapters")],
    "beam_search": [(BeamSearchOfflineMixin, "beam_search")],
    "admit": [(EngineCore, "add_request")],
    "model_forward": [(GPUModelRunner, "_model_forward")],
}
KEY = "instance_prompt"  # in a request's `extra_args` and in `--additional-config`
SMALLEST_BLOCK = 16  # of the KV cache, in tokens: no attention kernel takes a smaller one

logger = init_logger(__name__)


def untested_release() -> str | None:
    """A complaint about the installed vLLM; None if it is a tested release, or the environment variable lets it pass."""
    if tuple(vllm.__version_tuple__[:2]) in TESTED or os.environ.get(SWITCH) == "1":
        return None
    tested = ", ".join(f"{major}.{minor}" for major, minor in TESTED)
    return (
        f"peft_instance_prompt is tested with vLLM {tested}; vLLM {vllm.__version__} is installed, and its instance-prompt adapters "
        f"are not served: prompts could be wrong without any error. Install vLLM {tested}, or set {SWITCH}=1 to try it."
    )


# ------------------------------------------------------------------------------------------------------ the configuration


def serves_lora(vllm_config: Any) -> bool:
    """Whether the engine serves LoRA, too: `--additional-config '{"instance_prompt": {"lora": true}}'`."""
    extra = vllm_config.additional_config
    own = extra.get(KEY) if isinstance(extra, dict) else None
    return bool(own.get("lora")) if isinstance(own, dict) else False


def without_lora(vllm_config: Any) -> Any:
    """The configuration of the engine behind the front end: without LoRA, which would wrap every linear layer."""
    if vllm_config.lora_config is None or serves_lora(vllm_config):
        return vllm_config
    engine_config = copy.copy(vllm_config)
    engine_config.lora_config = None
    return engine_config


def set_defaults(engine_args: Any) -> None:
    """Switch chunked prefill off where adapters are served, unless the user has set it."""
    if engine_args.enable_lora and engine_args.enable_chunked_prefill is None:
        logger.info("peft_instance_prompt: chunked prefill is off, since adapters are served.")
        engine_args.enable_chunked_prefill = False


def complaints(vllm_config: Any) -> list[str]:
    """The settings under which an engine cannot serve adapters, each with its cure."""
    c, parallel, scheduler = vllm_config, vllm_config.parallel_config, vllm_config.scheduler_config
    model, speculation = vllm_config.model_config, vllm_config.speculative_config
    found = {
        "its V2 model runner is not supported: set VLLM_USE_V2_MODEL_RUNNER=0": c.use_v2_model_runner,
        "chunked prefill tears an instruction apart: start it with --no-enable-chunked-prefill": scheduler.enable_chunked_prefill
        or scheduler.long_prefill_token_threshold > 0,
        "pipeline parallelism is not supported: use --tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "data and context parallelism are not supported: leave their sizes at 1": parallel.data_parallel_size > 1
        or parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "several API servers are not supported: leave --api-server-count at 1": parallel._api_process_count > 1,
        "batches that are run in two halves are not supported: leave out --enable-dbo": parallel.use_ubatching,
        "of speculative decoding, n-grams only are supported": speculation is not None
        and speculation.method != "ngram",
        "KV transfer is not supported: leave out --kv-transfer-config": c.kv_transfer_config is not None,
        "fast prefill is not supported: leave out --kv-sharing-fast-prefill": c.cache_config.kv_sharing_fast_prefill,
        "it does not generate text: use --runner generate": model.runner_type != "generate",
        "models that take images or audio, and encoder-decoder models, are not supported": model.is_multimodal_model
        or model.is_encoder_decoder,
    }
    if os.environ.get(SWITCH) != "1":
        cure = f"set {SWITCH}=1 to try"
        found[f"quantised base models are not tested: {cure}"] = model.quantization is not None
        found[f"a LoRA on the CPU reaches other requests of its batch in vLLM 0.32: {cure}"] = (
            serves_lora(c) and current_platform.is_cpu()
        )
        found[f"{model.architecture} is not tested, but {', '.join(ARCHITECTURES)} are: {cure}"] = (
            model.architecture not in ARCHITECTURES
        )
    return [text for text, holds in found.items() if holds]


def known_to_models(vllm_config: Any) -> AbstractContextManager:
    """A context in which models can be made: with the transformers backend, transformers' classes ask for the configuration."""
    return set_current_vllm_config(vllm_config)


# ------------------------------------------------------------------------------------------------------------ the front end


def local_folder(path: str) -> str:
    """The local folder of an adapter, which may be given as a repository of the Hub."""
    return get_adapter_absolute_path(path)


def refuse_content(request: Any) -> str | None:
    """A complaint about a request that no instance-prompt adapter can serve; None if one can."""
    params = request.sampling_params
    if params is None:
        return "Adapters generate text: this request is of another kind."
    if request.prompt_embeds is not None or not request.prompt_token_ids:
        return "An adapter makes its prompt from token ids: send text or ids, or `prompt_embeds` to the base model."
    if request.mm_features:
        return "Requests with images or audio are not supported by instance-prompt adapters."
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        return (
            "`prompt_logprobs` (and `echo` with `logprobs`) cannot be given for a prompt with slots: leave them out, or score with "
            "transformers."
        )
    if request.resumable:
        return "Streamed input is not supported by instance-prompt adapters: send the whole prompt."
    return None


def put_slots(
    request: Any, token_ids: list[int], placed: Placed, salt: str, max_model_len: int, reads_cache: bool
) -> None:
    """Give a request its slots.

    Args:
        request: The `EngineCoreRequest`. Its parameters are changed, so they must be its own.
        token_ids (`list[int]`): Its prompt, with the slots.
        placed (`Placed`): Where instruction and slots stand.
        salt (`str`): Keeps its blocks in the prefix cache apart from others with the same token ids.
        max_model_len (`int`): The model's limit, in tokens.
        reads_cache (`bool`): Whether it may take blocks from the prefix cache.
    """
    params = request.sampling_params
    request.prompt_token_ids = token_ids
    params.max_tokens = min(params.max_tokens, max_model_len - len(token_ids))
    params.extra_args = {**(params.extra_args or {}), KEY: placed.to_dict()}
    request.cache_salt = f"{request.cache_salt or ''}|{salt}"
    if not reads_cache:
        params.skip_reading_prefix_cache = True


def placed_of(request: Any) -> Placed | None:
    """The instruction and slots of a request in the engine core or a worker; None for a request without an adapter."""
    params = request.sampling_params
    given = (params.extra_args or {}).get(KEY) if params is not None else None
    return None if given is None else Placed(**given)


def refusal(error: Exception) -> Any:
    """The server's answer to a refused call: HTTP 400."""
    return create_error_response(error)


# ---------------------------------------------------------------------------------------------------------- the engine core


def add_utilities(*functions: Any) -> None:
    """Make functions methods of the engine core, which the front end can call by name."""
    for function in functions:
        setattr(EngineCore, function.__name__, function)


def call_core(client: Any, method: str, *args: Any) -> Any:
    """Call a method of the engine core. An asynchronous client returns an awaitable."""
    if hasattr(client, "call_utility_async"):
        return client.call_utility_async(method, *args)
    if hasattr(client, "call_utility"):
        return client.call_utility(method, *args)
    return getattr(client.engine_core, method)(*args)


def call_workers(core: Any, function: Any, *args: Any) -> list[Any]:
    """Call `function(model_runner, *args)` in each worker."""
    return core.model_executor.collective_rpc(with_runner, args=(function, *args))


def with_runner(worker: Any, function: Any, *args: Any) -> Any:
    return function(worker.model_runner, *args)


def keys_in_use(core: Any) -> set[str]:
    """The keys of the adapters of the scheduler's requests."""
    placed = (placed_of(request) for request in list(core.scheduler.requests.values()))
    return {one.key for one in placed if one is not None}


def fail_request(core: Any, request: Any, reason: str) -> None:
    """End a request of the engine core with an error."""
    if not hasattr(core, "_send_error_outputs_to_client"):  # the engine core runs in the front end's process
        raise VLLMValidationError(reason)
    logger.error("%s", reason)
    core._send_error_outputs_to_client([request.request_id], request.client_index)


# --------------------------------------------------------------------------------------------------------------- the worker


def find_layers(runner: Any, num_layers: int) -> Sequence[nn.Module]:
    """The decoder's layers.

    Raises:
        ValueError: The model has no list of `num_layers` layers that take `hidden_states`.
    """
    for module in runner.get_model().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            if all("hidden_states" in forward_args(layer) for layer in module):
                return list(module)
    raise ValueError(
        f"The layers of {type(runner.get_model()).__name__} are not understood: there is no list of {num_layers} layers that take "
        "`hidden_states`. Try `--model-impl transformers`."
    )


def prefills(runner: Any) -> Iterator[Prefill]:
    """The current step's requests in prefill that have slots."""
    batch = runner.input_batch
    num = batch.num_reqs
    done, prompt = batch.num_computed_tokens_cpu[:num], batch.num_prompt_tokens[:num]
    if (done >= prompt).all():
        return
    row = runner.query_start_loc.np
    for i in (done < prompt).nonzero()[0]:
        request = runner.requests[batch.req_ids[i]]
        placed = placed_of(request)
        if placed is not None:
            length = int(row[i + 1] - row[i])
            yield Prefill(batch.req_ids[i], placed, request.prompt_token_ids, int(row[i]), int(done[i]), length)


@contextmanager
def eagerly() -> Iterator[None]:
    """Run a step without compiled code and CUDA graphs, which run no hooks."""
    context = get_forward_context()
    before = context.skip_compiled, context.cudagraph_runtime_mode
    context.skip_compiled, context.cudagraph_runtime_mode = True, CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.skip_compiled, context.cudagraph_runtime_mode = before
