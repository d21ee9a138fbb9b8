# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Slots, against lists put together in Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from peft_instance_prompt.engine import slots


def merged(before_token: list[int], used: list[bool], num_tokens: int) -> list[str]:
    """One row: unused slots at the left edge, each used slot before its token."""
    row = [f"s{k}" for k in range(len(before_token)) if not used[k]]
    for t in range(num_tokens + 1):
        row += [f"s{k}" for k in range(len(before_token)) if used[k] and before_token[k] == t]
        row += [f"t{t}"] if t < num_tokens else []
    return row


def names(order: torch.Tensor, num_slots: int) -> list[str]:
    return [f"s{n}" if n < num_slots else f"t{n - num_slots}" for n in order.tolist()]


CASES = [
    ([[0, 0, 0]], [[1, 1, 1]], 4),
    ([[1, 1, 1]], [[1, 1, 1]], 4),
    ([[4, 4, 4]], [[1, 1, 1]], 4),
    ([[0, 2, 4], [2, 0, 3]], [[1, 1, 1], [1, 1, 1]], 4),  # before_tokens need not be sorted
    ([[0, 2, 4], [2, 0, 3]], [[0, 1, 1], [1, 0, 0]], 4),
    ([[0, 0]], [[0, 0]], 1),
]


@pytest.mark.parametrize(("before_token", "used", "num_tokens"), CASES)
def test_arrange(before_token: list, used: list, num_tokens: int) -> None:
    layout = slots.arrange(torch.tensor(before_token), num_tokens, torch.tensor(used).bool())
    L = len(before_token[0])
    assert (layout.num_slots, layout.num_tokens) == (L, num_tokens)
    assert layout.all_used == all(all(row) for row in used)
    for b in range(len(before_token)):
        row = names(layout.order[b], L)
        assert row == merged(before_token[b], used[b], num_tokens)
        assert [row[n] for n in layout.slot_index[b]] == [f"s{k}" for k in range(L)]
        assert [row[n] for n in layout.token_index[b]] == [f"t{t}" for t in range(num_tokens)]
    assert torch.equal(layout.output_index, layout.token_index)


def test_output_index_is_that_of_the_last_slot_behind_the_instruction() -> None:
    before_token = torch.tensor([[3, 3], [0, 3], [0, 0], [3, 3]])
    used = torch.tensor([[1, 1], [1, 1], [1, 1], [0, 0]]).bool()
    layout = slots.arrange(before_token, 5, used, predicts=before_token == 3)
    moved = (layout.output_index - layout.token_index).tolist()
    assert moved == [[0, 0, 2, 0, 0], [0, 0, 1, 0, 0], [0] * 5, [0] * 5]
    for b, place in enumerate(("s1", "s1", "t2", "t2")):
        assert names(layout.order[b], 2)[layout.output_index[b, 2]] == place


def test_output_index_where_all_slots_stand_behind_the_instruction() -> None:
    """Slots before the text and behind it meet behind an instruction of one token: it is read at the last of all."""
    before_token = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 1]])
    predicts = torch.tensor([[0, 0, 1], [1, 0, 0], [1, 1, 0]]).bool()
    used = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]]).bool()
    layout = slots.arrange(before_token, 4, used, predicts)
    places = [names(layout.order[b], 3)[layout.output_index[b, 0]] for b in range(3)]
    assert places == ["s2", "s0", "s1"], "at the last of those that predict, however many they are"
    assert torch.equal(layout.output_index[:, 1:], layout.token_index[:, 1:])


