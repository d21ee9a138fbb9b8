# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from peft_instance_prompt.nn.pooling import (
    adaptive_avg_pool,
    adaptive_max_pool,
    attention_pool,
    first_index,
    first_token,
    last_index,
    last_token,
    mean_attention,
    mean_pool,
    rms,
    rms_norm,
)


# Rows of 11 tokens: all, padded left, padded right, with holes, fewer than the outputs, one, none.
KEPT = [range(11), range(4, 11), range(6), (1, 2, 5, 7, 10), (3, 4), (8,), ()]
B, S, D = len(KEPT), 11, 3


def make_mask() -> torch.Tensor:
    mask = torch.zeros(B, S, dtype=torch.bool)
    for row, kept in zip(mask, KEPT):
        row[list(kept)] = True
    return mask


def make_states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)


def softmax_pool_row(values, scores):
    return scores.softmax(0).T @ values


def by_row(function, length, *tensors):
    """Apply `function` to the kept tokens of each row; zeros for an empty row."""
    return torch.stack(
        [
            function(*(t[b, list(kept)] for t in tensors)) if len(kept) else torch.zeros(length, tensors[0].shape[-1])
            for b, kept in enumerate(KEPT)
        ]
    )


def adaptive(kind, length):
    pool = {"avg": torch.nn.AdaptiveAvgPool1d, "max": torch.nn.AdaptiveMaxPool1d}[kind](length)
    return lambda x: pool(x.T[None])[0].T


def self_attention(states, scores, mask):
    """With two of the scores as queries and two as keys, the states as values."""
    shares = mean_attention(scores[..., :2], scores[..., 2:], mask)[:, None]  # (B, 1, S)
    return (shares @ states.masked_fill(~mask[..., None], 0.0).to(shares)).to(states.dtype)


def self_attention_row(states, scores):
    outputs = []
    for query in scores[:, :2]:
        shares = torch.exp(scores[:, 2:] @ query / 2**0.5)
        outputs.append((shares / shares.sum()) @ states)
    return torch.stack(outputs).mean(0, keepdim=True)


