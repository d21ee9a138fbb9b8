# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which tokens of a batch belong to which instance.

In a padded batch an instance is a row. A packed row, or the flat batch of a serving engine, holds several. A generator sees no
difference.

Shapes: B rows, N columns (tokens, or positions in the stack), G instances of up to n instruction tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..nn.pooling import first_index, last_index
from .layout import Layout, insert


@dataclass(frozen=True)
class InstanceTokens:
    """The instruction tokens of G instances among the columns of a batch.

    Attributes:
        mask (`torch.BoolTensor`): Shape (G, n). True for instruction tokens; False where an instance has fewer.
        first (`torch.LongTensor`): Shape (G,). The column of the first token of the instance's sequence.
        last (`torch.LongTensor`): Shape (G,). The column of its last instruction token.
        rows (`torch.LongTensor`, *optional*): Shape (G,). The row of each instance. None: instance g is row g.
        columns (`slice` or `torch.LongTensor`): The columns of the tokens, (G, n), or one range of n columns for all instances.
    """

    mask: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    rows: torch.Tensor | None
    columns: slice | torch.Tensor

    @classmethod
    def of_rows(cls, scope: torch.Tensor, tokens: torch.Tensor) -> InstanceTokens:
        """One instance per row.

        Args:
            scope (`torch.BoolTensor`): Shape (B, S). The instruction tokens.
            tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        """
        columns = span(scope)
        return cls(scope[:, columns], first_index(tokens), last_index(scope), None, columns)  # mask (B, n)

    @classmethod
    def of_sequences(cls, scope: torch.Tensor, sequence: torch.Tensor) -> InstanceTokens:
        """One instance per sequence, several of which lie in a row.

        Args:
            scope (`torch.BoolTensor`): Shape (B, S). The instruction tokens.
            sequence (`torch.LongTensor`): Shape (B, S). The segment ids of each row: from 0, not decreasing; -1 for padding.

        Raises:
            ValueError: A sequence has no instruction token.
        """
        begins = (sequence >= 0) & (sequence != torch.nn.functional.pad(sequence[:, :-1], (1, 0), value=-1))  # (B, S)
        row, first = begins.nonzero(as_tuple=True)  # (G,) each
        instance = begins.flatten().cumsum(dim=0).view_as(sequence) - 1  # (B, S), counted over all rows
        place = (scope & (sequence >= 0)).nonzero(
            as_tuple=True
        )  # (T,) each: rows and columns of the instruction tokens
        owner = instance[place]  # (T,), not decreasing
        counts = owner.bincount(minlength=len(row))  # (G,)
        if not bool(counts.all()):
            number = sequence[row, first]  # (G,)
            empty = [(int(row[g]), int(number[g])) for g in (counts == 0).nonzero().flatten()]
            raise ValueError(f"Sequences without an instruction token, as (row, sequence): {empty}.")
        rank = torch.arange(len(owner), device=scope.device) - (counts.cumsum(dim=0) - counts)[owner]  # (T,)
        mask = torch.arange(int(counts.max()), device=scope.device) < counts[:, None]  # (G, n)
        columns = first[:, None].expand(mask.shape).index_put((owner, rank), place[1])  # (G, n)
        last = columns.gather(1, counts[:, None] - 1)[:, 0]  # (G,)
        return cls(mask, first, last, row, columns)

    def __len__(self) -> int:
        return len(self.mask)

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """The values (G, n, ...) of the instruction tokens, out of `values` (B, N, ...)."""
        if isinstance(self.columns, slice):
            values = values[:, self.columns]  # (B, n, ...), no copy
            return values if self.rows is None else values[self.rows.to(values.device)]  # (G, n, ...)
        return values[self.each_row.to(values.device), self.columns.to(values.device)]  # (G, n, ...)

    def state_at(self, values: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The state (G, 1, w) of each instance at its `column` (G,), out of `values` (B, N, w), detached."""
        rows, column = self.each_row.to(values.device), column[:, None].to(values.device)  # (G, 1) each
        return values.detach()[rows, column]  # (G, 1, w)

    @cached_property  # each layer reads it
    def each_row(self) -> torch.Tensor:
        """The row (G, 1) of each instance."""
        rows = torch.arange(len(self), device=self.mask.device) if self.rows is None else self.rows
        return rows[:, None]  # (G, 1)

    def pick(self, instances: torch.Tensor | None) -> InstanceTokens:
        """Some of the instances, by their indices (K,); all for None."""
        if instances is None:
            return self
        rows = instances if self.rows is None else self.rows[instances]
        columns = self.columns if isinstance(self.columns, slice) else self.columns[instances]
        return replace(
            self,
            mask=self.mask[instances],
            first=self.first[instances],
            last=self.last[instances],
            rows=rows,
            columns=columns,
        )

    def within(self, layout: Layout) -> InstanceTokens:
        """The same instances, with columns among the positions of the stack. Call it on all instances of a batch, before `pick`."""
        rows = self.each_row
        first, last = (layout.token_index[rows[:, 0], column] for column in (self.first, self.last))  # (G,) each
        if not isinstance(self.columns, slice):
            return replace(self, first=first, last=last, columns=layout.token_index[rows, self.columns])
        scope = self.mask.new_zeros(len(self), layout.num_tokens)  # (B, S)
        scope[:, self.columns] = self.mask
        scope = insert(scope, scope.new_zeros(len(self), layout.num_slots), layout)  # (B, N)
        # A token moves by L columns at most.
        columns = wide_enough(self.columns.start, self.columns.stop + layout.num_slots, scope.shape[1])
        return replace(self, mask=scope[:, columns], first=first, last=last, columns=columns)


def span(scope: torch.Tensor) -> slice:
    """The shortest range of columns with all instruction tokens of `scope` (B, S)."""
    S, used = scope.shape[1], scope.any(dim=0)  # (S,)
    place = torch.arange(S, device=scope.device)  # (S,)
    start, stop = torch.stack([torch.where(used, place, S).min(), torch.where(used, place, -1).max() + 1]).tolist()
    return wide_enough(start, stop, S) if start < stop else slice(0, S)


def wide_enough(start: int, stop: int, num_columns: int) -> slice:
    """A range of columns; all of them, if it covers three quarters: a matrix product with a part first copies it, at each layer."""
    return slice(0, num_columns) if stop - start >= 0.75 * num_columns else slice(start, stop)
