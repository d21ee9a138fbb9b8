# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Attention masks in the forms in which transformers gives them to a stack, and the padding that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_masks_for_generate

from .calls import LENGTH_ARGUMENTS, cache_argument, first_call, forward_args


def padding_mask(attention_mask: Any, num_rows: int, num_tokens: int, from_static_cache: bool) -> torch.Tensor | None:
    """The 2-D mask behind `attention_mask`.

    Args:
        attention_mask (`Any`): None; (B, T); (B, 1, S, T) in bool or as biases, which hides nothing but padding from later
            tokens; where `generate` made it for an empty static cache, also a flex attention `BlockMask`; or a dict of
            these by layer type.
        num_rows (`int`): B.
        num_tokens (`int`): T, the number of tokens so far.
        from_static_cache (`bool`): Whether the cache is an empty static one, for which `generate` makes the mask.

    Returns:
        `torch.Tensor`, *optional*: Shape (B, T) in the dtype that was given or bool; None if nothing is masked.

    Raises:
        ValueError: The mask has another form or size.
    """
    attention_mask = _full(attention_mask)
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
        "Instance prompts need `attention_mask` as None, or as 2-D, (batch, tokens), or in a form that hides nothing but "
        f"padding from later tokens, to know which tokens are padding; got {type(attention_mask).__name__} of shape {shape}."
    )


def _full(attention_mask: Any) -> Any:
    """Of a dict of masks by layer type, that of full attention, or the first; any other mask as it is."""
    if not isinstance(attention_mask, dict) or not attention_mask:
        return attention_mask or None if isinstance(attention_mask, dict) else attention_mask
    return attention_mask.get("full_attention", next(iter(attention_mask.values())))


def _is_seen(mask: torch.Tensor) -> torch.Tensor:
    mask = mask[:, 0]  # (B, S, T)
    return mask if mask.dtype == torch.bool else mask == 0


def beyond_causal(attention_mask: Any) -> torch.Tensor | None:
    """Which later tokens each token sees (B, S, S), as within an image of Gemma 3; None if there are none."""
    attention_mask = _full(attention_mask)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        return None
    later = _is_seen(attention_mask)[:, :, : attention_mask.shape[2]].triu(1)  # (B, S, S)
    return later if later.any() else None


def see_beyond_causal(
    config: Any, embeds: torch.Tensor, mask: torch.Tensor | None, cache: Any, later: torch.Tensor
) -> torch.Tensor | dict[str, Any]:
    """The masks of a stack, made from the 2-D one as the stack would, in which some tokens see later ones too.

    Args:
        config (`PreTrainedConfig`): The stack's.
        embeds (`torch.Tensor`): Shape (B, N, e). What it is called with.
        mask (`torch.Tensor`, *optional*): Shape (B, N).
        cache (`Cache`, *optional*): The cache that it fills.
        later (`torch.BoolTensor`): Shape (B, N, N).
    """
    room = 0 if cache is None or not cache.is_compileable else cache.get_max_length() - later.shape[2]
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


def keep_apart(config: Any, embeds: torch.Tensor, place: torch.Tensor) -> torch.Tensor | dict[str, Any] | None:
    """The masks of a stack in which each sequence of a packed row sees itself only.

    Transformers makes them from positions that start anew with each sequence. It would not do so from those of the stack: late
    slots take no position.

    Args:
        config (`PreTrainedConfig`): The stack's.
        embeds (`torch.Tensor`): Shape (B, N, e). What it is called with.
        place (`torch.LongTensor`): Shape (B, N). The number of each position within its sequence.

    Returns:
        The mask, or one by layer type; None for flash attention, which gets the lengths of the sequences.
    """
    name = cache_argument(create_masks_for_generate)
    assert name is not None  # it has one in each tested release
    return create_masks_for_generate(
        config=config, inputs_embeds=embeds, attention_mask=None, position_ids=place, **{name: None}
    )


