# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The settings of an engine: which serve instance prompts, and which are refused before anything is loaded."""

from __future__ import annotations

import os
from typing import Any

from vllm.config import CompilationMode
from vllm.platforms import current_platform

from . import points
from .internals import KEY
from .package import SWITCH


# The model classes whose layers were compared with those of transformers. The last runs any of transformers' own models.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "TransformersForCausalLM",
)
EXTENSION = "peft_instance_prompt.vllm.worker.WorkerExtension"
SCHEDULERS = "peft_instance_prompt.vllm.scheduler"


def asked(additional_config: Any) -> bool:
    """Whether an engine serves instance prompts: a folder of ours was named, or `--additional-config` has `instance_prompt`."""
    return isinstance(additional_config, dict) and KEY in additional_config


def settings(additional_config: Any) -> dict[str, Any]:
    """What stands under `instance_prompt` in `--additional-config`.

    Raises:
        ValueError: It is no JSON object of the known fields.
    """
    given = additional_config[KEY]
    if not isinstance(given, dict) or not given.keys() <= {"lora", "folders"}:
        raise ValueError(f'`{KEY}` of `--additional-config` must be {{}} or {{"lora": true}}, got {given!r}.')
    return given


def serves_lora(vllm_config: Any) -> bool:
    """Whether the engine serves LoRA, too."""
    return vllm_config.lora_config is not None


def take_over(vllm_config: Any) -> None:
    """Name our scheduler and our worker's methods in a configuration that has no complaints."""
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = f"{SCHEDULERS}.{'Async' if scheduler.async_scheduling else ''}PromptScheduler"
    vllm_config.parallel_config.worker_extension_cls = EXTENSION


def complaints(vllm_config: Any) -> list[str]:
    """The settings under which an engine cannot serve instance prompts, each with its cure."""
    c, parallel, scheduler = vllm_config, vllm_config.parallel_config, vllm_config.scheduler_config
    model, speculation, cache = vllm_config.model_config, vllm_config.speculative_config, vllm_config.cache_config
    found = {
        "pipeline parallelism is not supported: use --tensor-parallel-size": parallel.pipeline_parallel_size > 1,
        "data and context parallelism are not supported: leave their sizes at 1": parallel.data_parallel_size > 1
        or parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "several API servers are not supported: leave --api-server-count at 1": parallel._api_process_count > 1,
        "batches that are run in two halves are not supported: leave out --enable-dbo": parallel.use_ubatching,
        "of speculative decoding, n-grams only are supported": speculation is not None
        and speculation.method != "ngram",
        "KV transfer is not supported, since connectors do not know which blocks hold prompts: leave out --kv-transfer-config and "
        "--kv-offloading-size": c.kv_transfer_config is not None or cache.kv_offloading_size is not None,
        "fast prefill is not supported: leave out --kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "it does not generate text: use --runner generate": model.runner_type != "generate",
        "models that take images or audio, and encoder-decoder models, are not supported": model.is_multimodal_model
        or model.is_encoder_decoder,
        "plain torch.compile cannot run a step eagerly: leave the compilation mode at vLLM's default": (
            c.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE
        ),
        "a scheduler of your own is not supported: leave out --scheduler-cls": scheduler.scheduler_cls is not None
        and not str(scheduler.scheduler_cls).startswith(SCHEDULERS),
        "a worker extension of your own is not supported: leave out --worker-extension-cls": (
            parallel.worker_extension_cls not in ("", EXTENSION)
        ),
    }
    if os.environ.get(SWITCH) != "1":
        cure = f"set {SWITCH}=1 to try"
        found[f"quantised base models are not tested: {cure}"] = model.quantization is not None
        found[
            f"speculative decoding is not tested with the V2 model runner: set VLLM_USE_V2_MODEL_RUNNER=0, or {cure}"
        ] = speculation is not None and c.use_v2_model_runner
        found[
            f"LoRA beside prompts is not tested with the V2 model runner: set VLLM_USE_V2_MODEL_RUNNER=0, or {cure}"
        ] = serves_lora(c) and c.use_v2_model_runner
        found[
            f"a LoRA on the CPU reaches other requests of its batch in vLLM itself: serve LoRA by itself, or {cure}"
        ] = serves_lora(c) and current_platform.is_cpu()
        found[f"{model.architecture} is not tested, but {', '.join(ARCHITECTURES)} are: {cure}"] = (
            model.architecture not in ARCHITECTURES
        )
    return [text for text, holds in found.items() if holds]


def check(vllm_config: Any) -> None:
    """Raise a ValueError if an engine cannot serve instance prompts."""
    if (complaint := points.changed(points.of_front_end())) is not None:
        raise ValueError(complaint)
    if found := complaints(vllm_config):
        raise ValueError(f"This engine cannot serve instance-prompt adapters: {'; '.join(found)}.")
