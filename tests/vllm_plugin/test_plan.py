# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The plan: which rows of a flat batch are whose instruction and slots, and which are edited."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from peft_instance_prompt import IAPTConfig, PreFTConfig
from peft_instance_prompt.vllm.plan import Edited, Placed, Prefill, make_plan


def generator(**fields):
    return of_config(IAPTConfig(bottleneck_dim=8, **fields))


def editor(**fields):
    return of_config(PreFTConfig(r=4, init_weights=False, **fields))


def of_config(config):
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny.causal_lm(), config)
    return next(m for name, m in model.named_modules() if name.endswith("_generator.default"))


def prefill(
    name: str,
    key: str,
    num_read: int,
    slots: list[int],
    total: int,
    row: int,
    done: int = 0,
    length: int | None = None,
):
    placed = Placed(key, num_read, slots, list(range(len(slots))))
    return Prefill(name, placed, list(range(100, 100 + total)), row, done, total - done if length is None else length)


def editing(name: str, key: str, ranges: list[list[int]], row: int, done: int, length: int):
    return Prefill(name, Edited(key, ranges), list(range(100, 400)), row, done, length)


def plan(*prefills: Prefill, **generators):
    return make_plan(prefills, generators or {"a": generator()}, torch.device("cpu"))


class Copies(TorchDispatchMode):
    """Counts copies to another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        if isinstance(out, torch.Tensor) and given and given[0].device != out.device:
            self.number = getattr(self, "number", 0) + 1
        return out


def test_text_is_what_is_no_slot() -> None:
    assert Placed("a", 3, [0, 1], [0, 1]).text == [2, 3, 4]
    assert Placed("a", 3, [1, 2], [0, 1]).text == [0, 3, 4]
    assert Placed("a", 3, [3, 4], [0, 1]).text == [0, 1, 2]


def test_rows_of_the_flat_batch() -> None:
    a, b, other = generator(), generator(), generator(num_virtual_tokens=2)
    # Rows: 0 is decoded by another request, 1-6 are the first request's, 7-11 the second's, 12-16 the third's.
    first = prefill("r1", "a", 4, [0, 1], total=6, row=1)
    second = prefill("r2", "b", 2, [1, 2], total=5, row=7)  # behind its instruction stands a response
    third = prefill("r3", "c", 3, [3, 4], total=5, row=12)
    alike, alone = plan(first, second, third, a=a, b=b, c=other).rows
    assert (alike.requests, alone.requests) == (["r1", "r2"], ["r3"])
    assert alike.group.generators == [a, b] and [rows.tolist() for rows in alike.group.rows_of] == [[0], [1]]
    assert alike.selection.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert alike.selection.columns[0].tolist() == [3, 4, 5, 6] and alike.selection.columns[1, :2].tolist() == [7, 10]
    assert alike.selection.first.tolist() == [3, 7] and alike.selection.last.tolist() == [6, 10]
    assert alike.token_ids[0].tolist() == [102, 103, 104, 105] and alike.token_ids[1, :2].tolist() == [100, 103]
    assert list(zip(alike.rows.tolist(), alike.instance.tolist(), alike.vector.tolist())) == [
        *((1, 0, 0), (2, 0, 1), (8, 1, 0), (9, 1, 1))
    ]
    assert alone.group.generators == [other] and alone.group.rows_of is None
    assert alone.rows.tolist() == [15, 16] and alone.selection.last.tolist() == [14]


def test_slots_in_the_cache_are_not_written() -> None:
    assert plan(prefill("r", "a", 4, [0, 1], total=6, row=0, done=2)).rows == []
    assert len(plan(prefill("r", "a", 4, [0, 1], total=6, row=0)).rows) == 1


def test_tokens_that_are_edited_in_a_step() -> None:
    ranges = [[0, 3], [6, 200]]
    edited = Edited("a", ranges)
    assert edited.positions(0, 10) == [0, 1, 2, 6, 7, 8, 9]
    assert edited.positions(4, 4) == [6, 7] and edited.positions(198, 9) == [198, 199]
    for done, length in ((3, 3), (200, 1), (250, 7)):  # an answer of an earlier turn, and what is generated
        assert edited.positions(done, length) == [] and not edited.writes(done, length)
        assert plan(editing("r", "a", ranges, 0, done, length), a=editor()).rows == []
    assert edited.writes(5, 2) and edited.writes(0, 1) and not edited.is_torn(0, 1)


def test_rows_of_edits_beside_slots() -> None:
    a, b, slots = editor(), editor(), generator()
    # Rows: 0-5 are the first request's, a chunk that begins at its token 4; 6-11 have slots, 12-181 are the third's, 182 the fourth's.
    first = editing("r1", "a", [[0, 3], [6, 20]], row=0, done=4, length=6)
    second = prefill("r2", "c", 4, [0, 1], total=6, row=6)
    third = editing("r3", "b", [[0, 150]], row=12, done=0, length=170)
    fourth = editing("r4", "a", [[0, 9]], row=182, done=8, length=1)
    edits, alone = plan(first, second, third, fourth, a=a, b=b, c=slots).rows
    assert (edits.requests, alone.requests) == (["r1", "r4", "r3"], ["r2"])
    assert edits.group.generators == [a, b] and edits.group.adapter_of == [0, 0, 1, 1, 1]  # 150 tokens are three tiles
    assert edits.selection.mask.sum(dim=1).tolist() == [4, 1, 64, 64, 22]
    assert edits.selection.columns[0, :4].tolist() == [2, 3, 4, 5] and edits.token_ids[0, :4].tolist() == [
        106,
        107,
        108,
        109,
    ]
    assert edits.rows.tolist() == [2, 3, 4, 5, 182, *range(12, 162)]
    own = edits.selection.columns[
        edits.instance, edits.vector
    ]  # each row that is written is one that its instance reads
    assert torch.equal(own, edits.rows) and edits.selection.mask[edits.instance, edits.vector].all()


def test_one_copy_to_the_device() -> None:
    adapters = {"a": generator(), "b": generator(), "c": generator(num_virtual_tokens=2)}
    requests = [prefill(f"r{key}{n}", key, 3, [0, 1], total=5, row=5 * n) for key in adapters for n in range(3)]
    with Copies() as copies:
        found = make_plan(requests, adapters, torch.device("meta")).rows
    assert len(found) == 2 and copies.number == 1
    assert {t.device.type for rows in found for t in (rows.token_ids, rows.rows, rows.selection.mask)} == {"meta"}


@pytest.mark.parametrize(
    "slots, done, length, torn, writes",
    [
        ([0, 1], 0, 5, True, True),  # the instruction ends behind the step
        ([0, 1], 0, 6, False, True),
        ([0, 1], 0, 1, True, True),
        ([0, 1], 2, 1, False, False),  # the slots are in the cache
        ([4, 5], 0, 5, True, True),
        ([4, 5], 0, 4, True, False),
        ([4, 5], 0, 6, False, True),
        ([4, 5], 6, 1, False, False),
    ],
)
def test_steps_that_tear_an_instruction(slots, done, length, torn, writes) -> None:
    placed = Placed("a", 4, slots, [0, 1])
    assert (placed.end, placed.is_torn(done, length), placed.writes(done, length)) == (6, torn, writes)


@pytest.mark.parametrize(
    "request_, words",
    [
        (prefill("r", "gone", 4, [0, 1], total=6, row=0), "is not loaded"),
        (prefill("r", "a", 4, [4, 5], total=6, row=0, done=2), "2 of them are in the cache"),
        (prefill("r", "a", 4, [0, 1], total=6, row=0, length=5), "5 are computed now"),
    ],
)
def test_what_cannot_be_served_as_prescribed_fails_alone(request_, words) -> None:
    good = prefill("good", "a", 4, [0, 1], total=6, row=6)
    found = plan(request_, good)
    assert [rows.requests for rows in found.rows] == [["good"]]
    assert list(found.failures) == ["r"] and words in found.failures["r"]
