# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The arguments of a stack, widened from S tokens to N = S + L positions: where its slots open, and where it goes on from a slot cache.

Shapes: B rows, S tokens, L slots, N = S + L positions in the stack, T tokens so far, e the width of the embeddings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from .cache import SlotCache, capacity, make_room
from .calls import (
    FOREIGN_ARGUMENTS,
    LENGTH_ARGUMENTS,
    PER_QUERY_ARGUMENTS,
    PER_TOKEN_ARGUMENTS,
    cache_argument,
    cache_of,
    inputs_of,
)
from .slots import Layout, insert, insert_positions, take
from .stack import StackInfo, embed_per_layer
from .tokens import Text


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


def widen(
    stack: PreTrainedModel, info: StackInfo, call: dict[str, Any], text: Text, layout: Layout, num_slots: int
) -> dict[str, Any]:
    """The call with room for the slots in each argument that has a column per token.

    Args:
        stack (`PreTrainedModel`): The stack.
        info (`StackInfo`): Facts about it.
        call (`dict`): Its arguments, with `inputs_embeds` over N positions and the others over S tokens.
        text (`Text`): The tokens.
        layout (`Layout`): Where slots and tokens stand.
        num_slots (`int`): The largest number of slots that an instance has, for the message of `check_fits`.

    Raises:
        ValueError: An argument has a column per token and is not known, or the sequence does not fit the model.
    """
    (B, S), L = text.tokens.shape, layout.num_slots
    check_arguments(call, B, S)
    wide = dict(call)
    for name in PER_QUERY_ARGUMENTS:
        if (rows := call.get(name)) is not None:  # (B, 1, S, keys)
            rows = rows.transpose(1, 2).expand(B, S, 1, -1)  # (B, S, 1, keys)
            # A slot sees what the token before it sees, as in generation, where no token stands behind it yet.
            own = take(rows, torch.maximum(layout.before_token - 1, layout.first))  # (B, L, 1, keys)
            wide[name] = insert(rows, own, layout).transpose(1, 2)  # (B, 1, N, keys)
    per_layer = wide.pop("per_layer_inputs", None)
    per_layer = embed_per_layer(stack, text.ids, text.embeds) if per_layer is None else per_layer
    if per_layer is not None:  # (B, S, layers, width); slots begin as copies of the first token here, too
        own = take(per_layer, layout.first)  # (B, L, layers, width)
        wide["per_layer_inputs"] = insert(per_layer, own, layout)  # (B, N, layers, width)
    if call.get("token_type_ids") is not None:
        types = call["token_type_ids"].expand(B, S)  # (B, S)
        own = types.gather(1, layout.before_token.clamp(max=S - 1))  # (B, L)
        wide["token_type_ids"] = insert(types, own, layout)  # (B, N)
    if "position_ids" in info.forward_args:
        positions = call["position_ids"]
        positions = positions.expand(*positions.shape[:-2], B, S)  # (B, S) or (R, B, S)
        segment_ids = None if text.packing is None else text.packing.segment_ids
        wide["position_ids"] = insert_positions(
            positions, layout.first, layout, segment_ids, info.rotates_by_length
        )  # (B, N) or (R, B, N)
    check_fits(info, wide.get("position_ids"), S + L, num_slots)
    if layout.segment_ids is not None:
        wide["attention_mask"] = no_padding(stack, layout.segment_ids)
        return {**wide, **lengths_of(stack, layout.segment_ids, call)}
    wide["attention_mask"] = widen_mask(stack, info, call, text, layout, wide["inputs_embeds"])
    return wide


def check_arguments(call: dict[str, Any], num_rows: int, num_tokens: int) -> None:
    """Refuse an unknown argument that seems to have a column for each of S tokens.

    Raises:
        ValueError: There is such an argument.
    """
    B, S = num_rows, num_tokens
    for name, value in call.items():
        if name in PER_TOKEN_ARGUMENTS + FOREIGN_ARGUMENTS or isinstance(value, Cache):
            continue
        for one in tree_leaves(value):
            shape = tuple(one.shape) if isinstance(one, torch.Tensor) else ()
            if name in PER_QUERY_ARGUMENTS and len(shape) == 4 and shape[0] in (1, B) and shape[1:3] == (1, S):
                continue
            if len(shape) > 1 and (
                (shape[0] in (1, B) and S in shape[1:]) or shape[:2] == (S, B) or shape[0] == B * S
            ):
                raise ValueError(
                    f"Instance prompts do not know how to give slots a place in `{name}` {shape}, which seems to have a place for each of "
                    f"{S} tokens. Call the model without it."
                )


def no_padding(stack: PreTrainedModel, segment_ids: torch.Tensor) -> torch.Tensor | None:
    """A padding mask of ones, (B, N) like `segment_ids`, for a packed call; `forward.py` changes each layer's mask to keep sequences apart.

    Without a mask, transformers would split the rows by position ids, where late slots look like boundaries. Flash attention gets None
    and goes by the lengths.
    """
    return None if is_flash(stack) else torch.ones_like(segment_ids)


