# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The cache that hides slots: it counts tokens to the outside, tokens and slots to the stack."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from .slots import take


# Under this name the slot table lies on the cache that a caller handed in, so that a second turn which is given that
# cache, and not the returned one, still knows of its slots.
_TABLE = "_instance_prompt_slots"


class SlotTable:
    """Which positions of a filled cache are slots.

    Attributes:
        order (`torch.LongTensor`): Shape (B, N). What stands at the first N positions: slot k if it is k < L, token t if
            it is L + t. Whatever follows them are tokens.
        live (`torch.BoolTensor`): Shape (B, L). False for slots that are hidden from attention.
        since (`torch.LongTensor`, *optional*): Shape (B, L). The first layer in which each slot is seen. Default: 0.
        levels (`tuple[int]`): What values other than 0 are found in `since`, in order.
        num_counted (`torch.LongTensor`): Shape (B, 1). How many slots take a place in the count of positions.
    """

    def __init__(
        self,
        order: torch.Tensor,
        live: torch.Tensor,
        since: torch.Tensor | None = None,
        levels: tuple[int, ...] = (),
    ):
        self.order, self.live, self.all_live = order, live, bool(live.all())
        self.since, self.levels = torch.zeros_like(live, dtype=torch.long) if since is None else since, levels
        self.num_counted = (live & (self.since == 0)).sum(dim=1, keepdim=True)  # (B, 1)

    @property
    def num_slots(self) -> int:
        return self.live.shape[1]

    def widen_mask(self, attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
        """The mask over the cache's positions: (B, T) over tokens becomes (B, T + L); None if nothing is hidden."""
        if attention_mask is None:
            if self.all_live:
                return None
            attention_mask = self.live.new_ones(self.live.shape[0], num_tokens)  # (B, T)
        # A mask of ones keeps attention off its fast kernel, at each layer of each decoding step.
        elif self.all_live and bool(attention_mask.all()):
            return None
        known = self.order.shape[1] - self.num_slots
        head = torch.cat([self.live.to(attention_mask.dtype), attention_mask[:, :known]], dim=1)  # (B, N)
        return torch.cat([take(head, self.order), attention_mask[:, known:]], dim=1)  # (B, T + L)

    def hidden_at(self, depth: int, start: int, num_keys: int) -> torch.Tensor:
        """Which of the positions `start` to `start + num_keys - 1` are slots that layer `depth` does not see yet."""
        late = self.since > depth  # (B, L)
        late = torch.cat([late, late.new_zeros(late.shape[0], self.order.shape[1] - self.num_slots)], dim=1)  # (B, N)
        late = torch.nn.functional.pad(take(late, self.order), (0, max(start + num_keys - late.shape[1], 0)))
        return late[:, start : start + num_keys]  # (B, num_keys)

    def token_positions(self, length: int) -> torch.Tensor:
        """Where the tokens stand among the first `length` positions: (B, length - L)."""
        known = self.order.argsort(dim=1)[:, self.num_slots :]  # (B, N - L)
        later = torch.arange(self.order.shape[1], length, device=known.device)  # (length - N,)
        return torch.cat([known, later.expand(known.shape[0], -1)], dim=1)  # (B, length - L)

    def crop(self, length: int) -> None:
        """Forget what stands behind the first `length` positions."""
        if length < self.order.shape[1]:
            if bool((self.order[:, length:] < self.num_slots).any()):
                raise ValueError(
                    f"The cache cannot be cropped to {length} positions: that would cut off prompt slots."
                )
            self.order = self.order[:, :length]  # (B, length)

    def select(self, rows: torch.Tensor) -> None:
        """Keep, reorder or repeat rows."""
        rows = rows.to(self.order.device)
        for name in ("order", "live", "since", "num_counted"):
            setattr(self, name, getattr(self, name)[rows])


class SlotCache(Cache):
    """A cache of transformers' that holds slots as well as tokens and counts tokens only.

    Returned by the model as `past_key_values`. It can be passed back in for the next step or the next turn, deep-copied,
    pickled, reordered, cropped and reset like the cache inside it.

    Args:
        inner (`Cache`): The cache that the attention layers fill.
        table (`SlotTable`): Its slots.
    """

    # Its own length differs from what the layers hold, so the mask that transformers would make for a compiled decoding
    # step from outside would be too short.
    is_compileable = False

    def __init__(self, inner: Cache, table: SlotTable):
        self.inner = inner
        self.table = table
        setattr(inner, _TABLE, table)

    @staticmethod
    def find(cache: Any) -> SlotCache | None:
        """`cache` as a `SlotCache` if it holds slots, be it one or the inside of one; else None."""
        if not isinstance(cache, SlotCache):
            table = getattr(cache, _TABLE, None)
            cache = None if table is None else SlotCache(cache, table)
        if cache is not None and length(cache.inner) == 0:  # it was reset
            cache.inner.__dict__.pop(_TABLE, None)
            return None
        return cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens, without slots."""
        return max(length(self.inner, layer_idx) - self.table.num_slots, 0)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The number of tokens that fit; -1 if there is no bound."""
        longest = self.inner.get_max_length(layer_idx)
        return longest if longest < 0 else longest - self.table.num_slots

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; a negative number, as in transformers."""
        self.table.crop(length(self.inner) - abs(tokens_to_remove))
        self.inner.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.inner.reorder_cache(beam_idx)
        self.table.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.inner.batch_select_indices(indices)
        self.table.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.inner.batch_repeat_interleave(repeats)
        self.table.select(torch.arange(self.table.order.shape[0]).repeat_interleave(repeats))

    def reset(self) -> None:
        self.inner.reset()

    def update(self, *args, **kwargs):
        return self.inner.update(*args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many tokens a mask must span that is made outside of the stack, and from which token on."""
        return self.get_seq_length() + query_length, 0

    def __iter__(self):
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def __repr__(self) -> str:
        return f"SlotCache({self.inner!r}, slots={self.table.num_slots})"

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "table"):  # not there yet: copying and unpickling ask before they set
            raise AttributeError(name)
        return getattr(self.inner, name)


def length(cache: Cache, layer_idx: int = 0) -> int:
    """The number of positions in a cache as an `int`; static caches count in a tensor."""
    return int(cache.get_seq_length(layer_idx))


def make_room(cache: Cache, num_slots: int, sliding_window: int | None = None) -> None:
    """Grow an empty static cache in place, so that it holds `num_slots` positions beside the tokens it was made for.

    Args:
        cache (`Cache`): The cache. Dynamic ones have no bound and stay as they are.
        num_slots (`int`): L.
        sliding_window (`int`, *optional*): The model's; a sliding layer never holds more.
    """
    spare = getattr(cache, "_instance_prompt_room", 0)
    if cache.is_compileable and num_slots > spare:
        longest = cache.get_max_length()
        for layer in getattr(cache, "self_attention_cache", cache).layers:
            bounded = layer.is_sliding and layer.max_cache_len < longest
            if not bounded:
                grown = layer.max_cache_len + num_slots - spare
                layer.max_cache_len = min(grown, sliding_window) if layer.is_sliding and sliding_window else grown
            layer.is_initialized = False  # what it allocated, if anything, is too short
        cache._instance_prompt_room = num_slots
