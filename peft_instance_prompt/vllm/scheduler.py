# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The scheduler, which keeps an instruction and its slots in one step, takes from the prefix cache all slots or none, tells slots and
edited tokens apart there, and fails requests whose prompt was not written.

vLLM makes it from the configuration (`scheduler_cls`), which names [`PromptScheduler`] or, with asynchronous scheduling, [`AsyncPromptScheduler`].
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from . import internals


class Prompts:
    """What both schedulers do beside vLLM's."""

    kv_cache_manager: Any
    requests: dict[str, Any]

    def add_request(self, request: Any) -> None:
        if (placed := internals.placed_of(request)) is not None:
            request.lora_request = None  # a request to the base model, which no number of LoRAs limits
            internals.hash_again(request, placed)
        super().add_request(request)  # type: ignore[misc]

    def _get_local_prefix_cache_hit(self, request: Any, *args: Any) -> tuple:
        """The blocks that a request takes from the prefix cache: those that hold all of its slots, or none.

        A slot behind the cached blocks would lack the states of the text in them. vLLM asks for a new request and for one that was preempted.
        """
        hit = super()._get_local_prefix_cache_hit(request, *args)  # type: ignore[misc]
        placed = internals.placed_of(request)
        return hit if placed is None else internals.whole_hit(hit, placed, self.kv_cache_manager)

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """How many tokens of a request are computed in this step: all of its instruction and slots, or none of it yet.

        vLLM asks it for the end of each chunk of a prompt; 0 keeps a request waiting.
        """
        number = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)  # type: ignore[misc]
        placed = internals.placed_of(request)
        return 0 if placed is not None and placed.is_torn(num_computed_tokens, number) else number

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        failed = internals.fail_requests(self, internals.reported(model_runner_output))
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        return internals.with_errors(outputs, failed)


class PromptScheduler(Prompts, Scheduler):
    """vLLM's scheduler, with instance prompts."""


class AsyncPromptScheduler(Prompts, AsyncScheduler):
    """vLLM's asynchronous scheduler, with instance prompts."""
