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

"""Parameterised hypercomplex multiplication: a linear layer whose matrix is a sum of Kronecker products."""

from __future__ import annotations

import math

import torch
from torch import nn


def kron_sum(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """
    The matrix `W = sum_i A_i kron B_i` in full, to look at or to merge; [`PHMLinear`] itself never builds it.

    Args:
        A (`torch.Tensor` of shape `(n, p, r)`): Left factors.
        B (`torch.Tensor` of shape `(n, q, s)`): Right factors.

    Returns:
        `torch.Tensor` of shape `(p * q, r * s)`: The sum, in the promoted dtype of the factors.
    """
    dtype = torch.promote_types(A.dtype, B.dtype)
    W = torch.einsum("ipr,iqs->pqrs", A.to(dtype), B.to(dtype))
    return W.flatten(2).flatten(0, 1)  # (p * q, r * s)


class PHMLinear(nn.Module):
    """
    Linear layer `y = x W + bias` with `W = sum_{i<n} A_i kron B_i`, the PHM layer of IDPG (NAACL 2022,
    https://arxiv.org/abs/2204.04497) after https://arxiv.org/abs/2102.08597. It has `n^3 + in * out / n` weights, a dense
    layer `in * out`.

    Args:
        in_features (`int`): Size of the input, a multiple of `n`.
        out_features (`int`): Size of the output, a multiple of `n`.
        n (`int`, *optional*, defaults to `16`): Number of Kronecker products; must divide both sizes.
        bias (`bool`, *optional*, defaults to `True`): Whether to add a learned bias.
        bias_std (`float`, *optional*, defaults to `0.05`):
            Standard deviation of the bias at the start, at least 0; the paper has 0.05 for the hidden layer and 0.02
            for the output. A and B start with 0.05.
        share_A_with (`PHMLinear`, *optional*):
            Use this layer's `A` (it must have the same `n`) rather than an own one, as in S-IDPG. The parameter stays
            with its owner, so that `state_dict()` too has it once: two names for one tensor would be two tensors after
            loading.

    Attributes:
        A (`nn.Parameter` of shape `(n, n, n)`): Left factors; None if they are another layer's.
        B (`nn.Parameter` of shape `(n, in_features / n, out_features / n)`): Right factors.
        bias (`nn.Parameter` of shape `(out_features,)`): None without `bias`.

    Raises:
        ValueError: If a size is below 1, `n` does not divide both sizes, or `share_A_with` has another `n`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int = 16,
        bias: bool = True,
        bias_std: float = 0.05,
        share_A_with: PHMLinear | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("n", n)):
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if in_features % n or out_features % n:
            common = math.gcd(in_features, out_features)
            allowed = [k for k in range(1, common + 1) if common % k == 0]
            raise ValueError(
                f"`n` must divide `in_features`={in_features} and `out_features`={out_features}, got {n}; "
                f"these do: {allowed}."
            )
        if share_A_with is not None and share_A_with.n != n:
            raise ValueError(f"`share_A_with` must have n={n} as this layer, got a layer with n={share_A_with.n}.")
        self.in_features, self.out_features, self.n, self.bias_std = in_features, out_features, n, bias_std
        self.A = nn.Parameter(torch.empty(n, n, n)) if share_A_with is None else None
        self._owner_of_A = (share_A_with,)  # in a tuple, out of sight of `nn.Module`
        self.B = nn.Parameter(torch.empty(n, in_features // n, out_features // n))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A, B ~ N(0, 0.05^2) and the bias ~ N(0, bias_std^2) anew; a shared A is left to its owner."""
        if self.A is not None:
            nn.init.normal_(self.A, std=0.05)
        nn.init.normal_(self.B, std=0.05)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=self.bias_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Apply the layer.

        Args:
            x (`torch.Tensor` of shape `(..., in_features)`): Input.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`: In the dtype of `x`; computed in the wider of the dtypes of
            `x` and the weights.

        Raises:
            ValueError: If the last dimension of `x` is not `in_features`.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"The last dimension of `x` must be in_features={self.in_features}, got {x.shape[-1]}.")
        dtype = torch.promote_types(x.dtype, self.B.dtype)
        A = self.A if self.A is not None else self._owner_of_A[0].A
        A, B = A.to(dtype), self.B.to(dtype)
        y = x.to(dtype).unflatten(-1, (self.n, -1))  # (..., n, in / n)
        # Both orders cost in * out for B; A costs n^2 times the size it is applied to, so apply it on the narrow side.
        if self.in_features <= self.out_features:
            y = torch.einsum("...pq,ipr->...irq", y, A)  # (..., n, n, in / n)
            y = torch.einsum("...irq,iqs->...rs", y, B)  # (..., n, out / n)
        else:
            y = torch.einsum("...pq,iqs->...ips", y, B)  # (..., n, n, out / n)
            y = torch.einsum("...ips,ipr->...rs", y, A)  # (..., n, out / n)
        y = y.flatten(-2)  # (..., out)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, n={self.n}, bias={self.bias is not None}"
