# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from peft_instance_prompt.nn.straight_through import (
    SamplingSwitch,
    attach_position_gradient,
    length_gate,
    straight_through_choice,
)


ORDERS = ("paper", "dpt")


def arrange(prompts, tokens, start: int, end: int, j: int, order: str, used: int) -> torch.Tensor:
    """Candidate j of one row, from slices: the first `used` prompts at their places, and zeros behind everything."""
    l = len(prompts)
    place = list(range(l))
    before, behind = (place[: l - j], place[l - j :]) if order == "paper" else (place[j:], place[:j])
    if start == end:  # both stand before the same token
        before, behind = place, []
    before, behind = ([k for k in part if k < used] for part in (before, behind))
    rest = torch.zeros_like(prompts[used:])
    return torch.cat([tokens[:start], prompts[before], tokens[start:end], prompts[behind], tokens[end:], rest])


def all_candidates(prompts, tokens, start, end, order, used=None) -> torch.Tensor:
    """(B, l + 1, S + l, d)"""
    used = torch.full_like(start, prompts.shape[1]) if used is None else used
    return torch.stack(
        [
            torch.stack([arrange(p, x, s, e, j, order, u) for j in range(len(p) + 1)])
            for p, x, s, e, u in zip(prompts, tokens, start.tolist(), end.tolist(), used.tolist())
        ]
    )


