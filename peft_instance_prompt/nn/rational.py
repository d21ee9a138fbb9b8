# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Activation functions of the prompt generators: a learned rational function and the usual fixed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F

from .pooling import at_least_float32


# (numerator a_0..a_6, denominator b_1..b_5): least-squares fits of GELU.
GELU_FITS = {
    # max error 4.9e-3 on [-10, 10]
    "wide": (
        (-0.00485008517, 0.5, 0.425477082, 0.135541897, 0.020307294, 0.00143671694, 3.85204859e-05),
        (0.0, 0.271083794, 0.0, 0.00287343388, 0.0),
    ),
    # max error 1.2e-4 on [-3, 3]
    "tight": (
        (2.80386649e-05, 0.5, 0.398502039, 0.162301457, 0.0640523134, 0.0183168701, 0.00210048704),
        (0.0, 0.324602914, 0.0, 0.0366337401, 0.0),
    ),
}

FIXED_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": torch.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def gelu_coefficients(fit: Literal["wide", "tight"] = "wide") -> torch.Tensor:
    """
    The coefficients with which [`rational`] approximates GELU.

    Args:
        fit (`str`, *optional*, defaults to `"wide"`):
            `"wide"` (max error 4.9e-3 on [-10, 10]) or `"tight"` (max error 1.2e-4 on [-3, 3]).

    Returns:
        `torch.Tensor` of shape `(12,)`.

    Raises:
        ValueError: If `fit` is neither `"wide"` nor `"tight"`.
    """
    if fit not in GELU_FITS:
        raise ValueError(f"`fit` must be one of {list(GELU_FITS)}, got {fit!r}.")
    numerator, denominator = GELU_FITS[fit]
    return torch.tensor(numerator + denominator)  # (12,)


def rational(x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """
    Learned rational activation with 12 coefficients, the activation of IAPT (https://arxiv.org/abs/2405.18203):
    `g(x) = sum_{j=0..6} a_j x^j / (1 + |sum_{i=1..5} b_i x^i|)`.

    The denominator is at least 1, so there are no poles. With [`gelu_coefficients`], `g` grows like `x^2` outside the range of
    the fit (degree 6 over degree 4), so normalise its inputs. In float32 the powers overflow from about `|x| = 1e6` on.

    Args:
        x (`torch.Tensor` of shape `(..., l, m)`): Input.
        coefficients (`torch.Tensor` of shape `(..., 1, 12)`):
            `a_0` to `a_6`, then `b_1` to `b_5`. Leading dimensions broadcast: `(1, 12)` serves all inputs; `(G, 1, 12)` gives
            each of G inputs its own function.

    Returns:
        `torch.Tensor` of shape `(..., l, m)`: `g(x)` in the dtype of `x`; float16 and bfloat16 are computed in float32.

    Raises:
        ValueError: If the last dimension of `coefficients` is not 12.
    """
    if coefficients.shape[-1] != 12:
        raise ValueError(f"`coefficients` must have the shape (..., 1, 12), got {tuple(coefficients.shape)}.")
    # x^6 leaves float16's range at |x| = 6.4, and bfloat16 has too few digits for the cancelling terms.
    y = at_least_float32(x)
    each = coefficients.to(y.dtype).split(1, dim=-1)  # 12 times (..., 1, 1)
    # The polynomial of the denominator has no constant term: one more factor y after Horner's scheme.
    denominator = 1 + (y * _horner(each[7:], y)).abs()
    return (_horner(each[:7], y) / denominator).to(x.dtype)


def _horner(coefficients: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    """`sum_j coefficients[j] * x^j`."""
    *lower, result = coefficients
    for coefficient in reversed(lower):
        result = torch.addcmul(coefficient, result, x)
    return result