def test_insert_then_take_gives_back_tokens_and_slots() -> None:
    tokens, prompts = torch.randn(2, 5, 3), torch.randn(2, 2, 3)
    layout = slots.arrange(torch.tensor([[0, 5], [3, 1]]), 5)
    both = slots.insert(tokens, prompts, layout)
    assert both.shape == (2, 7, 3)
    assert torch.equal(slots.take(both, layout.token_index), tokens)
    assert torch.equal(slots.take(both, layout.slot_index), prompts)
    assert torch.equal(both[0, 0], prompts[0, 0]) and torch.equal(both[0, 6], prompts[0, 1])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert slots.insert(mask, layout.used, layout).tolist() == [[1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_take_along_each_dimension(dim: int) -> None:
    values, index = torch.randn(2, 5, 6, 7), torch.tensor([[4, 0, 2], [1, 1, 3]])
    taken = slots.take(values, index, dim)
    for b in range(2):
        assert torch.equal(taken[b], values[b].index_select(dim - 1, index[b]))
    assert taken.is_contiguous()


def fill(states: torch.Tensor, prompts: torch.Tensor, layout: slots.Layout, **how: bool) -> torch.Tensor:
    at = slots.SlotRows.of(layout.slot_index, torch.arange(len(states)), layout)
    return slots.write(states, at.rows, at.pick(prompts), **how)


def test_fill_replaces_or_adds_in_the_slots_only() -> None:
    states, prompts = torch.randn(2, 7, 3), torch.randn(2, 2, 3)
    layout = slots.arrange(torch.tensor([[0, 5], [3, 1]]), 5)
    written, added = fill(states, prompts, layout), fill(states, prompts, layout, add=True)
    for out, expected in ((written, prompts), (added, slots.take(states, layout.slot_index) + prompts)):
        assert torch.allclose(slots.take(out, layout.slot_index), expected)
        assert torch.equal(slots.take(out, layout.token_index), slots.take(states, layout.token_index))
    assert fill(states.half(), prompts, layout).dtype == torch.half


def test_rows_of_packed_instances() -> None:
    """Three instances of up to two slots in two rows, the second of which has one of its own, and instance 1 has none of its second."""
    states, prompts = torch.zeros(2, 5, 1), torch.arange(1.0, 7.0).reshape(3, 2, 1)
    layout = slots.arrange(torch.tensor([[0, 2, 2], [3, 3, 3]]), 2, torch.tensor([[1, 1, 1], [0, 0, 1]]).bool())
    layout = replace(layout, segment_ids=torch.zeros(2, 5))
    position = torch.tensor([[0, 2], [3, 5], [5, 4]])  # N = 5: there is no such slot
    at = slots.SlotRows.of(position, torch.tensor([0, 0, 1]), layout)
    for in_place in (False, True):
        written = slots.write(states, at.rows, at.pick(prompts), in_place=in_place)
        assert written[..., 0].tolist() == [[1, 0, 2, 3, 0], [0, 0, 0, 0, 6]]
        assert bool(states.any()) == in_place
    added = slots.write(states, at.rows, at.pick(prompts), add=True)
    assert torch.equal(added, 2 * states)


def test_fill_passes_gradients_to_prompts_and_tokens() -> None:
    states, prompts = torch.randn(1, 4, 3, requires_grad=True), torch.randn(1, 1, 3, requires_grad=True)
    fill(states, prompts, slots.arrange(torch.tensor([[1]]), 3)).sum().backward()
    assert prompts.grad.eq(1).all()
    assert states.grad[0, :, 0].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("rows", [None, 3])
def test_positions_count_used_slots(rows: int | None) -> None:
    # Left padding of one; the two slots stand before the first real token, behind it, or at the end; one may be unused.
    own = torch.tensor([[0, 0, 1, 2]]).expand(4, 4)
    first = torch.tensor([[1]] * 4)
    used = torch.tensor([[1, 1], [1, 1], [1, 1], [0, 1]]).bool()
    layout = slots.arrange(torch.tensor([[1, 1], [2, 2], [4, 4], [1, 1]]), 4, used)
    ids = own if rows is None else own.expand(rows, 4, 4)
    out = slots.insert_positions(ids, first, layout)
    for positions in out[None] if rows is None else out:
        inside = [[p for p, n in zip(positions[b].tolist(), names(layout.order[b], 2)) if n != "t0"] for b in range(4)]
        assert inside[:3] == [[0, 1, 2, 3, 4]] * 3
        assert inside[3][1:] == [0, 1, 2, 3], "an unused slot, the first here, moves nothing"


def test_positions_need_not_start_at_zero() -> None:
    layout = slots.arrange(torch.tensor([[0], [2]]), 3)
    out = slots.insert_positions(torch.tensor([[5, 6, 7], [5, 6, 7]]), torch.tensor([[0], [0]]), layout)
    assert out.tolist() == [[5, 6, 7, 8], [5, 6, 7, 8]]


def test_unused_slots_at_the_end() -> None:
    used = torch.tensor([[False, True], [True, True], [False, False]])
    layout = slots.arrange(torch.tensor([[0, 0], [1, 3], [0, 2]]), 3, used, unused_at_end=True)
    # Slots are 0 and 1, tokens 2, 3 and 4.
    assert layout.order.tolist() == [[1, 2, 3, 4, 0], [2, 0, 3, 4, 1], [2, 3, 4, 0, 1]]


def test_a_slot_behind_the_first_token_predicts_nothing() -> None:
    layout = slots.arrange(torch.tensor([[1, 1]]), 3)
    assert torch.equal(layout.output_index, layout.token_index), "each token keeps its own output"


def test_a_packed_row() -> None:
    """Three sequences of 3, 2 and 1 tokens, two slots each: before the first, behind the second, and one of the third is unused."""
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0]])
    sequence = torch.tensor([[0, 0, 0, 1, 1, 2]])
    before_token = torch.tensor([[0, 0, 5, 5, 5, 5]])  # the third begins at token 5, where the second ends
    used = torch.tensor([[1, 1, 1, 1, 0, 1]]).bool()
    predicts = torch.tensor([[0, 0, 1, 1, 0, 0]]).bool()
    layout = slots.arrange(before_token, 6, used, predicts)
    assert names(layout.order[0], 6) == ["s4", "s0", "s1", "t0", "t1", "t2", "t3", "t4", "s2", "s3", "s5", "t5"]
    first = torch.tensor([[0, 0, 3, 3, 5, 5]])
    ids = slots.insert_positions(position_ids, first, layout, sequence)[0].tolist()
    assert ids[1:6] == [0, 1, 2, 3, 4], "each sequence counts its own slots from 0"
    assert ids[6:10] == [0, 1, 2, 3]
    assert ids[10:] == [0, 1]
    moved = (layout.output_index - layout.token_index)[0].tolist()
    assert moved == [0, 0, 0, 0, 2, 0], "the last token of the second sequence is read at its last slot"
    rows = slots.insert_positions(position_ids.expand(3, 1, 6), first, layout, sequence)
    assert rows[:, 0].tolist() == [ids] * 3


def test_a_flat_batch_is_one_packed_row() -> None:
    """What a serving engine runs: all tokens of all requests in one row, and slots where each begins."""
    lengths = [4, 2, 3]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    starts = torch.tensor([[0, 4, 6]])
    layout = slots.arrange(starts, 9)
    ids = slots.insert_positions(position_ids, starts, layout, sequence)[0].tolist()
    assert ids == [*range(5), *range(3), *range(4)]
    tokens = torch.randn(1, 9, 2)
    states = slots.insert(tokens, torch.zeros(1, 3, 2), layout)
    written = fill(states, torch.ones(1, 3, 2), layout)
    assert torch.equal(slots.take(written, layout.token_index), tokens)
    assert written[0, layout.slot_index[0]].eq(1).all()