# name: (the function under test on (states, scores, mask), the reference on one row's kept tokens, outputs per row)
POOLS = {
    "attention": (attention_pool, softmax_pool_row, 4),
    "self-attention": (self_attention, self_attention_row, 1),
    "mean": (lambda x, s, m: mean_pool(x, m)[:, None], lambda x, s: x.mean(0, keepdim=True), 1),
}
for n in (1, 2, 4, 5, 11, 13):
    POOLS[f"avg{n}"] = (lambda x, s, m, n=n: adaptive_avg_pool(x, m, n), lambda x, s, n=n: adaptive("avg", n)(x), n)
    POOLS[f"max{n}"] = (lambda x, s, m, n=n: adaptive_max_pool(x, m, n), lambda x, s, n=n: adaptive("max", n)(x), n)


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("ties", [False, True])
def test_pool_matches_a_loop_over_rows(name, ties):
    pool, reference, length = POOLS[name]
    states, scores = make_states(B, S, D), make_states(B, S, 4)
    if ties:
        states = states.detach().round().requires_grad_()
    got, want = pool(states, scores, make_mask()), by_row(reference, length, states, scores)
    assert got.shape == (B, length, D)
    torch.testing.assert_close(got, want.to(got), rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    for g, w in zip(
        torch.autograd.grad(got, (states, scores), upstream, materialize_grads=True, allow_unused=True),
        torch.autograd.grad(want, (states, scores), upstream, materialize_grads=True, allow_unused=True),
    ):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("name", POOLS)
def test_dropped_tokens_never_reach_value_or_gradient(name, garbage):
    pool, _, _ = POOLS[name]
    mask = make_mask()
    clean = make_states(B, S, D), make_states(B, S, 4)
    dirty = [t.detach().masked_fill(~mask[..., None], garbage).requires_grad_() for t in clean]
    want, got = pool(*clean, mask), pool(*dirty, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    got.square().sum().backward()
    want.square().sum().backward()
    for d, c in zip(dirty, clean):
        if c.grad is not None:
            torch.testing.assert_close(d.grad, c.grad, rtol=0, atol=0)
            assert d.grad.isfinite().all() and not d.grad[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", POOLS)
def test_half_precision_runs_in_float32(name, dtype):
    # A plain float16 sum over these overflows, and bfloat16 running sums lose digits.
    pool, _, _ = POOLS[name]
    states = (make_states(B, S, D).detach() * 50 + 60000 / 2).to(dtype)
    scores = make_states(B, S, 4).detach()
    got = pool(states, scores.float(), make_mask())
    assert got.dtype == dtype
    want = pool(states.double(), scores.float().double(), make_mask()).to(dtype)
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0)


def test_attention_softmax_is_in_float32_when_the_scores_are_half():
    scores = make_states(B, S, 4).detach().bfloat16()
    values = make_states(B, S, D).detach().float()
    got = attention_pool(values, scores, make_mask())
    want = attention_pool(values.double(), scores.double(), make_mask())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_first_and_last():
    mask, states = make_mask(), make_states(B, S, D)
    first, last = [min(k, default=0) for k in KEPT], [max(k, default=0) for k in KEPT]
    assert first_index(mask).tolist() == first and last_index(mask).tolist() == last
    rows = list(range(B))
    torch.testing.assert_close(first_token(states, mask), states[rows, first], rtol=0, atol=0)
    torch.testing.assert_close(last_token(states, mask), states[rows, last], rtol=0, atol=0)
    upstream = torch.randn(B, D, dtype=states.dtype)
    want = torch.zeros_like(states)
    want[rows, last] = upstream
    torch.testing.assert_close(torch.autograd.grad(last_token(states, mask), states, upstream)[0], want)


def test_max_pool_keeps_no_copy_of_the_states_for_backward():
    saved = []
    states, mask = torch.randn(2, 64, 32, requires_grad=True), torch.ones(2, 64, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adaptive_max_pool(states, mask, 5)
    assert max(t.numel() for t in saved if t.data_ptr() != states.data_ptr()) <= 2 * 5 * 32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rms(dtype):
    # Squares of 3e4 overflow float16; a zero vector must give a finite gradient.
    states = torch.tensor([[1.0, -2.0, 3.0], [3e4, 1e4, -3e4], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    wide = states.detach().double()
    want = (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    got, normed = rms(states), rms_norm(states)
    assert got.dtype == normed.dtype == dtype
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(got, want.to(dtype), **tolerance)
    torch.testing.assert_close(normed, (wide / want).to(dtype), **tolerance)
    torch.testing.assert_close(rms(states, eps=4.0)[2], torch.tensor([2.0], dtype=dtype))
    normed.sum().backward()
    assert states.grad.isfinite().all()


@pytest.mark.parametrize("pool", [adaptive_avg_pool, adaptive_max_pool])
def test_bad_length(pool):
    with pytest.raises(ValueError, match=r"`length`.*at least 1.*got 0"):
        pool(make_states(B, S, D), make_mask(), 0)


@pytest.mark.parametrize(
    "pool",
    [
        mean_pool,
        first_token,
        last_token,
        lambda x, m: attention_pool(x, x, m),
        lambda x, m: mean_attention(x, x, m),
    ],
)
def test_bad_mask(pool):
    states = make_states(B, S, D)
    with pytest.raises(ValueError, match=r"`mask`.*bool.*int64"):
        pool(states, make_mask().long())
    with pytest.raises(ValueError, match=r"`mask`.*\(7, 11\).*\(7, 10\)"):
        pool(states, make_mask()[:, 1:])


@pytest.mark.parametrize("index", [first_index, last_index])
def test_index_of_bad_mask(index):
    with pytest.raises(ValueError, match=r"`mask`.*bool.*int64"):
        index(make_mask().long())


def test_shares_sum_to_one_over_the_kept_tokens():
    mask = make_mask()
    shares = mean_attention(make_states(B, S, 4), make_states(B, S, 4), mask)
    torch.testing.assert_close(shares.sum(dim=1), mask.any(dim=1).to(shares))
    assert not shares[~mask].any()


def test_attention_pool_names_scores_of_another_length():
    with pytest.raises(ValueError, match=r"`mask`.*`scores`"):
        attention_pool(make_states(B, S, D), make_states(B, S - 1, 4), make_mask())
