# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The plan: which rows of a flat batch are whose instruction and slots."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import get_peft_model

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.vllm.plan import Placed, Prefill, make_plan


def generator(**fields):
    model = get_peft_model(tiny.causal_lm(), IAPTConfig(task_type="CAUSAL_LM", bottleneck_dim=8, **fields))
    return next(m for name, m in model.named_modules() if name.endswith("iapt_generator.default"))


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


def plan(*prefills: Prefill, **generators):
    return make_plan(prefills, generators or {"a": generator()}, torch.device("cpu"))


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
    alike, alone = plan(first, second, third, a=a, b=b, c=other)
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
    assert plan(prefill("r", "a", 4, [0, 1], total=6, row=0, done=2)) == []
    assert len(plan(prefill("r", "a", 4, [0, 1], total=6, row=0))) == 1


@pytest.mark.parametrize(
    "request_, words",
    [
        (prefill("r", "gone", 4, [0, 1], total=6, row=0), "is not loaded"),
        (prefill("r", "a", 4, [4, 5], total=6, row=0, done=2), "2 of them are in the cache"),
        (prefill("r", "a", 4, [0, 1], total=6, row=0, length=5), "5 are computed now"),
    ],
)
def test_what_cannot_be_served_as_prescribed_is_loud(request_, words) -> None:
    with pytest.raises(RuntimeError, match=words):
        plan(request_)
