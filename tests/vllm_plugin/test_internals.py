# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What runs on a GPU only, on stand-ins: graphs are left out of steps that write slots, and of no others."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from peft_instance_prompt.vllm import internals
from peft_instance_prompt.vllm.plan import Edited, Placed


PLACED = Placed("a", 3, [0, 1], [0, 1])
EDITED = Edited("b", [[0, 3], [7, 9]])


def request(name: str, done: int, placed: Placed | Edited | None = PLACED):
    params = SimpleNamespace(extra_args={internals.KEY: asdict(placed)} if placed else None)
    return SimpleNamespace(
        req_id=name, sampling_params=params, num_computed_tokens=done, prompt_token_ids=list(range(9))
    )


class Store:
    """Plans what it is told of."""

    def __init__(self):
        self.requests, self.seen = {}, []
        self.writer = SimpleNamespace(plan=SimpleNamespace(rows=[]))

    def plan(self, prefills):
        self.seen = [prefill for prefill in prefills if prefill.placed.is_due(prefill.done, prefill.length)]
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
    """A step of requests with so many tokens each behind `done` ones; those that are not `new` are known to the runner."""
    going = [(name, at) for name, at in zip(lengths, done) if name not in [one.req_id for one in new]]
    known = SimpleNamespace(req_ids=[name for name, _ in going], num_computed_tokens=[at for _, at in going])
    return SimpleNamespace(
        num_scheduled_tokens=lengths, scheduled_new_reqs=new, scheduled_cached_reqs=known, done=done
    )


@pytest.fixture
def second_runner(monkeypatch):
    """A runner's store, and what runs a step and tells whether it ran without graphs, and without compiled code."""
    context = SimpleNamespace(skip_compiled=False)
    monkeypatch.setattr(internals, "get_forward_context", lambda: context)
    runner, store = Runner(), Store()
    internals.extend_v2(runner, store)

    def run(*args):
        context.skip_compiled = False
        runner.execute_model(step(*args))
        return runner.profiles[-1], context.skip_compiled

    return runner, store, run


def test_second_runner_runs_steps_with_slots_eagerly(second_runner) -> None:
    runner, store, run = second_runner
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


def test_second_runner_runs_chunks_with_edits_eagerly(second_runner) -> None:
    runner, store, run = second_runner
    assert run({"r": 2}, [0], request("r", 0, EDITED)) == (True, True)
    assert run({"r": 2}, [2]) == (True, True)
    ((name, placed, ids, row, done, length),) = store.seen
    assert (name, placed, row, done, length) == ("r", EDITED, 0, 2, 2) and ids == list(range(9))
    assert run({"r": 3}, [4]) == (False, False)  # an answer of an earlier turn
    assert run({"base": 1, "r": 2}, [5, 7]) == (True, True)
    for done in (9, 10):  # what is generated
        assert run({"r": 1}, [done]) == (False, False)
    assert run({"r": 8}, [3], request("r", 3, EDITED)) == (
        True,
        True,
    )  # preempted, and computed again from a cached block on
    assert store.seen[0].placed.positions(3, 8) == [7, 8]


# ---------------------------------------------------------------------------------------------------------- the prefix cache


