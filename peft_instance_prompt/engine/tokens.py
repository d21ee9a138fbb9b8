# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The tokens of a call: which are padding, which sequence of its row each belongs to, and which are whose instruction.

In a padded batch an instance is a row. A packed or padding-free row, or the flat batch of a serving engine, holds several. A generator
sees no difference.

A packed row is a chain of segments. A segment of two or more tokens is a sequence, and an instance. A segment of one token is padding as
TRL writes it, or a text that predicts nothing: it gets no prompt.

Shapes: B rows, S tokens, L slots, N = S + L positions, G instances of up to n tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from ..nn.pooling import first_index, last_index
from .slots import Layout, arrange, insert
from .stack import StackInfo


@dataclass(frozen=True)
class Text:
    """The tokens in a call of a stack.

    Attributes:
        ids (`torch.LongTensor`, *optional*): Shape (B, S). None if they are not known.
        embeds (`torch.Tensor`): Shape (B, S, e), the input embeddings. Without slots nobody reads them, and it is what the stack was called
            with, ids (B, S) or embeddings.
        mask (`torch.Tensor`, *optional*): Shape (B, S). The caller's padding mask. None if there is none, or if rows are packed.
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.
        packing (`Packing`, *optional*): The sequences in the rows, if the rows are packed.
        prefix (`torch.BoolTensor`, *optional*): Shape (B, S). The prefix of each row, if the caller's mask gives one to a prefix-LM.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor
    mask: torch.Tensor | None
    tokens: torch.Tensor
    packing: Packing | None = None
    prefix: torch.Tensor | None = None


@dataclass(frozen=True)
class Packing:
    """The sequences of a packed batch, row by row.

    Attributes:
        segment_ids (`torch.LongTensor`): Shape (B, S). The number of each token's segment in its row, from 0, not decreasing.
        place_in_segment (`torch.LongTensor`): Shape (B, S). The place of each token in its segment, from 0.
        sequence (`torch.LongTensor`): Shape (B, S). The number of each token's sequence in its row, from 0; -1 for a segment of one.
        rows (`torch.LongTensor`): Shape (G,). The row of each sequence.
        columns (`torch.LongTensor`): Shape (G, n). The columns of its tokens; arbitrary where `mask` is False.
        mask (`torch.BoolTensor`): Shape (G, n). False where a sequence has fewer tokens.
    """

    segment_ids: torch.Tensor
    place_in_segment: torch.Tensor
    sequence: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of_segments(cls, begins: torch.Tensor) -> Packing:
        """The packing whose segments begin where `begins` (B, S) is True.

        Raises:
            ValueError: There is no sequence.
        """
        B, S = begins.shape
        segment_ids = begins.cumsum(dim=1) - 1  # (B, S)
        place = torch.arange(S, device=begins.device).expand(B, S)  # (B, S)
        position = place - torch.where(begins, place, 0).cummax(dim=1).values  # (B, S)
        number = segment_ids + S * torch.arange(B, device=begins.device)[:, None]  # (B, S), of the batch's segments
        length = number.flatten().bincount(minlength=B * S)[number]  # (B, S)
        first = begins & (length > 1)  # (B, S)
        sequence = torch.where(length > 1, first.cumsum(dim=1) - 1, -1)  # (B, S)
        rows, starts = first.nonzero(as_tuple=True)  # (G,) each
        if not len(rows):
            raise ValueError(
                "A packed batch has no sequence of two or more tokens, so nothing to generate a prompt from."
            )
        lengths = length[rows, starts]  # (G,)
        own = torch.arange(int(lengths.max()), device=begins.device)  # (n,)
        columns = (starts[:, None] + own).clamp(max=S - 1)  # (G, n)
        return cls(segment_ids, position, sequence, rows, columns, own < lengths[:, None])

    def unpack(self, values: torch.Tensor, fill: Any) -> torch.Tensor:
        """`values` (B, S, ...) with a row per sequence, (G, n, ...), and `fill` behind the end of shorter sequences."""
        taken = values[self.rows[:, None].to(values.device), self.columns.to(values.device)]  # (G, n, ...)
        mask = self.mask.to(values.device).reshape(*self.mask.shape, *[1] * (values.dim() - 2))
        return torch.where(mask, taken, torch.as_tensor(fill, dtype=values.dtype, device=values.device))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (G, n) at the tokens' places in the packed rows (B, S); zero elsewhere."""
        row = self.rows[:, None].expand_as(self.columns)  # (G, n)
        return values.new_zeros(self.segment_ids.shape).index_put(
            (row[self.mask], self.columns[self.mask]), values[self.mask]
        )

    def of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The indices (K,) of the sequences in some rows."""
        return torch.isin(self.rows, rows.to(self.rows.device)).nonzero().flatten()

    def widen(self, layout: Layout) -> torch.Tensor:
        """The segment ids (B, N) of the stack's positions; -1 for unused slots, at the left edge."""
        own = torch.where(layout.used, self.segment_ids.gather(1, layout.first), -1)  # (B, L)
        return insert(self.segment_ids, own, layout)  # (B, N)

    def spread(self, table: torch.Tensor, column: torch.Tensor, num_slots: int) -> torch.Tensor:
        """A table (G, l) with a value per slot, by the [`columns_of`] (G, l) of the slots: (B, L), zero elsewhere."""
        # The last column is for slots without one.
        spare = table.new_zeros(len(self.segment_ids), num_slots + 1)  # (B, L + 1)
        return spare.index_put((self.rows[:, None].expand_as(column), column), table)[:, :-1]  # (B, L)

    def columns_of(self, used: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The columns (G, l) of the slots that are `used` (G, l) among the L slots of their rows, L for others; and L.

        The sequences' slots stand in their order, at the right edge.
        """
        row, count = self.rows, used.sum(dim=1)  # (G,) each
        whole = count.new_zeros(len(self.segment_ids)).index_add(0, row, count)  # (B,)
        L = max(int(whole.max()), 1)
        # Of earlier sequences in the row.
        before = count.cumsum(dim=0) - count - (whole.cumsum(dim=0) - whole)[row]  # (G,)
        column = (L - whole[row] + before)[:, None] + used.cumsum(dim=1) - 1  # (G, l)
        return torch.where(used, column, L), L

    def positions_of(self, layout: Layout, column: torch.Tensor) -> torch.Tensor:
        """The position (G, l) of each slot in its row, by its [`columns_of`] (G, l); N for unused ones."""
        slot_index = torch.nn.functional.pad(layout.slot_index, (0, 1), value=layout.order.shape[1])  # (B, L + 1)
        return slot_index[self.rows[:, None], column]  # (G, l)

    def apart(self, layout: Layout, slots: torch.Tensor, before_token: torch.Tensor) -> tuple[Layout, torch.Tensor]:
        """The layout with each sequence in a row of its own, and where its positions lie in the packed rows.

        Args:
            layout (`Layout`): The layout of the packed rows.
            slots (`torch.LongTensor`): Shape (G, l). The position of each slot in its row, N for unused ones.
            before_token (`torch.LongTensor`): Shape (G, l). A column of the packed rows.

        Returns:
            The layout of G rows of n tokens, and an index (G, l + n) of positions in the packed rows, N where these hold none.
        """
        n, N, rows = self.columns.shape[1], layout.order.shape[1], self.rows[:, None]
        alone = arrange(before_token - self.columns[:, :1], n, slots < N)
        tokens = layout.token_index[rows, self.columns].masked_fill(~self.mask, N)  # (G, n)
        return alone, torch.cat([slots, tokens], dim=1).gather(1, alone.order)  # (G, l + n)


def find_packing(
    call: Mapping[str, Any], num_rows: int, num_tokens: int, device: torch.device | str = "cpu", offset: int = 0
) -> Packing | None:
    """The sequences in the rows that a stack is called with; None if each row is one sequence.

    Args:
        call (`Mapping`): The arguments of the stack. `cu_seq_lens_q`, `cu_seq_lens_k` and `seq_idx` say where sequences begin. So do
            `position_ids` that start again, if there is no `attention_mask`.
        num_rows (`int`): B.
        num_tokens (`int`): S.
        device (`torch.device`): The device of the result. Defaults to the CPU.
        offset (`int`): The position id of a first token. Defaults to 0.

    Raises:
        ValueError: The arguments contradict each other, or their positions are not those of whole sequences.
    """
    B, S = num_rows, num_tokens
    found: dict[str, torch.Tensor] = {}
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if call.get(name) is not None:
            found[name] = _from_lengths(name, call[name], B, S)
    if (numbers := call.get("seq_idx")) is not None:
        if tuple(numbers.shape) != (B, S):
            raise ValueError(f"`seq_idx` must have the shape of the tokens, {(B, S)}, got {tuple(numbers.shape)}.")
        found["seq_idx"] = torch.nn.functional.pad(numbers.diff(dim=1) != 0, (1, 0), value=True)  # (B, S)
    positions, mask = call.get("position_ids"), call.get("attention_mask")
    if found and isinstance(mask, torch.Tensor) and not (mask.dim() == 2 and bool(mask.all())):
        raise ValueError(
            f"`attention_mask` hides tokens of rows that `{next(iter(found))}` says are packed: pass one of them."
        )
    if positions is not None and (found or mask is None):
        if positions.dim() != 2:
            _check_one_sequence(positions, bool(found))
        elif found or bool((positions.diff(dim=1) != 1).any()):
            found["position_ids"] = _from_positions((positions - offset).expand(B, S))
    if not found:
        return None
    (name, begins), *others = found.items()
    for other, differing in others:
        if (wrong := (differing.to(begins.device) != begins).nonzero()).numel():
            row, column = wrong[0].tolist()
            one, two = (name, other) if bool(begins[row, column]) else (other, name)
            raise ValueError(
                f"The packed rows contradict each other: by `{one}` a sequence begins at token {column} of row {row}, by `{two}` none "
                "does."
            )
    segments = begins.sum(dim=1)  # (B,)
    if bool((segments == 1).all()):
        return None
    packing = Packing.of_segments(begins.to(device))
    longest = int(packing.place_in_segment.max()) + 1
    for name in ("max_length_q", "max_length_k"):
        if call.get(name) is not None and int(call[name]) < longest:
            raise ValueError(f"`{name}` is {int(call[name])}, but a sequence has {longest} tokens.")
    return packing


def _from_lengths(name: str, ends: torch.Tensor, num_rows: int, num_tokens: int) -> torch.Tensor:
    """Where sequences begin (B, S), by cumulative lengths over all rows."""
    ends, whole = ends.flatten().long(), num_rows * num_tokens
    steps = ends.diff()
    if len(ends) < 2 or int(ends[0]) != 0 or int(ends[-1]) != whole or bool((steps <= 0).any()):
        raise ValueError(
            f"`{name}` must go up from 0 to the number of tokens, {whole}, got {ends.tolist() if len(ends) < 20 else ends}."
        )
    begins = torch.zeros(whole, dtype=torch.bool, device=ends.device)  # (B * S,)
    begins[ends[:-1]] = True
    begins = begins.view(num_rows, num_tokens)  # (B, S)
    if not bool(begins[:, 0].all()):
        raise ValueError(
            f"`{name}` {ends.tolist()} has a sequence that lies in two of the rows of {num_tokens} tokens."
        )
    return begins


def _from_positions(positions: torch.Tensor) -> torch.Tensor:
    """Where sequences begin (B, S), by positions that start again at 0."""
    begins = positions == 0  # (B, S)
    goes_on = torch.nn.functional.pad(positions.diff(dim=1) == 1, (1, 0))  # (B, S), the first column begins at 0
    if (wrong := (~begins & ~goes_on).nonzero()).numel():
        row, column = wrong[0].tolist()
        raise ValueError(
            f"`position_ids` of packed rows must start at 0 in each sequence and increase by 1, but token {column} of row {row} has "
            f"position {int(positions[row, column])}. A sequence that begins inside a text has no instruction: pack whole texts (TRL: "
            "`packing_strategy='bfd'`), or give padded rows an `attention_mask`."
        )
    return begins


def _check_one_sequence(positions: torch.Tensor, packed: bool) -> None:
    """Refuse packed rows of a model with several rows of positions, (R, B, S)."""
    if packed or bool((positions == 0).all(dim=0)[:, 1:].any()):
        raise ValueError(
            "Instance prompts do not support packed or padding-free rows in a model with several rows of `position_ids`, got "
            f"{tuple(positions.shape)}. Turn packing and padding-free batching off (TRL: `packing=False, padding_free=False`)."
        )


def check_packable(stack: PreTrainedModel, info: StackInfo, late: bool) -> None:
    """Refuse packed rows, which hold several sequences, in a stack that cannot keep these apart.

    Args:
        stack (`PreTrainedModel`): The stack.
        info (`StackInfo`): Facts about it.
        late (`bool`): Whether there are slots that some layers do not see.

    Raises:
        ValueError: It is no decoder, mixes tokens without attention, has absolute positions by column, or has attention of a kind that is
            not known to keep sequences apart.
    """
    why = None
    if not info.causal or info.decoder_of_pair:
        why = "packed rows are for decoder-only models"
    elif info.prefix_lm:
        why = "its kernel is not causal without a mask"
    elif info.mixing_layer is not None:
        why = f"{info.mixing_layer!r} mixes neighbouring tokens without attention, and would need `seq_idx`"
    elif info.absolute_column_positions:
        why = "it takes no `position_ids` and has absolute positions by column"
    elif strange := info.attention_kinds - {"full_attention", "sliding_attention"}:
        why = f"its {min(strange)!r} layers are not known to keep sequences apart by a mask"
    elif late and str(stack.config._attn_implementation).startswith("flash_attention"):
        why = "flash attention cannot hide late prompts from the first layers there"
    if why is not None:
        raise ValueError(
            "Instance prompts cannot be used with packed or padding-free rows, which hold several sequences, in "
            f"{type(stack).__name__}: {why}. Turn packing and padding-free batching off (TRL: `packing=False, padding_free=False`)."
        )


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
            sequence (`torch.LongTensor`): Shape (B, S). [`Packing.sequence`]: in each row from 0, not decreasing; -1 for padding.

        Raises:
            ValueError: A sequence has no instruction token.
        """
        begins = (sequence >= 0) & (sequence != torch.nn.functional.pad(sequence[:, :-1], (1, 0), value=-1))  # (B, S)
        row, first = begins.nonzero(as_tuple=True)  # (G,) each
        instance = begins.flatten().cumsum(dim=0).view_as(sequence) - 1  # (B, S), counted over all rows
        # Rows and columns of the instruction tokens.
        place = (scope & (sequence >= 0)).nonzero(as_tuple=True)  # (T,) each
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
