# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""vLLM's names. This file, `points` and `complaints` are the ones that know them; what a new release changes is handled here.

Tested: 0.32 and 0.33, with both model runners. The plugin uses:

- the front end: `InputProcessor.process_inputs` makes an `EngineCoreRequest`; `AsyncLLM` and `LLMEngine` add requests;
- the engine core: the configuration names the scheduler's class, and the class that vLLM adds to its worker; a request has the function
  that hashes its blocks for the prefix cache, and the scheduler asks what the cache offers it;
- the V1 runner: `_model_forward` runs the model on a step's flat batch;
- the V2 runner: `model_state` hears of requests and prepares the model's inputs; `execute_model` chooses between graphs and eager;
- the decoder's layers, which take `(hidden_states, residual)`, whose sum is the layer's input, or `hidden_states` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

from torch import nn
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.lora.utils import get_adapter_absolute_path
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from .package import forward_args
from .plan import Edited, Placed, Prefill


__all__ = ["VLLMNotFoundError", "VLLMValidationError"]

KEY = "instance_prompt"  # in a request's `extra_args` and in `--additional-config`
FAILURES = "instance_prompt_failures"  # an attribute of a step's output

logger = init_logger("vllm.instance_prompt")  # vLLM shows what its own loggers say


# ------------------------------------------------------------------------------------------------------------ the front end


def local_folder(path: str) -> str:
    """The local folder of an adapter, which may be given as a repository of the Hub. It may be downloaded for that."""
    return get_adapter_absolute_path(path)


def known_to_models(vllm_config: Any) -> AbstractContextManager:
    """A context in which models can be made: with the transformers backend, transformers' classes ask for the configuration."""
    return set_current_vllm_config(vllm_config)


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
            "`prompt_logprobs` (and `echo` with `logprobs`) are not served with an instance-prompt adapter: leave them out, or score "
            "with transformers."
        )
    if request.resumable:
        return "Streamed input is not supported by instance-prompt adapters: send the whole prompt."
    return None


def longest_step(vllm_config: Any) -> tuple[int, str]:
    """How many tokens of one prompt a step can compute, and the option that says so."""
    scheduler = vllm_config.scheduler_config
    limits = {"--max-num-batched-tokens": scheduler.max_num_batched_tokens}
    if scheduler.long_prefill_token_threshold > 0:
        limits["--long-prefill-token-threshold"] = scheduler.long_prefill_token_threshold
    option = min(limits, key=limits.__getitem__)
    return limits[option], option


def put_placed(request: Any, token_ids: list[int], placed: Placed | Edited, salt: str, max_model_len: int) -> None:
    """Give a request its slots, or its edits.

    Args:
        request: The `EngineCoreRequest`. Its parameters are changed, so they must be its own.
        token_ids (`list[int]`): Its prompt, with the slots.
        placed (`Placed` or `Edited`): Where instruction and slots stand, or which tokens are edited.
        salt (`str`): Keeps its blocks in the prefix cache apart from others with the same token ids.
        max_model_len (`int`): The model's limit, in tokens.
    """
    params = request.sampling_params
    request.prompt_token_ids = token_ids
    params.max_tokens = min(params.max_tokens, max_model_len - len(token_ids))
    params.extra_args = {**(params.extra_args or {}), KEY: asdict(placed)}
    request.cache_salt = f"{request.cache_salt or ''}|{salt}"


def placed_of(request: Any) -> Placed | Edited | None:
    """The slots or edits of a request in the scheduler or a worker; None for a request without an adapter."""
    params = request.sampling_params
    given = (params.extra_args or {}).get(KEY) if params is not None else None
    return None if given is None else Edited(**given) if "ranges" in given else Placed(**given)


def has_request(engine: Any, name: str) -> bool:
    """Whether a request of an engine has not ended yet."""
    processor = engine.output_processor
    return name in processor.request_states or name in processor.parent_requests


def refusal(error: Exception) -> Any:
    """The server's answer to a refused call: HTTP 400."""
    from vllm.entrypoints.serve import create_error_response

    return create_error_response(error)


