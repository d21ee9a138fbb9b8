# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from peft_instance_prompt.nn.rational import FIXED_ACTIVATIONS, gelu_coefficients, rational


def reference(x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    a, b = coefficients.flatten().split([7, 5])
    numerator = sum(a[j] * x**j for j in range(7))
    denominator = 1 + sum(b[i - 1] * x**i for i in range(1, 6)).abs()
    return numerator / denominator


@pytest.mark.parametrize("fit, limit, error", [("wide", 10, 4.9e-3), ("tight", 3, 1.2e-4)])
def test_fits_gelu(fit, limit, error):
    x = torch.linspace(-limit, limit, 20001)
    coefficients = gelu_coefficients(fit)
    assert coefficients.shape == (12,)
    worst = (rational(x[None], coefficients[None])[0] - F.gelu(x)).abs().max().item()
    assert 0.9 * error < worst < 1.02 * error


def test_value_and_gradients_match_the_formula():
    coefficients = torch.randn(1, 12, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    inputs = (x, coefficients)
    got, want = rational(*inputs), reference(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float32", "same"])
def test_half_precision_is_computed_in_float32(dtype, weights):
    # 6.5 ** 6 is beyond float16.
    x = torch.tensor([[-9.0, -1.3, 0.0, 0.7, 6.5, 9.0, 60.0]], dtype=dtype, requires_grad=True)
    coefficients = gelu_coefficients().to(torch.float32 if weights == "float32" else dtype)[None].requires_grad_()
    got = rational(x, coefficients)
    assert got.dtype == dtype
    want = reference(x.double(), coefficients.double()).to(dtype)
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    got.float().sum().backward()
    assert x.grad.isfinite().all()
    if weights == "float32":  # the gradient of a_6 is about 60 ** 6 / 60 ** 4 * 300, beyond a float16 weight's range
        assert coefficients.grad.isfinite().all()


def test_coefficients_per_instance():
    """Value and gradient are those of each instance alone; an input that all instances share broadcasts, too."""
    coefficients = torch.stack([gelu_coefficients("wide"), gelu_coefficients("tight"), gelu_coefficients() + 0.1])
    coefficients = coefficients[:, None].requires_grad_()  # (3, 1, 12)
    for x in (torch.randn(3, 4, 5), torch.randn(4, 5)):
        got = rational(x, coefficients)
        each = [rational(x[g] if x.dim() == 3 else x, coefficients[g]) for g in range(3)]
        torch.testing.assert_close(got, torch.stack(each))
        (actual,) = torch.autograd.grad(got.square().sum(), coefficients)
        (expected,) = torch.autograd.grad(torch.stack(each).square().sum(), coefficients)
        torch.testing.assert_close(actual, expected)


def test_bad_fit_and_shape():
    with pytest.raises(ValueError, match=r"`fit`.*wide.*tight.*'loose'"):
        gelu_coefficients("loose")
    with pytest.raises(ValueError, match=r"`coefficients`.*12.*got \(1, 11\)"):
        rational(torch.ones(1, 3), torch.ones(1, 11))


@pytest.mark.parametrize(
    "name, function", [("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu), ("tanh", torch.tanh)]
)
def test_fixed_activation(name, function):
    x = torch.linspace(-3, 3, 31)
    torch.testing.assert_close(FIXED_ACTIVATIONS[name](x), function(x))
