# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Slots: extra positions that exist only inside the transformer stack. Pure tensor functions.

Slot k of row b stands before token `before_token[b, k]`; S puts it behind the last token. A row with fewer prompt vectors than others
has unused slots, which attention does not see. They stand at the row's left edge, like left padding; in encoders at its right edge.

Shapes: B rows, S tokens, L slots, N = S + L positions in the stack, d the width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class SlotTable:
    """Which positions of a row are slots. A filled cache keeps it.

    Attributes:
        order (`torch.LongTensor`): Shape (B, N). The content of the first N positions: a number k < L is slot k, and
            L + t is token t. Later positions hold tokens.
        used (`torch.BoolTensor`): Shape (B, L). False for slots that are hidden from attention.
        all_used (`bool`): Whether every slot is used.
        first_visible_layer (`torch.LongTensor`): Shape (B, L). The first layer that sees each slot.
        late_layers (`tuple[int]`): The values other than 0 in `first_visible_layer`, in order.
        text (`CachedText`, *optional*): What is kept of the text for adapters that edit the instruction's states.
        drafts (`bool`): Whether an assistant's `generate` filled the cache, which will go on with the same instruction.
        num_counted (`torch.LongTensor`): Shape (B, 1). How many slots move the position ids of later tokens: the used ones that every
            layer sees. A late slot must not, since it would move the tokens in the first layers, too.
    """

    def __init__(
        self,
        order: torch.Tensor,
        used: torch.Tensor,
        first_visible_layer: torch.Tensor | None = None,
        late_layers: tuple[int, ...] = (),
        all_used: bool | None = None,
    ):
        self.order, self.used, self.all_used = order, used, bool(used.all()) if all_used is None else all_used
        self.text: CachedText | None = None
        self.drafts = False
        if first_visible_layer is None:
            first_visible_layer = torch.zeros_like(used, dtype=torch.long)  # (B, L)
        self.first_visible_layer, self.late_layers = first_visible_layer, late_layers
        self.num_counted = self.counted.sum(dim=1, keepdim=True)  # (B, 1)

    @property
    def num_slots(self) -> int:
        return self.used.shape[1]

    @property
    def counted(self) -> torch.Tensor:
        """The slots (B, L) that move the position ids of later tokens."""
        return self.used & (self.first_visible_layer == 0)

    def widen_mask(self, attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
        """The padding mask over positions (B, T + L) for one over tokens (B, T). None if it hides nothing."""
        if attention_mask is None:
            if self.all_used:
                return None
            attention_mask = self.used.new_ones(self.used.shape[0], num_tokens)  # (B, T)
        # With a mask of ones attention would not take its fast kernel, at each layer of each decoding step.
        elif self.all_used and bool(attention_mask.all()):
            return None
        known = self.order.shape[1] - self.num_slots
        head = torch.cat([self.used.to(attention_mask.dtype), attention_mask[:, :known]], dim=1)  # (B, N)
        return torch.cat([take(head, self.order), attention_mask[:, known:]], dim=1)  # (B, T + L)

    def hidden_at(self, depth: int, start: int, num_keys: int) -> torch.Tensor:
        """Which positions from `start` to `start + num_keys - 1` are slots that layer `depth` does not see yet: (B, num_keys)."""
        late = self.first_visible_layer > depth  # (B, L)
        late = torch.cat([late, late.new_zeros(late.shape[0], self.order.shape[1] - self.num_slots)], dim=1)  # (B, N)
        late = torch.nn.functional.pad(take(late, self.order), (0, max(start + num_keys - late.shape[1], 0)))
        return late[:, start : start + num_keys]  # (B, num_keys)

    def token_positions(self, length: int) -> torch.Tensor:
        """The positions (B, length - L) of the tokens among the first `length` positions."""
        known = self.order.argsort(dim=1)[:, self.num_slots :]  # (B, N - L)
        later = torch.arange(self.order.shape[1], length, device=known.device)  # (length - N,)
        return torch.cat([known, later.expand(known.shape[0], -1)], dim=1)  # (B, length - L)

    @property
    def end_of_slots(self) -> int:
        """The number of positions up to and including the last slot."""
        return int((self.order < self.num_slots).any(dim=0).nonzero().max()) + 1 if self.num_slots else 0

    def check_crop(self, length: int) -> None:
        """Raise a ValueError if a slot stands behind the first `length` positions."""
        if bool((self.order[:, max(length, 0) :] < self.num_slots).any()):
            raise ValueError(f"The cache cannot be cropped to {length} positions: that would cut off prompt slots.")

    def crop(self, length: int) -> None:
        """Forget what stands behind the first `length` positions."""
        self.check_crop(length)
        self.order = self.order[:, :length]  # (B, length)
        if self.text is not None:
            self.text.crop(length - self.num_slots)

    def select(self, rows: torch.Tensor) -> None:
        """Keep, reorder or repeat rows, by their indices (K,)."""
        rows = rows.to(self.order.device)
        for name in ("order", "used", "first_visible_layer", "num_counted"):
            setattr(self, name, getattr(self, name)[rows])
        if self.text is not None:
            self.text.select(rows)


@dataclass
class CachedText:
    """What a cache keeps of its text for adapters that edit the instruction's states.

    Attributes:
        names (`list[str]`): By row: the name of the adapter with which the cache was filled; None if there is none.
        generate_call (`int`, *optional*): The number of the call of `generate` that filled it.
        prompt_length (`int`, *optional*): In that call, the number of columns of the prompt.
        mask (`torch.Tensor`, *optional*): Shape (B, S). The padding mask of the pass that filled the cache.
        num_tokens (`int`): T, the number of columns so far.
        by_role (`bool`): Whether an adapter's config tells which tokens of a text it edits: `response_template` or `instruction_length`.
        parts (`list[torch.LongTensor]`, *optional*): The token ids (B, T) so far, in parts. None: they are not known, or nobody needs them.
    """

    names: list[str | None]
    generate_call: int | None = None
    prompt_length: int | None = None
    mask: torch.Tensor | None = None
    num_tokens: int = 0
    by_role: bool = False
    parts: list[torch.Tensor] | None = None

    def add(self, ids: torch.Tensor | None, num_tokens: int) -> None:
        """Add the token ids (B, S) of the next S = `num_tokens` columns. None: they are not known."""
        self.num_tokens += num_tokens
        if self.parts is not None:
            # A view would keep the whole text alive, at each step.
            whole = ids is None or ids.untyped_storage().nbytes() == ids.nbytes
            self.parts = None if ids is None else [*self.parts, ids if whole else ids.clone()]

    @property
    def ids(self) -> torch.Tensor | None:
        """The token ids (B, T) so far."""
        if self.parts is not None and len(self.parts) > 1:
            self.parts = [torch.cat(self.parts, dim=1)]
        return None if self.parts is None else self.parts[0]

    def table(self, num_tokens: int, device: torch.device) -> SlotTable:
        """The table of a cache that holds `num_tokens` tokens S of this text and no slots."""
        order = torch.arange(num_tokens, device=device).expand(len(self.names), -1)  # (B, S)
        table = SlotTable(order, torch.ones(len(self.names), 0, dtype=torch.bool, device=device), all_used=True)
        table.text = self
        return table

    @cached_property
    def padded(self) -> bool:
        """Whether rows are padded, so that positions differ from columns."""
        return self.mask is not None and not bool(self.mask.all())

    def crop(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.parts = None if (ids := self.ids) is None else [ids[:, :num_tokens]]

    def select(self, rows: torch.Tensor) -> None:
        self.names = [self.names[row] for row in rows.tolist()]
        self.parts = None if (ids := self.ids) is None else [ids[rows.to(ids.device)]]


class SlotRows(NamedTuple):
    """Which rows of states (B, N, d), seen as (B * N, d), are the slots of G instances. Padded and packed rows have no other difference.

    Attributes:
        rows (`torch.LongTensor`): Shape (K,).
        instance, vector (`torch.LongTensor`, *optional*): Shape (K,) each. The instance that each slot belongs to, and the number of its
            vector among the instance's l. None: all vectors of all instances, in order.
    """

    rows: torch.Tensor
    instance: torch.Tensor | None = None
    vector: torch.Tensor | None = None

    @classmethod
    def of(cls, position: torch.Tensor, row: torch.Tensor, layout: Layout) -> SlotRows:
        """From the `position` (G, l) of each slot in its instance's `row` (G,); in packed rows N for slots that are not used."""
        N = layout.order.shape[1]
        rows = row[:, None] * N + position  # (G, l)
        if layout.segment_ids is None:
            return cls(rows.flatten())  # (G * l,)
        there = position < N  # (G, l)
        return cls(rows[there], *there.nonzero(as_tuple=True))

    def pick(self, prompts: torch.Tensor) -> torch.Tensor:
        """The vectors (K, d) of these rows, out of `prompts` (G, l, d)."""
        return prompts.flatten(0, 1) if self.instance is None else prompts[self.instance, self.vector]  # (K, d)


def write(
    states: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, add: bool = False, in_place: bool = False
) -> torch.Tensor:
    """Make `values` (K, d) the `rows` (K,) of states (..., d), seen as (T, d), or `add` them there: in a copy, or `in_place`."""
    flat, rows, values = states.flatten(0, -2), rows.to(states.device), values.to(states.dtype)  # flat (T, d)
    values = flat[rows] + values if add else values  # (K, d)
    return (flat.index_copy_ if in_place else flat.index_copy)(0, rows, values).view(states.shape)


@dataclass(frozen=True)
class Layout:
    """Where the slots and the tokens of each row stand inside the stack.

    Attributes:
        table (`SlotTable`): Which positions are slots.
        before_token (`torch.LongTensor`): Shape (B, L). The token before which each slot stands; S behind the last token.
        slot_index (`torch.LongTensor`): Shape (B, L). The position of each slot.
        token_index (`torch.LongTensor`): Shape (B, S). The position of each token.
        output_index (`torch.LongTensor`): Shape (B, S). The position at which each token's output is read: its own. If slots stand
            between the last instruction token and the response of a causal model, that token's output is read at the last slot.
        first (`torch.LongTensor`): Shape (B, L). The first token of the sequence that each slot belongs to.
        segment_ids (`torch.LongTensor`, *optional*): Shape (B, N). The segment id of each position, if rows are packed.
    """

    table: SlotTable
    before_token: torch.Tensor
    slot_index: torch.Tensor
    token_index: torch.Tensor
    output_index: torch.Tensor
    first: torch.Tensor
    segment_ids: torch.Tensor | None = None

    @property
    def order(self) -> torch.Tensor:
        return self.table.order

    @property
    def used(self) -> torch.Tensor:
        return self.table.used

    @property
    def all_used(self) -> bool:
        return self.table.all_used

    @property
    def num_slots(self) -> int:
        return self.slot_index.shape[1]

    @property
    def num_tokens(self) -> int:
        return self.token_index.shape[1]


def arrange(
    before_token: torch.Tensor,
    num_tokens: int,
    used: torch.Tensor | None = None,
    predicts: torch.Tensor | None = None,
    first_visible_layer: torch.Tensor | None = None,
    late_layers: tuple[int, ...] = (),
    unused_at_end: bool = False,
    first: torch.Tensor | None = None,
) -> Layout:
    """Lay out slots and tokens row by row.

    Args:
        before_token (`torch.LongTensor`): Shape (B, L), values 0..S. Slots before the same token keep their order.
        num_tokens (`int`): S.
        used (`torch.BoolTensor`, *optional*): Shape (B, L). Default: all.
        predicts (`torch.BoolTensor`, *optional*): Shape (B, L). True for slots directly behind a causal model's last instruction token,
            whose output is read at the last of them. Default: none.
        first_visible_layer, late_layers: As in [`SlotTable`]. Default: every layer sees every slot.
        unused_at_end (`bool`): Whether unused slots stand behind the last token instead of before the first. True for encoders, since
            some count positions from the left edge; False, the default, for causal models, where text may follow.
        first: As in [`Layout`]. Default: the row's first column.
    """
    B, L = before_token.shape
    first = torch.zeros_like(before_token) if first is None else first  # (B, L)
    all_used = True if used is None else None  # otherwise the values tell
    used = torch.ones_like(before_token, dtype=torch.bool) if used is None else used  # (B, L)
    # Slots before token t sort just before it: keys 2t and 2t + 1. Unused slots sort before everything, or behind it.
    slot_key = torch.where(used, 2 * before_token, 2 * num_tokens + 1 if unused_at_end else -1)  # (B, L)
    token_key = 2 * torch.arange(num_tokens, device=before_token.device).expand(B, -1) + 1  # (B, S)
    order = torch.cat([slot_key, token_key], dim=1).argsort(dim=1, stable=True)  # (B, N)
    place = order.argsort(dim=1)  # (B, N), the inverse permutation
    slot_index, token_index = place[:, :L], place[:, L:]  # (B, L), (B, S)
    output_index = token_index  # (B, S)
    if predicts is not None:
        behind = slot_index.masked_fill(~(predicts & used), 0)  # (B, L)
        output_index = token_index.scatter_reduce(1, (before_token - 1).clamp(min=0), behind, "amax")  # (B, S)
    table = SlotTable(order, used, first_visible_layer, late_layers, all_used)
    return Layout(table, before_token, slot_index, token_index, output_index, first)


def take(values: torch.Tensor, index: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Pick `index` (B, K) along `dim` of `values` (B, ..., N, ...), row by row, in memory order."""
    shape = [index.shape[0]] + [1] * (values.dim() - 1)
    shape[dim] = index.shape[1]
    size = list(values.shape)
    size[dim] = index.shape[1]
    return values.gather(dim, index.view(shape).expand(size))  # (B, ..., K, ...)


def insert(tokens: torch.Tensor, slots: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Merge `slots` (B, L, ...) into `tokens` (B, S, ...) to (B, N, ...)."""
    return take(torch.cat([slots.to(tokens.dtype), tokens], dim=1), layout.order)  # (B, N, ...)


def insert_positions(
    position_ids: torch.Tensor,
    first: torch.Tensor,
    layout: Layout,
    segment_ids: torch.Tensor | None = None,
    backwards: bool = False,
) -> torch.Tensor:
    """Position ids inside the stack. A token has its own, plus the number of counted slots before it in its sequence.

    Args:
        position_ids (`torch.LongTensor`): Shape (B, S), or (R, B, S) for models with R rows of position ids.
        first (`torch.LongTensor`): Shape (B, 1) or (B, L). The first token of the sequence that each slot belongs to.
        layout (`Layout`): The layout.
        segment_ids (`torch.LongTensor`, *optional*): Shape (B, S). The segment ids of packed rows. Default: one sequence per row.
        backwards (`bool`): Whether to subtract the number of counted slots behind a token instead: the last token keeps its position
            id, and the first ones may get negative ids. Defaults to False.

    Returns:
        `torch.LongTensor`: Shape (B, N) or (R, B, N).
    """
    if position_ids.dim() == 3:
        return torch.stack(
            [insert_positions(row, first, layout, segment_ids, backwards) for row in position_ids]
        )  # (R, B, N)
    first = first.expand(-1, layout.num_slots)  # (B, L)
    # A slot counts on from the token before it. Before the first token of its sequence, it counts from that token's position.
    follows = (layout.before_token - 1).clamp(min=0)  # (B, L)
    leads = layout.before_token <= first  # (B, L)
    # Backwards, no slot may lie behind the last token: a slot that does not count takes the position of the token before it.
    step = layout.table.counted.long() if backwards else 1  # (B, L)
    own = torch.where(leads, position_ids.gather(1, first), position_ids.gather(1, follows) + step)  # (B, L)
    counted = insert(torch.zeros_like(position_ids), layout.table.counted.long(), layout)  # (B, N)
    before = counted.cumsum(dim=1) - counted  # (B, N)
    if segment_ids is not None:
        number = insert(segment_ids, segment_ids.gather(1, first), layout)  # (B, N)
        within = counted.new_zeros(len(counted), int(number.max()) + 1).scatter_add(
            1, number, counted
        )  # (B, sequences)
        earlier = within.cumsum(dim=1) - (0 if backwards else within)  # (B, sequences)
        before = before - earlier.gather(1, number)  # (B, N)
    elif backwards:
        before = before - layout.table.num_counted  # (B, N)
    return insert(position_ids, own, layout) + before  # (B, N)