def add_gauge(logger: Any, most: int) -> None:
    """Let a server's metrics tell which adapters run and wait, as vLLM's do for LoRA. `most` of them can share a batch."""
    labels = {
        "max_lora": "max_lora",
        **{f"{what}_lora_adapters": f"{what}_lora_adapters" for what in ("waiting", "running")},
    }
    for name, label in labels.items():
        setattr(logger, f"labelname_{name}", label)
    logger.max_lora = most
    logger.gauge_lora_info = logger._gauge_cls(
        name="vllm:lora_requests_info",
        documentation="Running stats on lora requests.",
        multiprocess_mode="sum",
        labelnames=list(labels.values()),
    )


# ------------------------------------------------------------------------------------------------------------ the scheduler


def hash_again(request: Any, placed: Placed | Edited) -> None:
    """Let the hashes of a request's blocks tell which of their tokens are slots or are edited, and no longer name a LoRA.

    What was generated in one turn comes back in the prompt of the next. With slots it must have the hashes of then, which a LoRA's name in
    those of the prompt alone would change. Where a role says of it now that it is edited, the two must not share blocks.
    """
    if (hasher := request._block_hasher) is not None:
        request._block_hasher = lambda request: hasher(Hashed(request, placed))
        request.block_hashes.clear()
        request.update_block_hashes()