def hashed(
    prompt: list[int], placed: Placed | list[list[int]], generated: list[int] = [], block: int = 4
) -> list[bytes]:
    """The hashes of a request's blocks, which came with its adapter's name and has generated some tokens one by one."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from peft_instance_prompt.vllm.scheduler import Prompts

    class Bare:
        def add_request(self, request):
            self.added = request

    class Scheduler(Prompts, Bare):
        """Ours, over one that does nothing."""

    init_none_hash(sha256)
    placed = placed if isinstance(placed, Placed) else Edited("a", placed)
    params = SamplingParams(extra_args={internals.KEY: asdict(placed)})
    named, hasher = SimpleNamespace(lora_name="a", lora_path="a"), get_request_block_hasher(block, sha256)
    made = Request("r", prompt, params, None, lora_request=named, cache_salt="a", block_hasher=hasher)
    Scheduler().add_request(made)
    for token in generated:
        made.append_output_token_ids(token)
    return made.block_hashes


def test_blocks_are_told_apart_by_what_is_edited() -> None:
    ids, whole = list(range(16)), [[0, 16]]
    turn = hashed(ids[:6], [[0, 6]], ids[6:])
    assert len(turn) == 4
    # The next turn's prompt holds what was generated. By its role it is an answer, or is not.
    assert hashed(ids, [[0, 6]]) == turn
    assert hashed(ids, whole)[0] == turn[0] and not set(hashed(ids, whole)[1:]) & set(turn)
    assert not set(hashed(ids, [[0, 5], [6, 16]])[1:]) & {*turn, *hashed(ids, whole)}
    # A token has the hash of its block on its conscience, and of all behind it.
    later = hashed(ids, [[0, 6], [10, 11]])
    assert later[:2] == turn[:2] and later[2] != turn[2] and later[3] != turn[3]
    # Without a cache there is nothing to hash.
    bare = SimpleNamespace(_block_hasher=None)
    internals.hash_again(bare, Edited("a", whole))
    assert bare._block_hasher is None


def test_blocks_with_slots_are_found_by_the_next_turn() -> None:
    """Its prompt holds what was generated behind the instruction, which is the same."""
    ids = list(range(16))
    turn = hashed(ids[:6], PLACED, ids[6:])
    assert len(turn) == 4 and hashed(ids, PLACED) == turn
    assert not set(hashed(ids, Placed("a", 3, [1, 2], [0, 1]))) & {*turn, *hashed(ids, [[0, 3]])}


@pytest.mark.parametrize(
    "placed, offered, taken",
    [
        (Placed("a", 40, [40, 41], [0, 1]), 32, 0),  # the slots stand behind the blocks,
        (Placed("a", 31, [31, 32], [0, 1]), 32, 0),  # some of them do,
        (Placed("a", 30, [30, 31], [0, 1]), 32, 32),  # or none
        (Placed("a", 40, [0, 1], [0, 1]), 32, 32),  # text behind slots is computed from where the blocks end
        (Placed("a", 40, [40, 41], [0, 1]), 0, 0),
        (Edited("a", [[0, 40]]), 32, 32),
        (None, 32, 32),
    ],
)
def test_the_prefix_cache_gives_all_slots_or_nothing(placed, offered, taken) -> None:
    from peft_instance_prompt.vllm.scheduler import Prompts

    class Bare:
        kv_cache_manager = SimpleNamespace(empty_kv_cache_blocks="none")

        def _get_local_prefix_cache_hit(self, request, *args):
            return "some" if offered else "none", offered, 0, False

    class Scheduler(Prompts, Bare):
        """Ours, over one that finds the blocks offered."""

    for more in ([], [None]):  # 0.32, and 0.33 with its bound
        blocks, *rest = Scheduler()._get_local_prefix_cache_hit(request("r", 0, placed), *more)
        assert blocks == ("some" if taken else "none") and rest == [taken, 0, False]


@pytest.mark.parametrize("name", ["", "model_runner_output", "_model_runner_output"])
def test_failures_are_reported_with_the_output(name) -> None:
    """An asynchronous runner has a step's output within its own."""
    inner = SimpleNamespace()
    assert internals.reported(inner) == {}
    internals.report(SimpleNamespace(**{name: inner}) if name else inner, {"r": 16})
    assert internals.reported(inner) == {"r": 16}


def test_requests_that_took_blocks_of_a_failed_one_fail_with_it() -> None:
    """The fourth shares what the first had found in the cache. The fifth, of layers with a window, took what the third had computed."""
    ids = {"first": [5, 6, 7], "waits": [], "third": [5, 6, 8, 9], "fourth": [5, 11], "fifth": [0, 0, 8, 12]}
    null, ended, evicted = 0, [], set()
    manager = SimpleNamespace(
        kv_cache_config=SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))]
        ),
        block_pool=SimpleNamespace(null_block=SimpleNamespace(block_id=null)),
        get_block_ids=lambda name: (ids[name],),
        evict_blocks=evicted.update,
    )
    scheduler = SimpleNamespace(
        requests=ids, kv_cache_manager=manager, finish_requests=lambda names, status: ended.extend(names)
    )
    internals.fail_requests(scheduler, {"first": 16, "gone": 0})
    assert sorted(ended) == ["fifth", "first", "third"] and evicted == {6, 7, 8, 9, 12}
    assert internals.fail_requests(scheduler, {"gone": 0}) == [] and len(ended) == 3


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
