# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""
Pooling: from an instance's token states to one or a few vectors per row.

Shapes: B rows, S tokens, d features, l output vectors. `mask` (B, S) is bool, True where a token is part of the
instance. States at other positions never reach a result or a gradient, not even as 0 * NaN, since attention
kernels may leave NaN at padding. Results have the dtype of the states; sums and softmaxes run in float32 at least.
"""

from __future__ import annotations

import torch


def attention_pool(values: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Self-attention pooling of IAPT (https://arxiv.org/abs/2405.18203): for each of the `l` score columns, a softmax over
    the row's tokens without scaling, then the weighted sum of the values.

    Args:
        values (`torch.Tensor` of shape `(B, S, m)`): The vectors to pool.
        scores (`torch.Tensor` of shape `(B, S, l)`): Logits of the tokens, one column per output vector.
        mask (`torch.Tensor` of shape `(B, S)`): Bool, True for the tokens to pool.

    Returns:
        `torch.Tensor` of shape `(B, l, m)`: The pooled values, in the dtype of `values`; zeros for a row with no token.

    Raises:
        ValueError: If `mask` is not bool, or its shape does not fit `values` and `scores`.
    """
    _check_mask(mask, values=values, scores=scores)
    dropped = ~mask
    scores = at_least_float32(scores).transpose(-1, -2)  # (B, l, S)
    # The lowest finite number and not -inf, which makes an empty row's softmax and its gradient NaN.
    weights = scores.masked_fill(dropped.unsqueeze(-2), torch.finfo(scores.dtype).min).softmax(dim=-1)
    # An empty row's weights are uniform now, but all its values are 0.
    kept = at_least_float32(values).masked_fill(dropped.unsqueeze(-1), 0.0)  # (B, S, m)
    return (weights @ kept.to(weights.dtype)).to(values.dtype)  # (B, l, S) @ (B, S, m) = (B, l, m)


def mean_attention(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The attention weights of one head of self-attention over each row's tokens, averaged over the queries: the share of each
    token in the mean of the head's outputs. Used by ID-SPAM (https://arxiv.org/abs/2506.05629).

    Args:
        queries (`torch.Tensor` of shape `(B, S, k)`): The queries.
        keys (`torch.Tensor` of shape `(B, S, k)`): The keys. Scores are `queries @ keys^T / sqrt(k)`.
        mask (`torch.Tensor` of shape `(B, S)`): Bool, True for the tokens that are queries and keys.

    Returns:
        `torch.Tensor` of shape `(B, S)`: Each row sums to 1; zeros for a row with no token. In the dtype of `queries`.

    Raises:
        ValueError: If `mask` is not bool, or its shape does not fit `queries` and `keys`.
    """
    _check_mask(mask, queries=queries, keys=keys)
    dropped = ~mask.unsqueeze(-1)  # (B, S, 1)
    asking, asked = (x.masked_fill(dropped, 0.0) for x in (queries, keys))  # (B, S, k) each
    scores = at_least_float32(asking @ asked.transpose(-1, -2)) * queries.shape[-1] ** -0.5  # (B, S, S)
    weights = scores.masked_fill(~mask.unsqueeze(-2), torch.finfo(scores.dtype).min).softmax(dim=-1)  # (B, S, S)
    counts = mask.sum(dim=-1, keepdim=True).clamp(min=1)  # (B, 1)
    # An empty row's weights are uniform, but none of its tokens is a query.
    return (weights.masked_fill(dropped, 0.0).sum(dim=-2) / counts).to(queries.dtype)  # (B, S)


def mean_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Mean over each row's kept tokens.

    Args:
        states (`torch.Tensor` of shape `(B, S, d)`): Token states.
        mask (`torch.Tensor` of shape `(B, S)`): Bool, True for the tokens to pool.

    Returns:
        `torch.Tensor` of shape `(B, d)`: The means, in the dtype of `states`; zeros for a row with no token.

    Raises:
        ValueError: If `mask` is not bool, or its shape does not fit `states`.
    """
    _check_mask(mask, states=states)
    dtype = torch.promote_types(states.dtype, torch.float32)
    total = states.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=-2, dtype=dtype)  # (B, d)
    return (total / mask.sum(dim=-1, keepdim=True).clamp(min=1)).to(states.dtype)