class Hashed:
    """A request as vLLM's function that hashes blocks reads it, in which the ids of tokens that are not written are negative.

    So whatever blocks that function makes, they have the same hash only if the same tokens are slots or are edited.
    """

    def __init__(self, request: Any, placed: Placed | Edited):
        self._request, self.all_token_ids = request, MarkedIds(request.all_token_ids, placed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class MarkedIds:
    """Token ids, of which those of tokens that are no slots and are not edited read as `~id`."""

    def __init__(self, ids: Sequence[int], placed: Placed | Edited):
        self._ids, self._placed = ids, placed

    def __getitem__(self, at: int | slice) -> int | list[int]:
        if not isinstance(at, slice):
            return self[at : at + 1][0]  # type: ignore[index]
        start, stop, _ = at.indices(len(self._ids))
        written = set(self._placed.positions(start, stop - start))
        return [number if at in written else ~number for at, number in enumerate(self._ids[start:stop], start)]


def whole_hit(hit: tuple, placed: Placed | Edited, manager: Any) -> tuple:
    """What the prefix cache offers a request, or nothing if that ends between tokens that must be computed at once.

    Args:
        hit (`tuple`): The blocks, the number of their tokens, and two facts about groups of layers with caches of their own.
        placed (`Placed` or `Edited`): The request's slots or edits.
        manager: The scheduler's `KVCacheManager`.
    """
    return (manager.empty_kv_cache_blocks, 0, 0, False) if placed.is_torn(hit[1], 0) else hit


def report(output: Any, failures: Mapping[str, int]) -> None:
    """Write into the output of a step which of its requests failed, and how many tokens of each it found computed. An asynchronous runner
    has it within its own."""
    for name in ("model_runner_output", "_model_runner_output"):
        output = getattr(output, name, output)
    setattr(output, FAILURES, dict(failures))


def reported(output: Any) -> Mapping[str, int]:
    """What [`report`] wrote."""
    return getattr(output, FAILURES, {})


def fail_requests(scheduler: Any, failures: Mapping[str, int]) -> list[Any]:
    """End requests with an error, and with them those that took one of their blocks from the prefix cache before it was known to be wrong.

    Args:
        scheduler: The scheduler.
        failures (`Mapping[str, int]`): How many tokens each request had in the cache when it failed; these are right.

    Returns:
        `list`: The requests. What they computed goes from the prefix cache.
    """
    manager = scheduler.kv_cache_manager
    sizes = [group.kv_cache_spec.block_size for group in manager.kv_cache_config.kv_cache_groups]
    blocks = {name: manager.get_block_ids(name) for name in scheduler.requests}  # of each request, by group of layers
    found = {name: right for name, right in failures.items() if name in blocks}
    failed: list[str] = []
    wrong: set[int] = set()
    while found:
        failed += found
        for name, right in found.items():
            wrong.update(block for size, ids in zip(sizes, blocks[name]) for block in ids[right // size :])
        wrong.discard(manager.block_pool.null_block.block_id)  # stands where a window has passed, in all requests
        shared = {name: right_tokens(blocks[name], sizes, wrong) for name in blocks.keys() - set(failed)}
        found = {name: right for name, right in shared.items() if right is not None}
    if not failed:
        return []
    manager.evict_blocks(wrong)
    return scheduler.finish_requests(failed, RequestStatus.FINISHED_ERROR)


def right_tokens(blocks: Sequence[Sequence[int]], sizes: Sequence[int], wrong: set[int]) -> int | None:
    """How many tokens of a request stand before its first block that is wrong; None if none is."""
    firsts = [size * at for size, ids in zip(sizes, blocks) for at, block in enumerate(ids) if block in wrong]
    return min(firsts, default=None)


def with_errors(outputs: dict[int, Any], failed: list[Any]) -> dict[int, Any]:
    """A step's outputs by client, with those of failed requests."""
    for request in failed:
        error = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
        of_client.outputs = [*of_client.outputs, error]
    return outputs


# --------------------------------------------------------------------------------------------------------------- the worker


def is_v2(runner: Any) -> bool:
    """Whether a model runner is of the second generation."""
    return hasattr(runner, "model_state")


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


def extend_v1(runner: Any, store: Any) -> None:
    """Let a V1 runner make each step's plan, and run a step that has one without compiled code and CUDA graphs."""
    forward, sample = runner._model_forward, runner.sample_tokens

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        if not store.plan(prefills(runner)):
            return forward(*args, **kwargs)
        with eagerly():
            return forward(*args, **kwargs)

    runner._model_forward = model_forward
    runner.sample_tokens = lambda grammar_output: store.failing(lambda: sample(grammar_output))


def prefills(runner: Any) -> Iterator[Prefill]:
    """The current step's requests in prefill that have an adapter."""
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


def extend_v2(runner: Any, store: Any) -> None:
    """As [`extend_v1`], for a V2 runner. Whether a step writes is known before it chooses a graph, from the scheduler's output."""
    state, requests = runner.model_state, store.requests
    add, remove, prepare = state.add_request, state.remove_request, state.prepare_inputs
    execute, sample = runner.execute_model, runner.sample_tokens

    def add_request(req_index: int, new_req_data: Any) -> None:
        if (placed := placed_of(new_req_data)) is not None:
            requests[new_req_data.req_id] = placed, new_req_data.prompt_token_ids
        add(req_index, new_req_data)

    def remove_request(req_id: str) -> None:
        requests.pop(req_id, None)
        remove(req_id)

    def prepare_inputs(input_batch: Any, req_states: Any) -> dict[str, Any]:
        if requests:
            store.plan(prefills_v2(input_batch, requests))
        return prepare(input_batch, req_states)

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # Of a step with real requests, `is_profile` says no more than that it runs without a graph.
        eager = {"is_profile": True} if writes(scheduler_output, requests) else {}
        return execute(scheduler_output, *args, **(kwargs | eager))

    def before_forward(*_: Any) -> None:
        if store.writer.plan.rows:
            get_forward_context().skip_compiled = True

    state.add_request, state.remove_request, state.prepare_inputs = add_request, remove_request, prepare_inputs
    runner.execute_model = execute_model
    runner.sample_tokens = lambda grammar_output: store.failing(lambda: sample(grammar_output))
    runner.get_model().register_forward_pre_hook(before_forward)


def writes(scheduler_output: Any, requests: Mapping[str, tuple[Placed | Edited, list[int]]]) -> bool:
    """Whether a step writes slots or edits tokens.

    Slots are in the first step of a request, and in that after it was preempted, in both of which it is a new one. Edited tokens are in
    later chunks of its prompt, too; `requests` has those that the runner knows, with their prompts.
    """
    lengths, going = scheduler_output.num_scheduled_tokens, scheduler_output.scheduled_cached_reqs
    for new in scheduler_output.scheduled_new_reqs:
        placed = placed_of(new)
        if placed is not None and placed.writes(new.num_computed_tokens, lengths[new.req_id]):
            return True
    for name, done in zip(going.req_ids, going.num_computed_tokens) if requests else ():
        placed, ids = requests.get(name, (None, ()))
        if placed is not None and done < len(ids) and placed.writes(done, lengths[name]):
            return True
    return False


def prefills_v2(batch: Any, requests: Mapping[str, tuple[Placed | Edited, list[int]]]) -> Iterator[Prefill]:
    """As [`prefills`], of the V2 runner's `InputBatch`."""
    for i, name in enumerate(batch.req_ids):
        if name in requests:
            placed, ids = requests[name]
            row, done = batch.query_start_loc_np, int(batch.num_computed_tokens_np[i])
            if done < len(ids):
                yield Prefill(name, placed, ids, int(row[i]), done, int(row[i + 1] - row[i]))
