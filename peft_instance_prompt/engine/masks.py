# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Attention masks in the forms in which transformers passes them to a stack, and the padding masks in them."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from .cache import capacity
from .calls import cache_argument


def padding_mask(attention_mask: Any, num_rows: int, num_tokens: int, from_static_cache: bool) -> torch.Tensor | None:
    """The padding mask in `attention_mask`.

    Args:
        attention_mask (`Any`): None; (B, T); (B, 1, S, T) in bool or as biases, where each token sees all earlier ones but padding, as in a
            causal mask combined with padding; a flex attention `BlockMask` that `generate` made for an empty static cache; or a
            dict of these by layer type.
        num_rows (`int`): B.
        num_tokens (`int`): T, the number of tokens so far.
        from_static_cache (`bool`): Whether the cache is static and empty, so that `generate` made the mask.

    Returns:
        `torch.Tensor`, *optional*: Shape (B, T), bool or in the dtype of a 2-D mask. None if there is no mask.

    Raises:
        ValueError: The mask has none of these forms, or a wrong size.
    """
    attention_mask = full_mask(attention_mask)
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        if from_static_cache and shape[1] > num_tokens:  # Bloom gets a mask as long as the cache
            return attention_mask[:, :num_tokens]
        if shape != (num_rows, num_tokens):
            raise ValueError(f"`attention_mask` must have the shape {(num_rows, num_tokens)}, got {shape}.")
        return attention_mask
    if len(shape) == 4 and from_static_cache:
        # Each token sees itself unless it is padding, whatever the window: the diagonal is the 2-D mask.
        if not isinstance(attention_mask, torch.Tensor):
            rows = torch.arange(shape[0], device=attention_mask.kv_indices.device)
            at = torch.arange(num_tokens, device=rows.device)
            mod = torch.vmap(torch.vmap(attention_mask.mask_mod, (None, None, 0, 0)), (0, None, None, None))
            seen = mod(rows, torch.zeros_like(rows[0]), at, at)  # (B, S)
        else:
            seen = _is_seen(attention_mask[..., :num_tokens]).diagonal(dim1=1, dim2=2)  # (B, S)
        return seen.expand(num_rows, -1)
    if len(shape) == 4 and isinstance(attention_mask, torch.Tensor) and shape[-1] == num_tokens:
        seen = _is_seen(attention_mask)  # (B, S, T)
        last = seen[:, -1]  # (B, T)
        past = torch.ones_like(seen[0]).tril(num_tokens - shape[2])  # (S, T)
        graded = attention_mask.is_floating_point() and bool((attention_mask[:, 0][~seen] > -1e4).any())
        if not graded and torch.equal(seen & past, last[:, None] & past):
            return last.expand(num_rows, -1)
    raise ValueError(
        f"`attention_mask` does not tell which tokens are padding: got {type(attention_mask).__name__} of shape {shape}. Instance "
        "prompts need it as None, as 2-D, (batch, tokens), or as a causal mask combined with padding and nothing else."
    )


def full_mask(attention_mask: Any) -> Any:
    """Of a dict of masks by layer type, that of full attention, or the first; any other mask as it is."""
    if not isinstance(attention_mask, dict) or not attention_mask:
        return attention_mask or None if isinstance(attention_mask, dict) else attention_mask
    return attention_mask.get("full_attention", next(iter(attention_mask.values())))


def _is_seen(mask: torch.Tensor) -> torch.Tensor:
    mask = mask[:, 0]  # (B, S, T)
    return mask if mask.dtype == torch.bool else mask == 0


def beyond_causal(attention_mask: Any, if_none: bool = False) -> torch.Tensor | None:
    """Which later tokens each token sees (B, S, S), as within an image of Gemma 3.

    None if the mask is not 4-D. None, too, if no token sees a later one, unless `if_none` asks for a mask that says so.
    """
    attention_mask = full_mask(attention_mask)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        return None
    later = _is_seen(attention_mask)[:, :, : attention_mask.shape[2]].triu(1)  # (B, S, S)
    return later if if_none or later.any() else None


