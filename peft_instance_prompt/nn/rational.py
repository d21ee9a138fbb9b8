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

"""Activation functions of the prompt generators: a learned rational function and the usual fixed ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn


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


class Rational(nn.Module):
    """
    Learned rational activation with 12 scalars, the activation of IAPT (https://arxiv.org/abs/2405.18203):
    `g(x) = sum_{j=0..6} a_j x^j / (1 + |sum_{i=1..5} b_i x^i|)`. It starts as an approximation of GELU.

    The denominator is at least 1, so there are no poles. Outside the range of the fit `g` grows like `x^2` at the start
    (degree 6 over degree 4), hence feed it normalised inputs; in float32 the powers overflow from about `|x| = 1e6` on.

    Args:
        fit (`str`, *optional*, defaults to `"wide"`):
            Which fit of GELU to start from: `"wide"` (max error 4.9e-3 on [-10, 10]) or `"tight"` (max error 1.2e-4 on
            [-3, 3]).

    Raises:
        ValueError: If `fit` is neither `"wide"` nor `"tight"`.
    """

    def __init__(self, fit: Literal["wide", "tight"] = "wide") -> None:
        super().__init__()
        if fit not in GELU_FITS:
            raise ValueError(f"`fit` must be one of {list(GELU_FITS)}, got {fit!r}.")
        self.fit = fit
        self.numerator = nn.Parameter(torch.empty(7))
        self.denominator = nn.Parameter(torch.empty(5))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the 12 scalars back to the fit of GELU."""
        with torch.no_grad():
            for parameter, values in zip((self.numerator, self.denominator), GELU_FITS[self.fit]):
                parameter.copy_(torch.tensor(values))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Apply `g` to each element.

        Args:
            x (`torch.Tensor` of any shape): Input.

        Returns:
            `torch.Tensor`: `g(x)`, of the shape and dtype of `x`; float16 and bfloat16 are computed in float32.
        """
        # x^6 leaves float16's range at |x| = 6.4, and bfloat16 has too few digits for the cancelling terms.
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = x.to(dtype)
        # The polynomial of the denominator has no constant term: one more factor y after Horner's scheme.
        denominator = 1 + (y * _horner(self.denominator.to(dtype), y)).abs()
        return (_horner(self.numerator.to(dtype), y) / denominator).to(x.dtype)

    def extra_repr(self) -> str:
        return f"fit={self.fit!r}"


def _horner(coefficients: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`sum_j coefficients[j] * x^j`."""
    *lower, result = coefficients.unbind()
    for coefficient in reversed(lower):
        result = result * x + coefficient
    return result


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "rational": Rational,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def get_activation(name: str) -> nn.Module:
    """
    Make a new activation module.

    Args:
        name (`str`): `"rational"` (learned, see [`Rational`]), `"gelu"`, `"relu"`, `"silu"` or `"tanh"`.

    Returns:
        `nn.Module`: The activation; its result has the dtype of its input.

    Raises:
        ValueError: If there is no activation of this name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"`name` of an activation must be one of {list(ACTIVATIONS)}, got {name!r}.")
    return ACTIVATIONS[name]()
