# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The slot cache: a KV cache that holds slots and tokens. Callers see the number of tokens, the stack sees both."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from .slots import SlotTable


# The attribute of the caller's cache that holds the slot table: the caller may pass that cache to the next turn, in place of the
# returned one.
_TABLE = "_instance_prompt_slots"


class SlotCache(Cache):
    """A transformers cache that holds slots and tokens, and counts tokens only.

    The model returns it as its cache. The caller may pass it to the next step or turn, and deep-copy, pickle, reorder, crop and reset
    it like the cache inside it.

    Args:
        inner (`Cache`): The cache that the attention layers fill.
        table (`SlotTable`): Its slots.
    """

    def __init__(self, inner: Cache, table: SlotTable):
        self.inner = inner
        self.table = table
        setattr(inner, _TABLE, table)

    @property
    def is_compileable(self) -> bool:
        """`generate` makes the masks of a static cache by its length, which leaves out the slots: they would be too short."""
        return self.table.num_slots == 0 and self.inner.is_compileable

    @staticmethod
    def find(cache: Any) -> SlotCache | None:
        """The `SlotCache` of a cache that holds slots: itself, or one around it. None if it holds no slots."""
        if not isinstance(cache, SlotCache):
            table = getattr(cache, _TABLE, None)
            cache = None if table is None else SlotCache(cache, table)
        if cache is not None and length(cache.inner) == 0:  # it was reset
            cache.inner.__dict__.pop(_TABLE, None)
            return None
        return cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens, without slots."""
        if counts(self.inner):
            return max(length(self.inner, layer_idx) - self.table.num_slots, 0)
        assert self.table.text is not None  # slots need attention
        return self.table.text.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The number of tokens that fit; -1 if there is no bound."""
        longest = self.inner.get_max_length(layer_idx)
        return longest if longest < 0 else longest - self.table.num_slots

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove (`int`): Their number; negative, as in transformers.

        Raises:
            ValueError: A slot would be removed, or the number is positive, which older releases take for the length that is left.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` takes the number of tokens to remove as a negative number, got {tokens_to_remove}."
            )
        filled = length(self.inner)
        rest = filled - abs(tokens_to_remove)
        # Assisted decoding removes the instruction's last token, too, and counts what is left before it goes on with the same text.
        if self.table.drafts:
            rest = min(max(rest, self.table.end_of_slots), filled)
        self.table.check_crop(rest)
        self.inner.crop(rest - filled)  # which may refuse
        self.table.crop(rest)

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
        """The number of tokens that a mask made outside the stack spans, and the index of the first."""
        if self.table.num_slots == 0:
            return self.inner.get_mask_sizes(query_length, layer_idx)
        return self.get_seq_length() + query_length, 0

    def __iter__(self):
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def __repr__(self) -> str:
        return f"SlotCache({self.inner!r}, slots={self.table.num_slots})"

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "table"):  # copying and unpickling read attributes before setting them
            raise AttributeError(name)
        return getattr(self.inner, name)


def counts(cache: Cache) -> bool:
    """Whether a cache knows how many positions it holds: that of a stack without attention holds states only."""
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
    return not layers or any(hasattr(layer, "get_seq_length") for layer in layers)


def length(cache: Cache, layer_idx: int = 0) -> int:
    """The number of positions in a cache, as an `int`: static caches hold it as a tensor. 1 for a state of any number of positions."""
    return int(cache.get_seq_length(layer_idx) if counts(cache) else cache.has_previous_state())


def capacity(cache: Cache) -> int:
    """How many positions a static cache holds of the text: as transformers' masks, of the first layer without a window."""
    layers = getattr(cache, "self_attention_cache", cache).layers
    sizes = (getattr(layer, "max_cache_len", -1) for layer in layers if not layer.is_sliding)
    return next((size for size in sizes if size > 0), cache.get_max_length())


def make_room(
    cache: Cache, num_slots: int, sliding_window: int | None = None, image_layers: tuple[int, ...] = ()
) -> None:
    """Grow an empty static cache in place, so that it holds `num_slots` positions beside the tokens it was made for.

    Args:
        cache (`Cache`): The cache. Dynamic caches have no bound and stay as they are.
        num_slots (`int`): L.
        sliding_window (`int`, *optional*): The model's; a sliding layer never holds more.
        image_layers (`tuple[int]`): The numbers of the layers that hold an image and no slots.
    """
    spare = getattr(cache, "_instance_prompt_room", 0)
    if cache.is_compileable and num_slots > spare:
        longest = capacity(cache)
        for number, layer in enumerate(getattr(cache, "self_attention_cache", cache).layers):
            if number in image_layers:
                continue
            bounded = layer.is_sliding and layer.max_cache_len < longest
            if not bounded:
                grown = layer.max_cache_len + num_slots - spare
                layer.max_cache_len = min(grown, sliding_window) if layer.is_sliding and sliding_window else grown
            layer.is_initialized = False  # its tensors, if there are any, are too short
        cache._instance_prompt_room = num_slots