def prefix_of(attention_mask: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """The prefix (B, S) of each row of a prefix-LM: the tokens up to the last one that the row's first token sees.

    Args:
        attention_mask (`Any`): The mask that the stack is called with.
        tokens (`torch.BoolTensor`): Shape (B, S). False where there is padding.

    Returns:
        `torch.BoolTensor`, *optional*: None if no token of the batch sees a later one.
    """
    later = beyond_causal(attention_mask)  # (B or 1, S, S)
    if later is None:
        return None
    rows = torch.arange(len(tokens), device=later.device)
    first = tokens.to(later.device).long().argmax(dim=1)  # (B,)
    seen = later.expand(len(tokens), -1, -1)[rows, first]  # (B, S)
    seen[rows, first] = True
    return (seen.flip(1).cumsum(dim=1).flip(1) > 0).to(tokens.device) & tokens  # (B, S)


def see_beyond_causal(
    config: Any, embeds: torch.Tensor, mask: torch.Tensor | None, cache: Any, later: torch.Tensor
) -> torch.Tensor | dict[str, Any]:
    """The masks that a stack makes from a padding mask, changed so that some tokens see later ones, too.

    Args:
        config (`PreTrainedConfig`): The stack's config.
        embeds (`torch.Tensor`): Shape (B, N, e). The stack's input embeddings.
        mask (`torch.Tensor`, *optional*): Shape (B, N). The padding mask.
        cache (`Cache`, *optional*): The cache that the stack fills.
        later (`torch.BoolTensor`): Shape (B, N, N). Which later tokens each token sees.
    """
    room = 0 if cache is None or not cache.is_compileable else capacity(cache) - later.shape[2]
    later = torch.nn.functional.pad(later, (0, max(room, 0)))  # (B, N, keys)
    name = cache_argument(create_masks_for_generate)
    assert name is not None  # it has one in each tested release
    return create_masks_for_generate(
        config=config,
        inputs_embeds=embeds,
        attention_mask=mask,
        **{name: cache},
        or_mask_function=lambda b, h, q, k: later[b, q, k],
    )


def pad_to_static_cache(
    mask: torch.Tensor | None, cache: Any, num_rows: int, num_positions: int
) -> torch.Tensor | None:
    """The padding mask (B, positions so far), padded to the length of a static cache; as it is for any other cache.

    Most models pad it themselves, but Bloom computes its ALiBi biases from a mask of exactly this length.
    """
    if cache is None or not cache.is_compileable:
        return mask
    if mask is None:
        mask = torch.ones(num_rows, num_positions, dtype=torch.bool)  # (B, positions so far)
    return torch.nn.functional.pad(mask, (0, max(capacity(cache) - mask.shape[1], 0)))  # (B, length of the cache)


def lowest(dtype: torch.dtype) -> float:
    """The bias that hides a key. It is finite in `dtype` and in float32, in which most models compute the softmax of any dtype."""
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def hide(
    mask: Any,
    hidden: torch.Tensor,
    num_queries: int,
    seen: int,
    start: int,
    causal: bool,
    attention: str,
    dtype: torch.dtype = torch.float32,
    true_hides: bool = False,
) -> Any:
    """A layer's attention mask that hides further keys, in the form that the layer takes.

    Args:
        mask (`Any`): The mask (B, T), or (B or 1, heads or 1, Q or 1, T) in bool, 0/1 or as biases; a flex attention
            `BlockMask`; or None, where causality alone decides what a position sees.
        hidden (`torch.BoolTensor`): Shape (B, T), True for keys to hide from all queries; or (B, Q, T), by query.
        num_queries (`int`): Q.
        seen (`int`): How many positions the layer has in its cache, before those of this pass.
        start (`int`): The position of the first key. It is not 0 in the cache of a sliding window.
        causal (`bool`): Whether the layer is causal.
        attention (`str`): The name of the attention implementation.
        dtype (`torch.dtype`): The dtype of biases, if `mask` is None. Defaults to float32.
        true_hides (`bool`): Whether True in a 4-D bool mask hides a key, as in MPT. Defaults to False.

    Raises:
        ValueError: The mask has none of these forms.
    """
    flash, T = attention.startswith("flash_attention"), hidden.shape[-1]
    if mask is None and flash:
        return ~hidden
    pairs = hidden[:, None, None] if hidden.dim() == 2 else hidden[:, None]  # (B, 1, 1 or Q, T)
    if mask is None:
        seen_by = torch.ones(num_queries, T, dtype=torch.bool, device=hidden.device)
        if causal:
            queries = seen + torch.arange(num_queries, device=hidden.device)  # (Q,)
            seen_by = queries[:, None] >= start + torch.arange(T, device=hidden.device)  # (Q, T)
        mask = seen_by & ~pairs  # (B, 1, Q, T)
        # Eager attention adds its mask to the scores.
        return mask if attention == "sdpa" else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest(dtype))
    if isinstance(mask, torch.Tensor) and mask.dim() in (hidden.dim(), 4) and mask.shape[-1] == T and mask.dim() != 3:
        hidden = hidden if mask.dim() == 2 else pairs
        hides = lowest(mask.dtype) if mask.is_floating_point() and mask.dim() == 4 else 0
        hides = 1 if true_hides and mask.dtype == torch.bool and mask.dim() == 4 else hides
        return torch.where(hidden, torch.full((), hides, dtype=mask.dtype, device=mask.device), mask)
    if hasattr(mask, "mask_mod"):
        from torch.nn.attention.flex_attention import and_masks, create_block_mask

        size: dict[str, Any] = {"B": hidden.shape[0], "H": None, "Q_LEN": num_queries, "KV_LEN": T}
        shown = ~pairs.expand(-1, 1, num_queries, T)[:, 0]  # (B, Q, T)
        return create_block_mask(
            and_masks(mask.mask_mod, lambda b, h, q, k: shown[b, q, k]), **size, device=hidden.device
        )
    raise ValueError(
        f"Slots that are hidden from the first layers, and packed rows, need a mask of a known form there, got "
        f"{type(mask).__name__} {tuple(getattr(mask, 'shape', ()))} for {T} keys under {attention!r} attention."
    )
