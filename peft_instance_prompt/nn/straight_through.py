# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""
Straight-through choices of Dynamic Prompting (https://arxiv.org/abs/2303.02909): the position and the length of a row's
prompt. Forward takes one candidate per row. Backward gives each candidate's weight its gradient in the sum
`sum_j weights[:, j] * C_j` over all candidates C_j, without building the candidates.

Shapes: B rows, S tokens, d features, l prompt vectors, hence l + 1 candidates for each choice.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from .pooling import at_least_float32


class SamplingSwitch(nn.Dropout):
    """
    Whether choices are sampled: `on` if `p` is above 0 and the module is in training mode, or `in_evaluation` is set.

    It is a `torch.nn.Dropout`, so that sampling is switched off with dropout: a trainer that sets `p = 0`, so that a text
    has the same probability in each pass, must not get a different choice in each pass.

    Args:
        in_evaluation (`bool`): Whether it is on in evaluation mode, too. Defaults to False.
    """

    def __init__(self, in_evaluation: bool = False) -> None:
        super().__init__(p=1.0)
        self.in_evaluation = in_evaluation

    @property
    def on(self) -> bool:
        return self.p > 0 and (self.training or self.in_evaluation)


def straight_through_choice(
    logits: torch.Tensor, temperature: float, noise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Choose one of K candidates per row by the straight-through Gumbel-softmax (https://arxiv.org/abs/1611.01144).

    Args:
        logits (`torch.Tensor` of shape `(B, K)`): Finite scores of the candidates.
        temperature (`float`): Divides the logits, above 0. Without noise it changes the gradient only.
        noise (`bool`): Whether to add Gumbel noise, which samples from `softmax(logits)`. If False, take the largest logit.

    Returns:
        `tuple` of the chosen index, int64 of shape `(B,)`, and the weights of shape `(B, K)`: exactly one-hot in value,
        with the gradient of the softmax. The weights are float32 at least, even for logits in half precision, since their
        gradients are sums over whole sequences.

    Raises:
        ValueError: If `temperature` is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    scores = at_least_float32(logits)
    if noise:
        scores = scores - torch.empty_like(scores).exponential_().log()  # -log of an exponential is Gumbel(0, 1)
    soft = (scores / temperature).softmax(dim=-1)
    index = soft.argmax(dim=-1)  # (B,)
    hard = torch.arange(logits.shape[-1], device=logits.device) == index.unsqueeze(-1)  # (B, K)
    # The bracket is exactly 0, so the value is one-hot without rounding.
    return index, hard + (soft - soft.detach())


def length_gate(weights: torch.Tensor) -> torch.Tensor:
    """
    Gates of the prompt vectors for a choice of length. Candidate i keeps the first i prompts, so the gate of prompt k is
    `sum_{i > k} weights[:, i]`. Multiply the prompts by it, and also hide the dropped ones from attention. The gradient is
    that of the sum over candidates in which the dropped prompts are zeros.

    Args:
        weights (`torch.Tensor` of shape `(B, l + 1)`): One-hot over the lengths 0 to l, see [`straight_through_choice`].

    Returns:
        `torch.Tensor` of shape `(B, l)`: 1 for the kept prompts and 0 for the others, in the dtype of `weights`.
    """
    return weights[..., 1:].flip(-1).cumsum(dim=-1).flip(-1)  # (B, l)


def attach_position_gradient(
    out: torch.Tensor,
    weights: torch.Tensor,
    prompts: torch.Tensor,
    tokens: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    order: Literal["paper", "dpt"] = "paper",
    used: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Attach the gradient of a discrete choice of position to its weights. The instance text is the tokens `start` to
    `end - 1`. Candidate j puts j of a row's l prompts P behind it, and the rest before it:

    - `order="paper"`: `P[:l - j]` directly before token `start`, `P[l - j:]` directly before token `end`,
    - `order="dpt"` (the released code): `P[j:]` directly before token `start`, `P[:j]` directly before token `end`,

    All tokens keep their order. If the text is empty, all prompts stand before the same token, in their own order. If a row
    uses only its first u prompts, the arrangement leaves out the others, and l - u positions that attention does not see stand
    behind it.

    With `C_j` the arrangement of candidate j, backward gives `weights[b, j]` the gradient `<grad_out[b], C_j[b]>`. It includes
    the terms of tokens outside the text, which are the same for each j. The gradient of `out` passes unchanged. Prompts and
    tokens get no gradient here; they have theirs through `out`.

    Args:
        out (`torch.Tensor` of shape `(B, S + l, d)`): The arrangement of the chosen candidates.
        weights (`torch.Tensor` of shape `(B, l + 1)`): One-hot over j, see [`straight_through_choice`].
        prompts (`torch.Tensor` of shape `(B, l, d)`): P.
        tokens (`torch.Tensor` of shape `(B, S, d)`): The sequence without prompts.
        start (`torch.Tensor` of shape `(B,)`): int64, the text's first token; `0 <= start <= end`.
        end (`torch.Tensor` of shape `(B,)`): int64, one behind the text's last token; `end <= S`.
        order (`str`, *optional*, defaults to `"paper"`): `"paper"` or `"dpt"`.
        used (`torch.Tensor` of shape `(B,)`, *optional*): int64, the number u of prompts that each row uses. Default: l.

    Returns:
        `torch.Tensor` of shape `(B, S + l, d)`: a view of `out`. The gradient of `weights` is computed in float32 at least, in
        memory of about two sequences, not of l + 1.

    Raises:
        ValueError: If `order` is unknown or a shape does not fit `prompts` and `tokens`.
    """
    if order not in ("paper", "dpt"):
        raise ValueError(f'`order` must be "paper" or "dpt", got {order!r}.')
    (B, S, d), l = tokens.shape, prompts.shape[-2]
    used = torch.full_like(start, l) if used is None else used  # (B,)
    for name, tensor, shape in (
        ("prompts", prompts, (B, l, d)),
        ("out", out, (B, S + l, d)),
        ("weights", weights, (B, l + 1)),
        ("start", start, (B,)),
        ("end", end, (B,)),
        ("used", used, (B,)),
    ):
        if tensor.shape != shape:
            raise ValueError(
                f"`{name}` must have shape {shape} for `tokens` of shape {(B, S, d)} and l={l} prompts, "
                f"got {tuple(tensor.shape)}."
            )
    return _AttachPositionGradient.apply(out, weights, prompts, tokens, start, end, used, order)


class _AttachPositionGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, weights: torch.Tensor, *others: Any) -> torch.Tensor:
        *tensors, ctx.order = others
        ctx.dtype = weights.dtype
        ctx.save_for_backward(*tensors)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        scores = None
        if ctx.needs_input_grad[1]:
            prompts, tokens, start, end, used = ctx.saved_tensors
            scores = _candidate_scores(grad, prompts, tokens, start, end, used, ctx.order).to(ctx.dtype)
        return grad, scores, None, None, None, None, None, None


def _candidate_scores(
    grad: torch.Tensor,
    prompts: torch.Tensor,
    tokens: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    used: torch.Tensor,
    order: str,
) -> torch.Tensor:
    """The products `<grad[b], C_j[b]>`, (B, l + 1)."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    grad, prompts, tokens = grad.to(dtype), prompts.to(dtype), tokens.to(dtype)
    (S, d), l = tokens.shape[-2:], prompts.shape[-2]
    start, end, used = start.unsqueeze(-1), end.unsqueeze(-1), used.unsqueeze(-1)  # (B, 1) each

    # The number of used prompts behind the text.
    j = torch.arange(l + 1, device=grad.device)  # (l + 1,)
    behind = (j - (l - used)).clamp(min=0) if order == "paper" else torch.minimum(j, used)  # (B, l + 1)
    behind = behind.masked_fill(start == end, 0)

    place = torch.arange(S, device=grad.device)  # (S,)
    before = place < start  # (B, S)
    outside = (before | (place >= end)).unsqueeze(-1)  # (B, S, 1)
    # A token before the text stays in place; a token behind it moves by u: the same for each j.
    moved = _take(grad, torch.where(before, place, place + used))  # (B, S, d)
    same = (moved * tokens).masked_fill(~outside, 0.0).sum(dim=(-2, -1)).unsqueeze(-1)  # (B, 1)
    # A token of the text moves by the number of prompts before it.
    text = _shifted_products(grad, tokens.masked_fill(outside, 0.0), l).gather(-1, used - behind)  # (B, l + 1)

    # A prompt stands at one of the l places from `start` on, or at one of the l places from `end` on.
    k = torch.arange(l, device=grad.device)  # (l,)
    around = _take(grad, torch.cat((start + k, end + k), dim=-1))  # (B, 2 l, d)
    products = around @ prompts.mT  # (B, 2 l, l)
    behind, u = behind.unsqueeze(-1), used.unsqueeze(-1)  # (B, l + 1, 1), (B, 1, 1)
    if order == "paper":
        choice = torch.where(k < u - behind, k, l + k)  # (B, l + 1, l), at start + k or at end + k
    else:
        choice = torch.where(k >= behind, k - behind, l + u - behind + k)  # (B, l + 1, l)
    at_prompts = products.gather(-2, choice.clamp(max=2 * l - 1)).masked_fill(k >= u, 0.0).sum(dim=-1)  # (B, l + 1)
    return same + text + at_prompts  # (B, l + 1)


def _take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states[b, index[b, i]]`, (B, i, d)."""
    return states.gather(-2, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))  # (B, i, d)


def _shifted_products(grad: torch.Tensor, tokens: torch.Tensor, l: int) -> torch.Tensor:
    """
    The sums `sum_t <grad[b, t + a], tokens[b, t]>` for the shifts a = 0 to l, (B, l + 1).

    Multiply blocks of c tokens by the c + l places that they can reach, then sum along the diagonals: less work than all pairs
    of positions, less traffic than one pass per shift, and (c + l) / c copies of the sequence, at most about 2.
    """
    S = tokens.shape[-2]
    c = min(S, max(32, l))
    if S % c:
        padding = (0, 0, 0, -S % c)
        tokens, grad = F.pad(tokens, padding), F.pad(grad, padding)
    blocks = tokens.unflatten(-2, (-1, c))  # (B, S / c, c, d)
    reach = grad.unfold(-2, c + l, c)  # (B, S / c, d, c + l)
    products = (blocks @ reach).sum(dim=-3)  # (B, c, c + l)
    i = torch.arange(c, device=grad.device).unsqueeze(-1)  # (c, 1)
    diagonals = i + torch.arange(l + 1, device=grad.device)  # (c, l + 1)
    return products.gather(-1, diagonals.expand(grad.shape[0], -1, -1)).sum(dim=-2)  # (B, l + 1)
