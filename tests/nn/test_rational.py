# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from peft_instance_prompt.nn.rational import ACTIVATIONS, Rational, get_activation


def reference(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    numerator = sum(a[j] * x**j for j in range(7))
    denominator = 1 + sum(b[i - 1] * x**i for i in range(1, 6)).abs()
    return numerator / denominator


@pytest.mark.parametrize("fit, limit, error", [("wide", 10, 4.9e-3), ("tight", 3, 1.2e-4)])
def test_starts_at_gelu(fit, limit, error):
    x = torch.linspace(-limit, limit, 20001)
    worst = (Rational(fit)(x) - F.gelu(x)).abs().max().item()
    assert 0.9 * error < worst < 1.02 * error


def test_value_and_gradients_match_the_formula():
    torch.manual_seed(0)
    rational = Rational().double()
    with torch.no_grad():
        rational.numerator.normal_()
        rational.denominator.normal_()
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    inputs = (x, rational.numerator, rational.denominator)
    got, want = rational(x), reference(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float32", "same"])
def test_half_precision_is_computed_in_float32(dtype, weights):
    # 6.5 ** 6 is beyond float16.
    x = torch.tensor([-9.0, -1.3, 0.0, 0.7, 6.5, 9.0, 60.0], dtype=dtype, requires_grad=True)
    rational = Rational() if weights == "float32" else Rational().to(dtype)
    got = rational(x)
    assert got.dtype == dtype
    want = reference(x.double(), rational.numerator.double(), rational.denominator.double()).to(dtype)
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    got.float().sum().backward()
    assert x.grad.isfinite().all()
    if weights == "float32":  # the gradient of a_6 is about 60 ** 6 / 60 ** 4 * 300, beyond a float16 weight's range
        assert rational.numerator.grad.isfinite().all()


def test_twelve_parameters_and_reset():
    rational = Rational("tight")
    start = copy.deepcopy(rational.state_dict())
    assert {name: tuple(p.shape) for name, p in rational.named_parameters()} == {
        "numerator": (7,),
        "denominator": (5,),
    }
    with torch.no_grad():
        for p in rational.parameters():
            p.zero_()
    rational.reset_parameters()
    torch.testing.assert_close(dict(rational.state_dict()), dict(start), rtol=0, atol=0)


def test_vmap_with_weights_per_row():
    torch.manual_seed(0)
    rows = [Rational("wide"), Rational("tight"), Rational("wide")]
    with torch.no_grad():
        rows[2].numerator.add_(0.1)
    params, _ = stack_module_state(rows)
    x = torch.randn(3, 5).bfloat16()
    got = vmap(lambda p, row: functional_call(rows[0], p, (row,)))(params, x)
    torch.testing.assert_close(got, torch.stack([r(row) for r, row in zip(rows, x)]))
    grads = vmap(grad(lambda p, row: functional_call(rows[0], p, (row,)).float().sum()))(params, x)
    for b, row in enumerate(rows):
        want = torch.autograd.grad(row(x[b]).float().sum(), row.numerator)[0]
        torch.testing.assert_close(grads["numerator"][b], want)


def test_bad_fit():
    with pytest.raises(ValueError, match=r"`fit`.*wide.*tight.*'loose'"):
        Rational("loose")


@pytest.mark.parametrize(
    "name, function", [("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu), ("tanh", torch.tanh)]
)
def test_get_fixed_activation(name, function):
    x = torch.linspace(-3, 3, 31)
    activation = get_activation(name)
    torch.testing.assert_close(activation(x), function(x))
    assert not list(activation.parameters())


def test_get_activation_makes_a_new_rational_each_time():
    first, second = get_activation("rational"), get_activation("rational")
    assert isinstance(first, Rational) and first.numerator is not second.numerator


def test_unknown_activation_lists_those_allowed():
    with pytest.raises(ValueError, match="swish") as error:
        get_activation("swish")
    assert all(name in str(error.value) for name in ACTIVATIONS)
