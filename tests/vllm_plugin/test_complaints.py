# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What of an engine's configuration keeps adapters from being served: each is refused with its cure, before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import vllm
from vllm.config import CompilationMode
from vllm.engine.arg_utils import EngineArgs

from peft_instance_prompt.vllm import complaints, release
from peft_instance_prompt.vllm.package import SWITCH


ASKED = {"additional_config": {"instance_prompt": {}}}


def configure(served, **settings):
    return EngineArgs(model=str(served.base), max_model_len=256, **settings).create_engine_config()


@pytest.mark.slow
def test_another_release_is_refused_with_a_sentence(served, monkeypatch) -> None:
    assert release.untested_release() is None
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 99, 0))
    assert "is tested with vLLM 0.32 and 0.33" in release.untested_release()
    with pytest.raises(ValueError, match="are not served"):
        configure(served, **ASKED)
    assert configure(served).additional_config == {}  # and everything else is served
    monkeypatch.setenv(SWITCH, "1")
    assert release.untested_release() is None


CHANGES = {
    "pipeline parallelism": ("parallel_config", "pipeline_parallel_size", 2),
    "data and context parallelism": ("parallel_config", "data_parallel_size", 2),
    "--api-server-count": ("parallel_config", "_api_process_count", 2),
    "--enable-dbo": ("parallel_config", "enable_dbo", True),
    "--worker-extension-cls": ("parallel_config", "worker_extension_cls", "mine.Worker"),
    "--scheduler-cls": ("scheduler_config", "scheduler_cls", "mine.Scheduler"),
    "n-grams only": ("", "speculative_config", SimpleNamespace(method="eagle")),
    "--kv-transfer-config": ("", "kv_transfer_config", SimpleNamespace()),
    "--kv-offloading-size": ("cache_config", "kv_offloading_size", 1.0),
    "fast prefill": ("cache_config", "kv_sharing_fast_prefill", True),
    "--runner generate": ("model_config", "runner_type", "pooling"),
    "plain torch.compile": ("compilation_config", "mode", CompilationMode.STOCK_TORCH_COMPILE),
    "a LoRA on the CPU": ("", "lora_config", SimpleNamespace()),
    "quantised": ("model_config", "quantization", "awq"),
    "is not tested, but LlamaForCausalLM": ("model_config", "_architecture", "OtherForCausalLM"),
}


@pytest.fixture(scope="module")
def config(served):
    return configure(served, **ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("words", CHANGES)
def test_settings(config, monkeypatch, words) -> None:
    where, name, value = CHANGES[words]
    complaints.check(config)
    monkeypatch.setitem(vars(getattr(config, where) if where else config), name, value)  # past vLLM's own checks
    (complaint,) = complaints.complaints(config)
    assert words in complaint
    with pytest.raises(ValueError, match="This engine cannot serve") as caught:
        complaints.check(config)
    assert words in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["speculative_config", "lora_config"])
def test_settings_of_the_second_runner(config, monkeypatch, what) -> None:
    import vllm.envs as envs

    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", True)
    complaints.check(config)
    monkeypatch.setitem(vars(config), what, SimpleNamespace(method="ngram"))
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in complaints.complaints(config)[0]


@pytest.mark.slow
def test_settings_are_refused_when_the_configuration_is_made(served) -> None:
    with pytest.raises(ValueError, match="pipeline parallelism"):
        configure(served, pipeline_parallel_size=2, distributed_executor_backend="mp", **ASKED)
    for given in (True, {"loras": True}):
        with pytest.raises(ValueError, match="must be {}"):
            configure(served, additional_config={"instance_prompt": given})


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_truth_about_lora(served, config, monkeypatch, asynchronous) -> None:
    """The server and the engine have one configuration, without LoRA, so that vLLM compiles and limits no batch."""
    given = configure(served, enable_lora=True, **ASKED)
    assert given.lora_config is None
    assert given.compilation_config.mode == config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    assert given.scheduler_config.enable_chunked_prefill and given.cache_config.enable_prefix_caching
    monkeypatch.setitem(vars(given.scheduler_config), "async_scheduling", asynchronous)
    complaints.take_over(given)
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    assert issubclass(given.scheduler_config.get_scheduler_cls(), AsyncScheduler) == asynchronous