def keeps_apart(stack: Any, layers_name: str, true_hides: bool) -> bool:
    """Whether the layers of a stack get the mask of [`keep_apart`]; for flash attention, the lengths of the sequences.

    Args:
        stack (`nn.Module`): The stack. It is asked about two sequences of two tokens each.
        layers_name (`str`): The name of its list of layers, within the stack.
        true_hides (`bool`): Whether True in a mask of bools hides a key.
    """
    embedding: nn.Embedding = stack.get_input_embeddings()
    dtype = embedding.weight.dtype if embedding.weight.is_floating_point() else torch.float32
    embeds = torch.zeros(1, 4, embedding.embedding_dim, device=embedding.weight.device, dtype=dtype)  # (1, 4, e)
    place = torch.tensor([[0, 1, 0, 1]], device=embeds.device)  # (1, 4)
    mask = keep_apart(stack.config, embeds, place)
    call: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
    if "position_ids" in forward_args(stack):
        call["position_ids"] = place
    if mask is None:
        ends = torch.tensor([0, 2, 4], device=embeds.device, dtype=torch.int32)
        call.update({name: ends if name.startswith("cu_") else 2 for name in LENGTH_ARGUMENTS})
    arguments = first_call(stack, layers_name, call)
    if arguments is None:
        return False
    if mask is None:
        return all(arguments.get(name) is not None for name in LENGTH_ARGUMENTS)
    found = arguments.get("attention_mask")
    if any(found is given for given in (mask.values() if isinstance(mask, dict) else [mask])):
        return True
    if not isinstance(found, torch.Tensor) or found.dim() != 4:
        return False
    shown = found > torch.finfo(found.dtype).min / 2 if found.is_floating_point() else found.bool() != true_hides
    wanted = torch.eye(2, device=shown.device).bool().repeat_interleave(2, 0).repeat_interleave(2, 1).tril()  # (4, 4)
    return bool((shown == wanted).all())


def pad_to_static_cache(
    mask: torch.Tensor | None, cache: Any, num_rows: int, num_positions: int
) -> torch.Tensor | None:
    """For a static cache, the 2-D mask (B, positions so far) as long as the cache; else as it is.

    Most models do so themselves, but Bloom computes its ALiBi biases from a mask of just this length.
    """
    if cache is None or not cache.is_compileable:
        return mask
    if mask is None:
        mask = torch.ones(num_rows, num_positions, dtype=torch.bool)  # (B, positions so far)
    return torch.nn.functional.pad(
        mask, (0, max(cache.get_max_length() - mask.shape[1], 0))
    )  # (B, length of the cache)


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
    """A layer's attention mask with some keys hidden as well, in the form that the layer takes.

    Args:
        mask (`Any`): The mask (B, T), or (B or 1, heads or 1, Q or 1, T) in bool, 0/1 or as biases; a flex attention
            `BlockMask`; or None, where every position sees all that the layer's causality lets it see.
        hidden (`torch.BoolTensor`): Shape (B, T). True for keys to hide.
        num_queries (`int`): Q.
        seen (`int`): How many positions the layer has in its cache, before those of this pass.
        start (`int`): The position of the first key, which is not 0 in a sliding window's cache.
        causal (`bool`): Whether the layer is causal.
        attention (`str`): The name of the attention implementation.
        dtype (`torch.dtype`): The dtype of biases, where there was no mask.
        true_hides (`bool`): Whether True in a 4-D mask of bools hides a key, as in MPT.

    Raises:
        ValueError: The mask has another form.
    """
    flash = attention.startswith("flash_attention")
    if mask is None and flash:
        return ~hidden
    if mask is None:
        seen_by = torch.ones(num_queries, hidden.shape[1], dtype=torch.bool, device=hidden.device)
        if causal:
            queries = seen + torch.arange(num_queries, device=hidden.device)  # (Q,)
            seen_by = queries[:, None] >= start + torch.arange(hidden.shape[1], device=hidden.device)  # (Q, T)
        mask = seen_by & ~hidden[:, None, None, :]  # (B, 1, Q, T)
        # Eager attention adds its mask to the scores.
        return (
            mask
            if attention == "sdpa"
            else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        )
    if isinstance(mask, torch.Tensor) and mask.dim() in (2, 4) and mask.shape[-1] == hidden.shape[1]:
        hidden = hidden if mask.dim() == 2 else hidden[:, None, None, :]  # (B, 1, 1, T)
        lowest = torch.finfo(mask.dtype).min if mask.is_floating_point() and mask.dim() == 4 else 0
        lowest = 1 if true_hides and mask.dtype == torch.bool and mask.dim() == 4 else lowest
        return torch.where(hidden, torch.full((), lowest, dtype=mask.dtype, device=mask.device), mask)
    if hasattr(mask, "mask_mod"):
        from torch.nn.attention.flex_attention import and_masks, create_block_mask

        size: dict[str, Any] = {"B": hidden.shape[0], "H": None, "Q_LEN": num_queries, "KV_LEN": hidden.shape[1]}
        return create_block_mask(
            and_masks(mask.mask_mod, lambda b, h, q, k: ~hidden[b, k]), **size, device=hidden.device
        )
    raise ValueError(
        f"Slots that are hidden from the first layers need a mask of a known form there, got {type(mask).__name__} "
        f"{tuple(getattr(mask, 'shape', ()))} for {hidden.shape[1]} keys under {attention!r} attention."
    )