def first_index(mask: torch.Tensor) -> torch.Tensor:
    """
    Index of each row's first True.

    Args:
        mask (`torch.Tensor` of shape `(B, S)`): Bool.

    Returns:
        `torch.Tensor` of shape `(B,)`: int64; 0 for a row without True.

    Raises:
        ValueError: If `mask` is not bool.
    """
    _check_mask(mask)
    return mask.int().argmax(dim=-1)  # (B,); of equal values argmax takes the first


def last_index(mask: torch.Tensor) -> torch.Tensor:
    """
    Index of each row's last True.

    Args:
        mask (`torch.Tensor` of shape `(B, S)`): Bool.

    Returns:
        `torch.Tensor` of shape `(B,)`: int64; 0 for a row without True.

    Raises:
        ValueError: If `mask` is not bool.
    """
    _check_mask(mask)
    return (mask * torch.arange(mask.shape[-1], device=mask.device)).amax(dim=-1)  # (B,)


def first_token(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    State of each row's first kept token.

    Args:
        states (`torch.Tensor` of shape `(B, S, d)`): Token states.
        mask (`torch.Tensor` of shape `(B, S)`): Bool, True for the tokens to choose from.

    Returns:
        `torch.Tensor` of shape `(B, d)`: In the dtype of `states`; a row with no token gives its state 0.

    Raises:
        ValueError: If `mask` is not bool, or its shape does not fit `states`.
    """
    _check_mask(mask, states=states)
    return _take(states, first_index(mask))


def last_token(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    State of each row's last kept token.

    Args:
        states (`torch.Tensor` of shape `(B, S, d)`): Token states.
        mask (`torch.Tensor` of shape `(B, S)`): Bool, True for the tokens to choose from.

    Returns:
        `torch.Tensor` of shape `(B, d)`: In the dtype of `states`; a row with no token gives its state 0.

    Raises:
        ValueError: If `mask` is not bool, or its shape does not fit `states`.
    """
    _check_mask(mask, states=states)
    return _take(states, last_index(mask))


def adaptive_avg_pool(states: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """
    `torch.nn.AdaptiveAvgPool1d` over each row's kept tokens, for all rows at once, although their numbers n of tokens
    differ. Output i is the mean of the tokens floor(i n / l) to ceil((i + 1) n / l) - 1. If n < l, the bins overlap. Used
    by LPT's `appg` (https://arxiv.org/abs/2210.11292).

    Args:
        states (`torch.Tensor` of shape `(B, S, d)`): Token states.
        mask (`torch.Tensor` of shape `(B, S)`): Bool, True for the tokens to pool; they need not be contiguous.
        length (`int`): Number l of output vectors, at least 1.

    Returns:
        `torch.Tensor` of shape `(B, l, d)`: In the dtype of `states`; zeros for a row with no token.

    Raises:
        ValueError: If `length` is below 1, `mask` is not bool, or its shape does not fit `states`.
    """
    _check_mask(mask, states=states)
    bins = _adaptive_bins(mask, length)  # (B, l, S)
    kept = at_least_float32(states).masked_fill(~mask.unsqueeze(-1), 0.0)
    weights = bins.to(kept.dtype) / bins.sum(dim=-1, keepdim=True).clamp(min=1)
    return (weights @ kept).to(states.dtype)  # (B, l, S) @ (B, S, d) = (B, l, d)


def adaptive_max_pool(states: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """
    `torch.nn.AdaptiveMaxPool1d` over each row's kept tokens; the bins are those of [`adaptive_avg_pool`]. Of equal
    maxima the first gets the gradient, as in torch. Used by LPT's `mppg` (https://arxiv.org/abs/2210.11292).

    Args:
        states (`torch.Tensor` of shape `(B, S, d)`): Token states.
        mask (`torch.Tensor` of shape `(B, S)`): Bool, True for the tokens to pool; they need not be contiguous.
        length (`int`): Number l of output vectors, at least 1.

    Returns:
        `torch.Tensor` of shape `(B, l, d)`: In the dtype of `states`; zeros for a row with no token.

    Raises:
        ValueError: If `length` is below 1, `mask` is not bool, or its shape does not fit `states`.
    """
    _check_mask(mask, states=states)
    # Bin by bin and outside autograd, so that no (B, l, S, d) is ever made, and backward keeps only the indices.
    index = [
        states.detach().masked_fill(~inside.unsqueeze(-1), -torch.inf).argmax(dim=-2)  # (B, d)
        for inside in _adaptive_bins(mask, length).unbind(dim=-2)  # l times (B, S)
    ]
    pooled = states.gather(-2, torch.stack(index, dim=-2))  # (B, l, d)
    return pooled.masked_fill(~mask.any(dim=-1)[..., None, None], 0.0)


def rms(states: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """
    Root mean square over the features, `sqrt(mean(x^2) + eps)`.

    Args:
        states (`torch.Tensor` of shape `(..., d)`): Vectors.
        eps (`float`, *optional*, defaults to `1e-6`): Keeps the gradient finite at 0; at least 0.

    Returns:
        `torch.Tensor` of shape `(..., 1)`: In the dtype of `states`, computed in float32 at least.
    """
    return _rms(at_least_float32(states), eps).to(states.dtype)


def rms_norm(states: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """
    Divide each vector by its [`rms`]. There is no learned weight.

    Args:
        states (`torch.Tensor` of shape `(..., d)`): Vectors.
        eps (`float`, *optional*, defaults to `1e-6`): Keeps value and gradient finite at 0; at least 0.

    Returns:
        `torch.Tensor` of shape `(..., d)`: In the dtype of `states`, computed in float32 at least.
    """
    wide = at_least_float32(states)
    return (wide / _rms(wide, eps)).to(states.dtype)


def _rms(states: torch.Tensor, eps: float) -> torch.Tensor:
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)  # (..., 1); makes no copy of the states
    return (norm.square() / states.shape[-1] + eps).sqrt()


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` if it is float32 or float64, else a float32 copy."""
    # `promote_types` would be one more operator, five times per layer.
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states[b, index[b]]`, (B, d)."""
    index = index[..., None, None].expand(*index.shape, 1, states.shape[-1])  # (B, 1, d)
    return states.gather(-2, index).squeeze(-2)  # (B, d)


def _adaptive_bins(mask: torch.Tensor, length: int) -> torch.Tensor:
    """(B, l, S), True where a token is in a bin."""
    if length < 1:
        raise ValueError(f"`length` must be at least 1, got {length}.")
    rank = (mask.cumsum(dim=-1) - 1).unsqueeze(-2)  # (B, 1, S), the token's place among the kept ones
    n = mask.sum(dim=-1)[..., None, None]  # (B, 1, 1)
    i = torch.arange(length, device=mask.device).unsqueeze(-1)  # (l, 1)
    start, end = i * n // length, ((i + 1) * n + length - 1) // length  # (B, l, 1)
    return mask.unsqueeze(-2) & (rank >= start) & (rank < end)  # (B, l, S)


def _check_mask(mask: torch.Tensor, **tensors: torch.Tensor) -> None:
    # A mask of 0 and 1 would index and invert to wrong values without an error.
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be a bool tensor, got {mask.dtype}.")
    for name, tensor in tensors.items():
        if tensor.shape[:-1] != mask.shape:
            raise ValueError(
                f"`mask` must have the shape of `{name}` without its last dimension, {tuple(tensor.shape[:-1])}, "
                f"got {tuple(mask.shape)}."
            )
