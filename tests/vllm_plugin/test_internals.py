# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What of an engine's configuration keeps adapters from being served: each is refused with its cure, when an adapter is added."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import vllm
from served import BASE

from peft_instance_prompt.engine.calls import SWITCH
from peft_instance_prompt.vllm import internals, registration


def test_another_release_is_refused_with_a_sentence(monkeypatch) -> None:
    assert internals.untested_release() is None
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 99, 0))
    assert "is tested with vLLM 0.32" in internals.untested_release()
    said = []
    monkeypatch.setattr(internals, "logger", SimpleNamespace(warning=lambda *args: said.append(args[-1])))
    monkeypatch.setattr(registration, "extend", lambda *args: pytest.fail("vLLM was extended"))
    registration.register()
    assert "are not served" in said[0]
    monkeypatch.setenv(SWITCH, "1")
    assert internals.untested_release() is None


CHANGES = {
    "VLLM_USE_V2_MODEL_RUNNER=0": ("envs", "VLLM_USE_V2_MODEL_RUNNER", True),
    "--no-enable-chunked-prefill": ("scheduler_config", "enable_chunked_prefill", True),
    "pipeline parallelism": ("parallel_config", "pipeline_parallel_size", 2),
    "data and context parallelism": ("parallel_config", "data_parallel_size", 2),
    "--api-server-count": ("parallel_config", "_api_process_count", 2),
    "--enable-dbo": ("parallel_config", "enable_dbo", True),
    "n-grams only": ("", "speculative_config", SimpleNamespace(method="eagle")),
    "--kv-transfer-config": ("", "kv_transfer_config", SimpleNamespace()),
    "fast prefill": ("cache_config", "kv_sharing_fast_prefill", True),
    "--runner generate": ("model_config", "runner_type", "pooling"),
    "a LoRA on the CPU": ("", "additional_config", {"instance_prompt": {"lora": True}}),
    "quantised": ("model_config", "quantization", "awq"),
    "is not tested, but LlamaForCausalLM": ("model_config", "_architecture", "OtherForCausalLM"),
}


@pytest.mark.slow
@pytest.mark.parametrize("words", CHANGES)
def test_configurations(engine, served, monkeypatch, words) -> None:
    import vllm.envs as envs
    from vllm.lora.request import LoRARequest

    where, name, value = CHANGES[words]
    config = engine.llm.llm_engine.vllm_config
    assert internals.complaints(config) == []
    owner = {"envs": envs, "": config}.get(where) or getattr(config, where)
    with monkeypatch.context() as patch:
        # Past the checks of vLLM's own classes.
        patch.setitem(vars(owner), name, value)
        (complaint,) = internals.complaints(config)
        assert words in complaint
        with pytest.raises(internals.VLLMValidationError, match="This engine cannot serve") as caught:
            engine.llm.llm_engine.add_lora(LoRARequest("new", 300, str(served.folders["iapt"])))
        assert words in str(caught.value)
    assert engine.answers([BASE]) == served.answers_of([BASE])
