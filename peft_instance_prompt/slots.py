# Copyright 2026-present the peft_instance_prompt authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Slots: extra positions that exist only inside the transformer stack. Pure tensor functions, no PEFT, no hooks.

Slot `i` of row `b` stands before token `anchor[b, i]`; an anchor of `S` puts it behind the last token. Rows need not
agree: a row with fewer prompt vectors than its neighbours has dead slots, which stand at the row's left edge, hidden
from attention like left padding (in encoders at its right edge). Throughout, B rows, S tokens, L slots, N = S + L positions in the stack, d the width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Layout:
    """Where the slots and the tokens of each row stand inside the stack.

    Attributes:
        order (`torch.LongTensor`): Shape (B, N). `order[b, n]` is what stands at position n: slot k if it is k < L,
            token t if it is L + t.
        slot_index (`torch.LongTensor`): Shape (B, L). The position of each slot.
        token_index (`torch.LongTensor`): Shape (B, S). The position of each token.
        read_index (`torch.LongTensor`): Shape (B, S). The position from which each token's output is read. It is the
            token's own, except where prompt vectors stand between a causal model's last instruction token and the
            response: the next token is then predicted at the last of them.
        anchor (`torch.LongTensor`): Shape (B, L). The token before which each slot stands.
        live (`torch.BoolTensor`): Shape (B, L). False for dead slots.
        all_live (`bool`): Whether no slot is dead.
        since (`torch.LongTensor`): Shape (B, L). The first layer in which each slot is seen. One that is hidden from some
            layers takes no place in the count of positions, so that the tokens of these layers are the base model's.
        levels (`tuple[int]`): What values other than 0 are found in `since`, in order.
    """

    order: torch.Tensor
    slot_index: torch.Tensor
    token_index: torch.Tensor
    read_index: torch.Tensor
    anchor: torch.Tensor
    live: torch.Tensor
    all_live: bool
    since: torch.Tensor
    levels: tuple[int, ...] = ()

    @property
    def num_slots(self) -> int:
        return self.slot_index.shape[1]

    @property
    def num_tokens(self) -> int:
        return self.token_index.shape[1]


def arrange(
    anchor: torch.Tensor,
    num_tokens: int,
    live: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
    since: torch.Tensor | None = None,
    levels: tuple[int, ...] = (),
    dead_at_end: bool = False,
) -> Layout:
    """Lay out slots and tokens row by row.

    Args:
        anchor (`torch.LongTensor`): Shape (B, L), values 0..S. Slots with the same anchor keep their order.
        num_tokens (`int`): S.
        live (`torch.BoolTensor`, *optional*): Shape (B, L). Default: all.
        last (`torch.LongTensor`, *optional*): Shape (B,). The last instruction token of each row of a causal model; its
            output is read from the last slot that stands directly behind it. Default: every token keeps its own.
        since, levels: As in [`Layout`]. Default: every slot is seen in all layers.
        dead_at_end (`bool`): Whether dead slots stand behind the last token, as in stacks without position ids, which
            count from the left edge; of no use where text is to follow.
    """
    B, L = anchor.shape
    all_live = live is None or bool(live.all())
    if live is None:
        live = torch.ones_like(anchor, dtype=torch.bool)
    # Slots before token t sort just before it: keys 2t and 2t + 1. Dead slots sort before everything, or behind it.
    slot_key = torch.where(live, 2 * anchor, 2 * num_tokens + 1 if dead_at_end else -1)  # (B, L)
    token_key = 2 * torch.arange(num_tokens, device=anchor.device).expand(B, -1) + 1  # (B, S)
    order = torch.cat([slot_key, token_key], dim=1).argsort(dim=1, stable=True)  # (B, N)
    place = order.argsort(dim=1)  # (B, N), the inverse permutation
    slot_index, token_index = place[:, :L], place[:, L:]  # (B, L), (B, S)
    read_index = token_index
    if last is not None:
        behind = (live & (anchor == last[:, None] + 1)).sum(dim=1, keepdim=True)  # (B, 1)
        read_index = token_index.scatter_add(1, last[:, None], behind)  # (B, S)
    since = torch.zeros_like(anchor) if since is None else since
    return Layout(order, slot_index, token_index, read_index, anchor, live, all_live, since, levels)


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


def insert_positions(position_ids: torch.Tensor, first: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Position ids inside the stack: a token's own plus the number of live slots before it that every layer sees.

    Args:
        position_ids (`torch.LongTensor`): Shape (B, S), or (R, B, S) for models with R rows of position ids.
        first (`torch.LongTensor`): Shape (B,). The first token of each row that is not padding.
        layout (`Layout`): The layout.

    Returns:
        `torch.LongTensor`: Shape (B, N) or (R, B, N).
    """
    if position_ids.dim() == 3:
        return torch.stack([insert_positions(row, first, layout) for row in position_ids])  # (R, B, N)
    # A slot goes on from the token that it follows; before the first token it takes the place of that token.
    follows = (layout.anchor - 1).clamp(min=0)  # (B, L)
    leads = layout.anchor <= first[:, None]  # (B, L)
    own = torch.where(leads, position_ids.gather(1, first[:, None]), position_ids.gather(1, follows) + 1)  # (B, L)
    counted = (layout.live & (layout.since == 0)).long()  # (B, L)
    before = insert(torch.zeros_like(position_ids), counted, layout)  # (B, N)
    before = before.cumsum(dim=1) - before  # (B, N)
    return insert(position_ids, own, layout) + before  # (B, N)


def fill(states: torch.Tensor, prompts: torch.Tensor, layout: Layout, add: bool = False) -> torch.Tensor:
    """Write `prompts` (B, L, d) into the slots of `states` (B, N, d), or add them there."""
    index = layout.slot_index[:, :, None].expand(-1, -1, states.shape[-1])  # (B, L, d)
    prompts = prompts.to(states.dtype)
    return states.scatter_add(1, index, prompts) if add else states.scatter(1, index, prompts)