def lengths_of(stack: PreTrainedModel, segment_ids: torch.Tensor, call: dict[str, Any]) -> dict[str, Any]:
    """The length arguments for the sequences of `segment_ids` (B, N): those that the call has; for flash attention, all."""
    begins = torch.nn.functional.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero().flatten()
    ends = torch.nn.functional.pad(begins, (0, 1), value=segment_ids.numel()).to(torch.int32)  # (segments + 1,)
    names = [name for name in LENGTH_ARGUMENTS if is_flash(stack) or call.get(name) is not None]
    return {name: ends if name.startswith("cu_") else int(ends.diff().max()) for name in names}


def is_flash(stack: PreTrainedModel) -> bool:
    return str(stack.config._attn_implementation).startswith("flash_attention")


def widen_mask(
    stack: PreTrainedModel, info: StackInfo, call: dict[str, Any], text: Text, layout: Layout, embeds: torch.Tensor
) -> Any:
    """The attention mask over N positions, in the form that the stack takes. Makes room for the slots in a static cache."""
    (B, S), L = text.tokens.shape, layout.num_slots
    cache = cache_of(call)[1]
    mask = None
    # Without a mask, transformers would take position ids that do not increase by 1 for boundaries of packed sequences.
    if text.mask is not None or not layout.all_used or layout.table.late_layers:
        mask = insert(text.tokens if text.mask is None else text.mask, layout.used, layout)  # (B, N)
    if cache is not None and cache.is_compileable:
        make_room(cache, L, info.sliding_window, info.image_layers)
    mask = pad_to_static_cache(mask, cache, B, S + L)
    # The kernel of a prefix-LM is not causal without a mask.
    later = beyond_causal(call.get("attention_mask"), if_none=info.prefix_lm)  # (B, S, S)
    if later is None:
        return mask
    for _ in range(2):  # rows, then columns
        later = insert(later, later.new_zeros(B, L, later.shape[2]), layout).transpose(1, 2)
    return see_beyond_causal(stack.config, embeds, mask, cache, later)


def check_fits(info: StackInfo, position_ids: torch.Tensor | None, num_positions: int, num_slots: int) -> None:
    """Raise a ValueError if the sequence needs more positions than the stack has learned embeddings for."""
    if info.max_positions is None or num_positions <= info.max_positions:
        return
    if position_ids is not None:
        num_positions = int(position_ids.max()) + 1 - info.position_offset
    if num_positions > info.max_positions:
        raise ValueError(
            f"The sequence does not fit: the model has {info.max_positions} positions, and {num_positions - num_slots} tokens "
            f"with {num_slots} prompt slots need {num_positions}. Truncate the text or use fewer `num_virtual_tokens`."
        )


def resume(info: StackInfo, call: dict[str, Any], cache: SlotCache, counts_slots: bool) -> dict[str, Any]:
    """The call of a stack that continues from a slot cache.

    Args:
        info (`StackInfo`): Facts about the stack.
        call (`dict`): The arguments of the stack.
        cache (`SlotCache`): Its cache.
        counts_slots (`bool`): Whether the caller passed the inner cache, whose length counts slots, too.

    Raises:
        ValueError: The text does not continue the tokens in the cache, or the sequence does not fit the model.
    """
    tokens, table, seen = inputs_of(call), cache.table, cache.get_seq_length()  # tokens (B, S, ...)
    B, S = tokens.shape[:2]
    positions = call.get("position_ids")
    told = positions is not None or "position_ids" not in info.forward_args
    if table.num_slots == 0 and (told or table.text is None or not table.text.padded):
        return call  # nothing has moved
    if counts_slots and table.num_slots and not _goes_on(info, positions, call.get("attention_mask"), seen, S):
        raise ValueError(
            f"The cache holds {seen} tokens and {table.num_slots} prompt slots, but the text does not go on from these "
            f"{seen} tokens. Pass the cache that the model returned, which counts tokens only, and not the cache that went in "
            "first."
        )
    mask = padding_mask(call.get("attention_mask"), B, seen + S, cache.is_compileable)  # (B, seen + S)
    num_positions = seen + table.num_slots + S
    if table.num_slots:
        wide = table.widen_mask(mask, seen + S)  # (B, seen + L + S)
        call = {**call, "attention_mask": pad_to_static_cache(wide, cache.inner, B, num_positions)}
    if "position_ids" in info.forward_args:
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, seen:] + info.position_offset  # (B, S)
        elif positions is None:
            positions = torch.arange(seen, seen + S, device=tokens.device) + info.position_offset  # (S,)
        if not info.rotates_by_length:  # there, slots have positions before those of the tokens
            positions = positions + table.num_counted.to(positions.device)  # (B, S) or (R, B, S)
        call = {**call, "position_ids": positions}
    check_fits(info, call.get("position_ids"), num_positions, table.num_slots)
    return call


def _goes_on(info: StackInfo, positions: Any, mask: Any, seen: int, num_new: int) -> bool:
    """False if the caller counted slots as tokens, taking the text's length from a cache that counts both.

    Positions (B, S) or the mask (B, seen + S) show it.
    """
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or (mask is not None and mask.dim() != 2):
        return True
    if mask is not None and mask.shape[1] != seen + num_new:
        return False
    before = seen if mask is None else mask[:, :seen].sum(dim=1).to(positions.device)  # (B,)
    return bool((positions[:, 0] == before + info.position_offset).all())
