# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Parameterised hypercomplex multiplication (PHM): matrices that are sums of Kronecker products."""

from __future__ import annotations

import torch


def kron_sum(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """
    The full matrix `W = sum_i A_i kron B_i`, for inspection; [`phm_linear`] never builds it.

    Args:
        A (`torch.Tensor` of shape `(n, p, r)`): Left factors.
        B (`torch.Tensor` of shape `(n, q, s)`): Right factors.

    Returns:
        `torch.Tensor` of shape `(p * q, r * s)`: The sum, in the promoted dtype of the factors.
    """
    dtype = torch.promote_types(A.dtype, B.dtype)
    W = torch.einsum("ipr,iqs->pqrs", A.to(dtype), B.to(dtype))
    return W.flatten(2).flatten(0, 1)  # (p * q, r * s)


def phm_linear(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """
    `x W + bias` with `W = sum_{i<n} A_i kron B_i`, the PHM layer of IDPG (NAACL 2022, https://arxiv.org/abs/2204.04497) after
    https://arxiv.org/abs/2102.08597. It has `n^3 + in * out / n` weights, a dense layer `in * out`.

    Leading dimensions broadcast as in `x @ W`: factors without leading dimensions serve all inputs; factors with a dimension G in front
    give each of G inputs its own.

    Args:
        x (`torch.Tensor` of shape `(..., T, in)`): Input.
        A (`torch.Tensor` of shape `(..., n, n, n)`): Left factors.
        B (`torch.Tensor` of shape `(..., n, in / n, out / n)`): Right factors.
        bias (`torch.Tensor` of shape `(..., 1, out)`, *optional*): Added at the end. Default: none.

    Returns:
        `torch.Tensor` of shape `(..., T, out)`: In the dtype of `x`; computed in the wider of the dtypes of `x` and `B`.

    Raises:
        ValueError: If `A` and `B` do not have these shapes, or the last dimension of `x` is not `in`.
    """
    n, (width, out) = A.shape[-1], B.shape[-2:]
    if A.shape[-3:] != (n, n, n) or B.shape[-3] != n:
        raise ValueError(
            f"`A` and `B` must have the shapes (..., n, n, n) and (..., n, in / n, out / n), got {tuple(A.shape)} and "
            f"{tuple(B.shape)}."
        )
    if x.shape[-1] != n * width:
        raise ValueError(f"The last dimension of `x` must be {n * width}, as the factors have it, got {x.shape[-1]}.")
    dtype = torch.promote_types(x.dtype, B.dtype)
    A, B = A.to(dtype), B.to(dtype)
    y = x.to(dtype).unflatten(-1, (n, width))  # (..., T, n, in / n)
    # Both orders cost in * out for B; A costs n^2 times the size it is applied to, so apply it on the narrow side.
    if width <= out:
        y = torch.einsum("...tpq,...ipr->...tirq", y, A)  # (..., T, n, n, in / n)
        y = torch.einsum("...tirq,...iqs->...trs", y, B)  # (..., T, n, out / n)
    else:
        y = torch.einsum("...tpq,...iqs->...tips", y, B)  # (..., T, n, n, out / n)
        y = torch.einsum("...tips,...ipr->...trs", y, A)  # (..., T, n, out / n)
    y = y.flatten(-2)  # (..., T, out)
    return (y if bias is None else y + bias).to(x.dtype)