def make_case(S, l, start, end, d=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    B = len(start)
    prompts = torch.randn(B, l, d, dtype=dtype, generator=generator, requires_grad=True)
    tokens = torch.randn(B, S, d, dtype=dtype, generator=generator, requires_grad=True)
    index = torch.randint(l + 1, (B,), generator=generator)
    weights = F.one_hot(index, l + 1).to(dtype).requires_grad_()
    return prompts, tokens, torch.tensor(start), torch.tensor(end), index, weights


# S, l, start, end: text everywhere in the row, empty text, one prompt, more prompts than tokens, several blocks.
CASES = [
    (9, 4, [0, 2, 0, 3, 9, 0, 5], [9, 9, 5, 7, 9, 0, 5]),
    (6, 1, [0, 2, 6], [6, 5, 6]),
    (3, 5, [0, 1, 3], [3, 2, 3]),
    (40, 3, [0, 5, 31, 38], [40, 37, 33, 40]),
    (70, 35, [0, 11, 69], [70, 60, 70]),
    (1, 2, [0, 1], [1, 1]),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_position_gradient_matches_the_sum_over_all_candidates(case, order):
    prompts, tokens, start, end, index, weights = make_case(*case)
    candidates = all_candidates(prompts, tokens, start, end, order)
    out = candidates[torch.arange(len(index)), index]
    target = torch.randn_like(out)

    got = attach_position_gradient(out, weights, prompts, tokens, start, end, order)
    assert torch.equal(got, out) and got.dtype == out.dtype
    want = (weights[..., None, None] * candidates).sum(1)
    inputs = (weights, prompts, tokens)
    for g, w in zip(
        torch.autograd.grad((got - target).pow(3).sum(), inputs, retain_graph=True),
        torch.autograd.grad((want - target).pow(3).sum(), inputs),
    ):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_position_gradient_where_prompts_are_not_used(case, order):
    """For each number of prompts in use: the rest is in no arrangement, whatever it holds, and at 0 all arrangements are alike."""
    prompts, tokens, start, end, index, weights = make_case(*case)
    l = prompts.shape[1]
    for first in range(l + 1):
        used = (first + torch.arange(len(start))) % (l + 1)
        candidates = all_candidates(prompts, tokens, start, end, order, used)
        out = candidates[torch.arange(len(index)), index]
        target = torch.randn_like(out)
        unused = torch.arange(l) >= used[:, None]
        filled = prompts.masked_fill(unused[..., None], 1e6)
        got = attach_position_gradient(out, weights, filled, tokens, start, end, order, used)
        want = (weights[..., None, None] * candidates).sum(1)
        (g,) = torch.autograd.grad((got - target).pow(3).sum(), weights, retain_graph=True)
        (w,) = torch.autograd.grad((want - target).pow(3).sum(), weights, retain_graph=True)
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-8)
        assert torch.equal(g[used == 0], g[used == 0][:, :1].expand(-1, l + 1))


def test_forward_copies_nothing_and_is_exact_in_half_precision():
    prompts, tokens, start, end, _, weights = make_case(*CASES[0])
    out = all_candidates(prompts, tokens, start, end, "paper")[:, 0].detach().bfloat16().requires_grad_()
    got = attach_position_gradient(out, weights.float(), prompts, tokens, start, end)
    assert got.data_ptr() == out.data_ptr() and got.dtype == torch.bfloat16
    upstream = torch.randn_like(got)
    assert torch.equal(torch.autograd.grad(got, out, upstream)[0], upstream)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_half_precision_gradient_is_summed_in_float32(dtype, order):
    # Activations of 300 against gradients of 300 leave float16's range in the first product.
    prompts, tokens, start, end, _, weights = make_case(*CASES[3])
    prompts, tokens = (300 * prompts).detach().to(dtype), (300 * tokens).detach().to(dtype)
    candidates = all_candidates(prompts, tokens, start, end, order)
    upstream = (300 * torch.randn(candidates[:, 0].shape, dtype=torch.float64)).to(dtype)
    weights = weights.detach().float().requires_grad_()
    out = attach_position_gradient(candidates[:, 0], weights, prompts, tokens, start, end, order)
    (got,) = torch.autograd.grad(out, weights, upstream)
    want = (upstream[:, None].double() * candidates.double()).sum((-2, -1))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("S, l, d", [(1500, 20, 64), (300, 100, 64)])
def test_memory_grows_with_the_sequence_only(S, l, d):
    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out

    prompts, tokens, start, end, _, weights = make_case(S, l, [3], [S - 2], d=d, dtype=torch.float32)
    out = all_candidates(prompts, tokens, start, end, "paper")[:, 0].detach()
    with Recorder():
        attach_position_gradient(out, weights, prompts, tokens, start, end).square().sum().backward()
    assert len(sizes) > 20  # it has seen backward
    assert max(sizes) < ((l + 1) * S * d / 4)


def test_no_score_is_computed_for_weights_without_gradient(monkeypatch):
    from peft_instance_prompt.nn import straight_through

    monkeypatch.setattr(straight_through, "_candidate_scores", None)
    prompts, tokens, start, end, _, weights = make_case(*CASES[0])
    out = all_candidates(prompts, tokens, start, end, "paper")[:, 0]
    attach_position_gradient(out, weights.detach(), prompts, tokens, start, end).sum().backward()
    assert prompts.grad is not None


def test_bad_order_and_shapes():
    prompts, tokens, start, end, _, weights = make_case(*CASES[0])
    out = torch.randn(7, 13, 3)
    with pytest.raises(ValueError, match=r"`order`.*paper.*dpt.*'front'"):
        attach_position_gradient(out, weights, prompts, tokens, start, end, "front")
    with pytest.raises(ValueError, match=r"`out`.*\(7, 13, 3\).*got \(7, 12, 3\)"):
        attach_position_gradient(out[:, 1:], weights, prompts, tokens, start, end)
    with pytest.raises(ValueError, match=r"`weights`.*\(7, 5\).*got \(7, 4\)"):
        attach_position_gradient(out, weights[:, 1:], prompts, tokens, start, end)
    with pytest.raises(ValueError, match=r"`end`.*\(7,\).*got \(6,\)"):
        attach_position_gradient(out, weights, prompts, tokens, start, end[1:])
    with pytest.raises(ValueError, match=r"`used`.*\(7,\).*got \(7, 1\)"):
        attach_position_gradient(out, weights, prompts, tokens, start, end, used=end[:, None])


@pytest.mark.parametrize("l", [1, 4, 20])
def test_length_gate_matches_the_sum_over_all_candidates(l):
    torch.manual_seed(0)
    length = torch.arange(l + 1)  # a row per candidate
    weights = F.one_hot(length, l + 1).double().requires_grad_()
    prompts = torch.randn(l + 1, l, 3, dtype=torch.float64, requires_grad=True)
    gate = length_gate(weights)
    assert gate.shape == (l + 1, l) and gate.dtype == weights.dtype
    got = gate[..., None] * prompts
    # candidates[b, i] is the prompt of row b with all but the first i vectors zero
    candidates = torch.stack(
        [torch.cat([prompts[:, :i], torch.zeros_like(prompts[:, i:])], dim=1) for i in range(l + 1)], dim=1
    )
    want = (weights[..., None, None] * candidates).sum(1)
    assert torch.equal(got, want)
    for g, w in zip(
        torch.autograd.grad((got - 1).pow(3).sum(), (weights, prompts)),
        torch.autograd.grad((want - 1).pow(3).sum(), (weights, prompts)),
    ):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_choice_without_noise(temperature, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(2000, 21)).to(dtype).requires_grad_()
    index, weights = straight_through_choice(logits, temperature, noise=False)
    assert torch.equal(index, logits.float().argmax(-1))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(weights, F.one_hot(index, 21).to(wide)) and weights.dtype == wide
    upstream = torch.randn_like(weights)
    (want,) = torch.autograd.grad((logits.to(wide) / temperature).softmax(-1), logits, upstream)
    torch.testing.assert_close(torch.autograd.grad(weights, logits, upstream)[0], want)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_choice_with_noise_samples_from_the_softmax_of_the_logits(temperature):
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    index, weights = straight_through_choice(logits.expand(200_000, 4), temperature, noise=True)
    assert torch.equal(weights, F.one_hot(index, 4).float())
    # The temperature shapes the gradient, not the frequencies; standard error 1e-3.
    torch.testing.assert_close(weights.mean(0), logits.softmax(0), rtol=0, atol=5e-3)


def test_gradient_with_noise_is_that_of_gumbel_softmax():
    logits = torch.randn(50, 6, requires_grad=True)
    upstream = torch.randn(50, 6)
    torch.manual_seed(3)
    index, weights = straight_through_choice(logits, 0.7, noise=True)
    torch.manual_seed(3)
    soft = F.gumbel_softmax(logits, tau=0.7)
    assert torch.equal(index, soft.argmax(-1)) and not torch.equal(index, logits.argmax(-1))
    torch.testing.assert_close(
        torch.autograd.grad(weights, logits, upstream), torch.autograd.grad(soft, logits, upstream)
    )


def test_noise_differs_between_rows():
    assert len(straight_through_choice(torch.zeros(100, 8), 1.0, noise=True)[0].unique()) > 4


def test_sampling_goes_off_with_evaluation_and_with_dropout():
    plain, always = SamplingSwitch(), SamplingSwitch(in_evaluation=True)
    assert isinstance(plain, torch.nn.Dropout)
    assert plain.on and always.on
    assert not plain.eval().on and always.eval().on
    plain.train().p = always.p = 0  # what TRL's `disable_dropout` does
    assert not plain.on and not always.on


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match=f"`temperature`.*above 0.*{temperature}"):
        straight_through_choice(torch.zeros(2, 3), temperature, noise=False)
