# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from peft_instance_prompt.nn.phm import PHMLinear, kron_sum


def explicit_matrix(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return sum(torch.kron(a, b) for a, b in zip(A, B))


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for p in torch.nn.ModuleList(modules).parameters())


@pytest.mark.parametrize("n, p, q, r, s", [(3, 3, 2, 3, 5), (2, 4, 1, 3, 2), (1, 1, 4, 1, 6)])
def test_kron_sum(n, p, q, r, s):
    A, B = torch.randn(n, p, r), torch.randn(n, q, s)
    torch.testing.assert_close(kron_sum(A, B), explicit_matrix(A, B))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
@pytest.mark.parametrize("sizes", [(12, 20, 4), (20, 12, 4), (6, 6, 3), (4, 24, 4), (24, 4, 4), (5, 7, 1)])
def test_value_and_gradients_match_torch_kron(sizes, lead, bias):
    torch.manual_seed(0)
    layer = PHMLinear(*sizes, bias=bias).double()
    x = torch.randn(*lead, sizes[0], dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    got, want = layer(x), x @ explicit_matrix(layer.A, layer.B) + (layer.bias if bias else 0)
    assert got.shape == (*lead, sizes[1])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("sizes", [(1024, 256, 16), (256, 1024, 16)])
def test_never_builds_the_matrix(sizes):
    largest = 0

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    layer = PHMLinear(*sizes)
    x = torch.randn(2, sizes[0])
    with Recorder():
        layer(x).sum().backward()
    # The largest is B (or its gradient) or the n times narrower side, for the 2 rows.
    assert largest <= max(layer.B.numel(), 2 * 16 * min(sizes[:2])) < sizes[0] * sizes[1] / 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_float32_weights(dtype):
    layer, x = PHMLinear(32, 48), torch.randn(3, 32).to(dtype)
    got = layer(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, layer(x.float()).to(dtype), rtol=0, atol=0)
    layer.to(dtype)
    assert layer(x).dtype == dtype and layer(x.float()).dtype == torch.float32


def test_parameter_counts_of_idpg_generators():
    # d = 1024, 24 depths, 5 prompt tokens; M-IDPG has an output bias per depth, which its generator holds.
    down, up = PHMLinear(1024, 16), PHMLinear(16, 5 * 1024, bias=False)
    assert count(down) == 1024 + 4096 + 16 and count(up) == 5120 + 4096
    assert count(down, up) + 24 * 5120 == 137_232
    assert count(PHMLinear(300, 16, n=4), PHMLinear(16, 5 * 1024, n=4, bias=False)) + 24 * 5120 == 144_704
    first = PHMLinear(1024, 256)
    assert count(first, PHMLinear(256, 5 * 1024, share_A_with=first)) == 107_776


def test_shared_A_gets_both_gradients_and_is_reset_by_its_owner_only():
    torch.manual_seed(0)
    first = PHMLinear(8, 8, n=4)
    second = PHMLinear(8, 12, n=4, share_A_with=first)
    assert "A" not in second.state_dict() and "A" not in dict(second.named_parameters())
    A = first.A.detach().clone()
    second.reset_parameters()
    assert torch.equal(first.A, A)
    first.reset_parameters()
    assert not torch.equal(first.A, A)
    x = torch.randn(3, 8)
    want = torch.autograd.grad(
        ((x @ explicit_matrix(first.A, first.B) + first.bias) @ explicit_matrix(first.A, second.B)).sum(), first.A
    )
    torch.testing.assert_close(torch.autograd.grad(second(first(x)).sum(), first.A), want)


def test_initialisation():
    torch.manual_seed(0)
    layer = PHMLinear(1600, 1600, n=40, bias_std=0.02)
    for tensor, std in ((layer.A, 0.05), (layer.B, 0.05), (layer.bias, 0.02)):
        torch.testing.assert_close(tensor.std().item(), std, rtol=0.05, atol=0)
        assert abs(tensor.mean().item()) < std / 10


@pytest.mark.parametrize("sizes", [(8, 12, 4), (12, 8, 4)])
def test_vmap_with_weights_per_row(sizes):
    torch.manual_seed(0)
    rows = [PHMLinear(*sizes) for _ in range(3)]
    params, _ = stack_module_state(rows)
    x = torch.randn(3, sizes[0])

    def run(p, row):
        return functional_call(rows[0], p, (row[None],))[0]

    torch.testing.assert_close(vmap(run)(params, x), torch.stack([m(row) for m, row in zip(rows, x)]))
    grads = vmap(grad(lambda p, row: run(p, row).square().sum()))(params, x)
    for b, row in enumerate(rows):
        want = torch.autograd.grad(row(x[b]).square().sum(), list(row.parameters()))
        torch.testing.assert_close([grads[name][b] for name, _ in row.named_parameters()], list(want))


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"`n`.*12.*18.*got 4.*\[1, 2, 3, 6\]"):
        PHMLinear(12, 18, n=4)
    with pytest.raises(ValueError, match=r"`out_features`.*at least 1.*got 0"):
        PHMLinear(12, 0, n=4)
    with pytest.raises(ValueError, match=r"`n`.*at least 1.*got 0"):
        PHMLinear(12, 12, n=0)
    with pytest.raises(ValueError, match=r"`share_A_with`.*n=2.*n=4"):
        PHMLinear(8, 8, n=2, share_A_with=PHMLinear(8, 8, n=4))
    with pytest.raises(ValueError, match=r"`x`.*in_features=8.*got 4"):
        PHMLinear(8, 8, n=4)(torch.ones(2, 4))
