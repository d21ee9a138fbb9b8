# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which tokens are whose: rows, packed rows, and the flat batch of a serving engine."""

from __future__ import annotations

import pytest
import torch

from peft_instance_prompt.engine.slots import arrange, insert
from peft_instance_prompt.engine.tokens import InstanceTokens, span


def texts(selection: InstanceTokens, values: torch.Tensor) -> list[list[int]]:
    """The tokens of each instance."""
    taken = selection.take(values)
    return [row[kept].tolist() for row, kept in zip(taken, selection.mask)]


SCOPE = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]]).bool()
TOKENS = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]).bool()
IDS = torch.arange(12).view(2, 6)


def test_rows() -> None:
    selection = InstanceTokens.of_rows(SCOPE, TOKENS)
    assert texts(selection, IDS) == [[2, 3, 4], [7, 8, 9]]
    assert selection.columns == slice(1, 5), "neither padding nor response is read"
    assert selection.take(IDS).data_ptr() == IDS[:, 1:].data_ptr(), "a view, no copy"
    assert (selection.first.tolist(), selection.last.tolist()) == ([2, 1], [4, 3])


def test_all_tokens_are_the_identity() -> None:
    selection = InstanceTokens.of_rows(torch.ones(2, 6).bool(), torch.ones(2, 6).bool())
    assert selection.take(IDS).data_ptr() == IDS.data_ptr() and selection.take(IDS).shape == IDS.shape


def test_rows_without_instruction_select_nothing() -> None:
    selection = InstanceTokens.of_rows(torch.zeros(2, 6).bool(), TOKENS)
    assert texts(selection, IDS) == [[], []]


@pytest.mark.parametrize("before_token", [[[2, 2], [1, 1]], [[3, 3], [2, 2]], [[5, 5], [4, 4]], [[3, 5], [6, 2]]])
def test_within_the_stack(before_token: list) -> None:
    """The same instances among tokens and slots, wherever these stand."""
    layout = arrange(torch.tensor(before_token), 6)
    states = insert(IDS, torch.full((2, 2), -1), layout)
    inside = InstanceTokens.of_rows(SCOPE, TOKENS).within(layout)
    assert texts(inside, states) == [[2, 3, 4], [7, 8, 9]]
    values = states[..., None].float()
    assert inside.state_at(values, inside.first).flatten().tolist() == [2, 7]
    assert inside.state_at(values, inside.last).flatten().tolist() == [4, 9]


def test_some_rows() -> None:
    selection = InstanceTokens.of_rows(SCOPE, TOKENS).pick(torch.tensor([1]))
    assert texts(selection, IDS) == [[7, 8, 9]] and len(selection) == 1
    assert selection.state_at(IDS[..., None].float(), selection.first).flatten().tolist() == [7]


PACKED = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, -1, -1]])
PACKED_SCOPE = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 0, 0, 0]]).bool()
PACKED_IDS = torch.arange(16).view(2, 8)
PACKED_TEXTS = [[0, 1], [3], [6, 7], [8], [10, 11]]


def test_sequences_of_packed_rows() -> None:
    selection = InstanceTokens.of_sequences(PACKED_SCOPE, PACKED)
    assert texts(selection, PACKED_IDS) == PACKED_TEXTS
    assert selection.rows.tolist() == [0, 0, 0, 1, 1]
    assert selection.first.tolist() == [0, 3, 5, 0, 2], "the first token of a sequence may lie outside the instruction"
    assert selection.last.tolist() == [1, 3, 7, 0, 3]
    some = selection.pick(torch.tensor([4, 2]))
    assert texts(some, PACKED_IDS) == [[10, 11], [6, 7]]


def test_sequences_within_the_stack() -> None:
    """One slot per sequence; row 1 has one that is unused."""
    before_token = torch.tensor([[0, 4, 5], [0, 0, 2]])
    used = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
    layout = arrange(before_token, 8, used)
    states = insert(PACKED_IDS, torch.full((2, 3), -1), layout)
    inside = InstanceTokens.of_sequences(PACKED_SCOPE, PACKED).within(layout)
    assert texts(inside, states) == PACKED_TEXTS
    values = states[..., None].float()
    assert inside.state_at(values, inside.first).flatten().tolist() == [0, 3, 5, 8, 10]
    assert inside.state_at(values, inside.last).flatten().tolist() == [1, 3, 7, 8, 11]


def test_a_flat_batch() -> None:
    """All requests of a serving engine in one row: the same instances as in a padded batch."""
    lengths = [3, 1, 2]
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    selection = InstanceTokens.of_sequences(torch.ones(1, 6).bool(), sequence)
    assert texts(selection, torch.arange(6)[None]) == [[0, 1, 2], [3], [4, 5]]
    padded = torch.tensor([[0, 1, 2], [3, -1, -1], [4, 5, -1]])
    of_rows = InstanceTokens.of_rows(padded >= 0, padded >= 0)
    assert texts(of_rows, padded) == texts(selection, torch.arange(6)[None])


def test_a_sequence_without_instruction() -> None:
    scope = PACKED_SCOPE.clone()
    scope[0, 3] = False
    with pytest.raises(ValueError, match=r"without an instruction token, as \(row, sequence\): \[\(0, 1\)\]"):
        InstanceTokens.of_sequences(scope, PACKED)


def test_span() -> None:
    assert span(SCOPE) == slice(1, 5)
    assert span(torch.zeros(2, 3).bool()) == slice(0, 3)
