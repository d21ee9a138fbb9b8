# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What runs on a GPU only, on stand-ins: graphs are left out of steps that write slots, and of no others."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from peft_instance_prompt.vllm import internals
from peft_instance_prompt.vllm.plan import Placed


PLACED = Placed("a", 3, [0, 1], [0, 1])


def request(name: str, done: int, placed: Placed | None = PLACED):
    params = SimpleNamespace(extra_args={internals.KEY: placed.to_dict()} if placed else None)
    return SimpleNamespace(
        req_id=name, sampling_params=params, num_computed_tokens=done, prompt_token_ids=list(range(9))
    )


class Store:
    """Plans what it is told of."""

    def __init__(self):
        self.requests, self.seen = {}, []
        self.writer = SimpleNamespace(plan=SimpleNamespace(rows=[]))

    def plan(self, prefills):
        self.seen = [prefill for prefill in prefills if prefill.done <= max(prefill.placed.slots)]
        self.writer.plan.rows = self.seen
        return bool(self.seen)

    def failing(self, run):
        return run()


class Runner:
    """Keeps how it was called."""

    def __init__(self):
        self.model, self.profiles, self.skipped = nn.Identity(), [], []
        self.model_state = SimpleNamespace(
            add_request=lambda index, new: None,
            remove_request=lambda name: None,
            prepare_inputs=lambda batch, states: {"kept": True},
        )

    def get_model(self):
        return self.model

    def execute_model(self, scheduler_output, is_profile=False):
        self.profiles.append(is_profile)
        for number, new in enumerate(scheduler_output.scheduled_new_reqs):
            self.model_state.add_request(number, new)
        lengths = list(scheduler_output.num_scheduled_tokens.values())
        batch = SimpleNamespace(
            req_ids=list(scheduler_output.num_scheduled_tokens),
            query_start_loc_np=np.cumsum([0, *lengths]),
            num_computed_tokens_np=np.array(scheduler_output.done),
        )
        assert self.model_state.prepare_inputs(batch, None) == {"kept": True}
        self.model(0)

    def sample_tokens(self, grammar_output):
        return "sampled"


def step(lengths: dict[str, int], done: list[int], *new):
    return SimpleNamespace(num_scheduled_tokens=lengths, scheduled_new_reqs=new, done=done)


def test_second_runner_runs_steps_with_slots_eagerly(monkeypatch) -> None:
    context = SimpleNamespace(skip_compiled=False)
    monkeypatch.setattr(internals, "get_forward_context", lambda: context)
    runner, store = Runner(), Store()
    internals.extend_v2(runner, store)

    def run(*args):
        context.skip_compiled = False
        runner.execute_model(step(*args))
        return runner.profiles[-1], context.skip_compiled

    assert run({"base": 5}, [0], request("base", 0, None)) == (False, False)
    assert run({"base": 1, "r": 6}, [5, 0], request("r", 0)) == (True, True)
    ((name, placed, ids, row, done, length),) = store.seen
    assert (name, placed, row, done, length) == ("r", PLACED, 1, 0, 6) and ids == list(range(9))
    # Slots that come from the prefix cache are not written, so that the step may run as a graph.
    assert run({"cached": 3}, [4], request("cached", 4)) == (False, False)
    assert run({"r": 1}, [9]) == (False, False)
    runner.model_state.remove_request("r")
    assert list(store.requests) == ["cached"]
    assert runner.sample_tokens(None) == "sampled"


@pytest.mark.parametrize("name", ["", "model_runner_output", "_model_runner_output"])
def test_failures_are_reported_with_the_output(name) -> None:
    """An asynchronous runner has a step's output within its own."""
    inner = SimpleNamespace()
    assert internals.reported(inner) == {}
    internals.report(SimpleNamespace(**{name: inner}) if name else inner, {"r": "why"})
    assert internals.reported(inner) == {"r": "why"}


@pytest.mark.parametrize(
    "batched, threshold, wanted",
    [
        (2048, 0, (2048, "--max-num-batched-tokens")),
        (2048, 64, (64, "--long-prefill-token-threshold")),
        (2048, 4096, (2048, "--max-num-batched-tokens")),
    ],
)
def test_longest_step(batched, threshold, wanted) -> None:
    scheduler = SimpleNamespace(max_num_batched_tokens=batched, long_prefill_token_threshold=threshold)
    assert internals.longest_step(SimpleNamespace(scheduler_config=scheduler)) == wanted
