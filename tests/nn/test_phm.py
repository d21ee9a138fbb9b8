# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_instance_prompt.nn.phm import kron_sum, phm_linear


SIZES = [(12, 20, 4), (20, 12, 4), (6, 6, 3), (4, 24, 4), (24, 4, 4), (5, 7, 1)]


def explicit_matrix(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return sum(torch.kron(a, b) for a, b in zip(A, B))


def factors(sizes: tuple[int, int, int], *lead: int, dtype=torch.float64) -> list[torch.Tensor]:
    """A, B and the bias."""
    inputs, outputs, n = sizes
    shapes = ((n, n, n), (n, inputs // n, outputs // n), (1, outputs))
    return [torch.randn(*lead, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("n, p, q, r, s", [(3, 3, 2, 3, 5), (2, 4, 1, 3, 2), (1, 1, 4, 1, 6)])
def test_kron_sum(n, p, q, r, s):
    A, B = torch.randn(n, p, r), torch.randn(n, q, s)
    torch.testing.assert_close(kron_sum(A, B), explicit_matrix(A, B))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("sizes", SIZES)
def test_value_and_gradients_match_torch_kron(sizes, lead, bias):
    A, B, b = factors(sizes)
    x = torch.randn(*lead, sizes[0], dtype=torch.float64, requires_grad=True)
    inputs = (x, A, B, b) if bias else (x, A, B)
    got, want = phm_linear(*inputs), x @ explicit_matrix(A, B) + (b if bias else 0)
    assert got.shape == (*lead, sizes[1])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_factors_per_instance(sizes, rows):
    """Value and gradients are those of each instance alone; inputs that all instances share broadcast, too."""
    G = 4
    A, B, b = factors(sizes, G)
    for x in (torch.randn(G, rows, sizes[0], dtype=torch.float64), torch.randn(rows, sizes[0], dtype=torch.float64)):
        got = phm_linear(x, A, B, b)
        each = [phm_linear(x[g] if x.dim() == 3 else x, A[g], B[g], b[g]) for g in range(G)]
        torch.testing.assert_close(got, torch.stack(each))
        for actual, expected in zip(
            torch.autograd.grad(got.square().sum(), (A, B, b)),
            torch.autograd.grad(torch.stack(each).square().sum(), (A, B, b)),
        ):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("sizes", [(1024, 256, 16), (256, 1024, 16)])
def test_never_builds_the_matrix(sizes, lead):
    largest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    A, B, b = factors(sizes, *lead, dtype=torch.float32)
    x = torch.randn(2, 1, sizes[0])
    with Recorder():
        phm_linear(x, A, B, b).sum().backward()
    # The largest is B (or its gradient) or the n times narrower side, for the 2 instances.
    assert largest <= max(B.numel(), 2 * 16 * min(sizes[:2])) < 2 * sizes[0] * sizes[1] / 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_float32_weights(dtype):
    weights, x = factors((32, 48, 16), dtype=torch.float32), torch.randn(3, 32).to(dtype)
    got = phm_linear(x, *weights)
    assert got.dtype == dtype
    torch.testing.assert_close(got, phm_linear(x.float(), *weights).to(dtype), rtol=0, atol=0)
    half = [weight.to(dtype) for weight in weights]
    assert phm_linear(x, *half).dtype == dtype and phm_linear(x.float(), *half).dtype == torch.float32


def test_bad_shapes():
    A, B, b = factors((8, 8, 4))
    with pytest.raises(ValueError, match=r"last dimension of `x` must be 8.*got 4"):
        phm_linear(torch.ones(2, 4), A, B, b)
    with pytest.raises(ValueError, match=r"`A` and `B`.*\(4, 4, 4\) and \(2, 2, 2\)"):
        phm_linear(torch.ones(2, 8), A, B[:2])
    with pytest.raises(ValueError, match=r"`A` and `B`.*\(3, 4, 4\)"):
        phm_linear(torch.ones(2, 8), A[:3], B)
