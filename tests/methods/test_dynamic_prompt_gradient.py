# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The gradients of dynamic prompting are those of the sum over all arrangements that forward could build, written out here."""

from __future__ import annotations

import pytest
import torch
from dynamic_prompts import ORDERS, L, choose, dynamic, labels_for
from peft import PeftModel
from tiny import assert_same, batch, encoder, generator_of
from torch.nn import functional as F


class Draws:
    """The Gumbel noise of one forward pass after a seed, in the order in which choices are made."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return -torch.empty(*shape).exponential_().log()


def places(u: int, j: int, start: int, end: int, S: int, order: str, unused_first: bool) -> list[tuple[str, int]]:
    """What stands at each place if only the first u vectors are used, and the choice of position is j: in the order "paper" the
    slots from l - j on stand behind the instance, in "dpt" the first j. The unused ones stand at an edge of the row."""
    used = [("slot", k) for k in range(u)]
    cut = min(L - j, u) if order == "paper" else min(j, u)
    front, behind = (used[:cut], used[cut:]) if order == "paper" else (used[cut:], used[:cut])
    tokens = [("token", t) for t in range(S)]
    unused = [("slot", k) for k in range(u, L)]
    row = [*tokens[:start], *front, *tokens[start:end], *behind, *tokens[end:]]
    return unused + row if unused_first else row + unused


def explicit_sum(
    model: PeftModel,
    embeds: torch.Tensor,
    vector: torch.Tensor | None,
    seed: int,
    start: int,
    end: int,
    tasks: torch.Tensor | None = None,
):
    """For each row the sum `sum_j w_j C_j` (N, e) of all arrangements, and the chosen one's `places`."""
    generator, config = generator_of(model), generator_of(model).config
    B, S = embeds.shape[:2]
    draw = Draws(seed)

    def logits(name: str) -> torch.Tensor:
        if name in generator.heads:
            return generator.heads[name](vector)
        own = generator.logits[name]
        return own.expand(B, -1) if tasks is None else torch.stack([own[int(task)] for task in tasks])

    def straight_through(name: str) -> torch.Tensor:
        soft = (logits(name) + draw(B, L + 1)).softmax(dim=-1)
        return F.one_hot(soft.argmax(dim=-1), L + 1) + soft - soft.detach()

    w = straight_through("position")
    v = straight_through("length") if config.length != "off" else F.one_hot(torch.full((B,), L), L + 1).float()
    pool = generator.prompts.view(-1, L, embeds.shape[-1])  # (k, l, e)
    mixture = logits("representation").softmax(-1) if config.representation != "off" else torch.ones(B, 1)
    prompts = torch.einsum("bk,kle->ble", mixture, pool)
    if config.init_weights is True:
        first = embeds[:, :1]
        prompts = -first + first.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() * prompts
    kept = (torch.arange(L + 1)[:, None] > torch.arange(L)).float()  # (l + 1, l): length i keeps the first i
    prompts = prompts * (v @ kept)[:, :, None]
    rows, chosen = [], []
    for b in range(B):
        u = int(v[b].argmax())
        total = 0.0
        for j in range(L + 1):
            at = places(u, j, start, end, S, config.order, unused_first=generator.causal)
            C = torch.stack([prompts[b, i] if kind == "slot" else embeds[b, i] for kind, i in at])  # (N, e)
            total = total + w[b, j] * C
        rows.append(total)
        chosen.append((u, places(u, int(w[b].argmax()), start, end, S, config.order, unused_first=generator.causal)))
    return rows, chosen


def run_alone(model: PeftModel, row: torch.Tensor, u: int, at: list) -> torch.Tensor:
    """The base model's output (N, .) for one row of embeddings in which the unused slots are masked."""
    seen = torch.tensor([kind == "token" or i < u for kind, i in at])  # (N,)
    with model.disable_adapter():
        return model.get_base_model()(
            inputs_embeds=row[None],
            attention_mask=seen[None].long(),
            position_ids=(seen.cumsum(0) - 1).clamp(min=0)[None],
        )[0][0]


def assert_same_gradients(model: PeftModel, actual: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    model.zero_grad()
    expected.backward()
    for name, p in generator_of(model).named_parameters():
        scale = max(float(p.grad.abs().max()), 1e-6)
        assert_same(actual[name] / scale, p.grad / scale, 2e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", ["off", "task", "instance"])
@pytest.mark.parametrize("form", [True, "paper"])
def test_causal_model(order: str, length: str, form) -> None:
    """Each row has another length; the first token of the response is predicted at the last used vector behind, if there is one."""
    model = dynamic(position="instance", length=length, order=order, representation="instance", init_weights=form)
    model.train()
    ids, n = batch(9, 9, 9, 9)["input_ids"], 6
    torch.manual_seed(3)
    loss = model(ids, labels=labels_for(ids, n)).loss
    loss.backward()
    actual = {name: p.grad.clone() for name, p in generator_of(model).named_parameters()}

    base = model.get_base_model()
    embeds = base.model.embed_tokens(ids).detach()
    with torch.no_grad(), model.disable_adapter():
        vector = base.model(ids).last_hidden_state[:, :n].mean(dim=1)  # (B, d)
        vector = vector / vector.pow(2).sum(-1, keepdim=True).sqrt() if form is True else vector
    losses, lengths = [], set()
    for b, (row, (u, at)) in enumerate(zip(*explicit_sum(model, embeds, vector, 3, 1, n))):
        out = run_alone(model, row, u, at)
        read = [at.index(("token", t)) for t in range(n, 8)]
        last = at.index(("token", n)) - 1  # the last instruction token, or the last slot behind it
        losses.append(F.cross_entropy(out[[last, *read]], ids[b, n:]))
        lengths.add(u)
    assert length == "off" or len(lengths) > 1
    expected = torch.stack(losses).mean()
    assert_same(loss, expected)
    assert actual["heads.position.weight"].abs().max() > 0
    assert_same_gradients(model, actual, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", ["task", "instance"])
def test_encoder(order: str, length: str) -> None:
    """Slots behind stand before the end token, and unused ones at the end of the row."""
    fields = {"task_type": None, "position": "task", "length": length, "order": order, "init_weights": "paper"}
    model = dynamic(base=encoder("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), **fields).train()
    ids = batch(7, 7, 7, 7)["input_ids"]
    aim = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(1)) / 30  # 896 terms, of which most cancel
    torch.manual_seed(5)
    loss = (model(ids).last_hidden_state * aim).sum()
    loss.backward()
    actual = {name: p.grad.clone() for name, p in generator_of(model).named_parameters()}

    base = model.get_base_model()
    embeds = base.get_input_embeddings()(ids).detach()
    with torch.no_grad(), model.disable_adapter():
        vector = base(ids).last_hidden_state.mean(dim=1)  # (B, d)
    expected, lengths = 0.0, set()
    for b, (row, (u, at)) in enumerate(zip(*explicit_sum(model, embeds, vector, 5, 1, 6))):
        states = run_alone(model, row, u, at)[[at.index(("token", t)) for t in range(7)]]  # (S, d)
        expected = expected + (states * aim[b]).sum()
        lengths.add(u)
    assert len(lengths) > 1
    assert_same(loss, expected)
    assert actual["logits.position"].abs().max() > 0
    assert_same_gradients(model, actual, expected)


@pytest.mark.parametrize("order", ORDERS)
def test_position_has_no_gradient_where_no_vector_is_used(order: str) -> None:
    """All arrangements are the same then; with vectors there is one."""
    ids = batch(9, 9)["input_ids"]
    for length in (0, 2):
        model = choose(dynamic(position="task", length="task", order=order), length=length)
        generator = generator_of(model.train())
        generator.sampling.p = 0.0
        model(ids, labels=labels_for(ids, 6)).loss.backward()
        # The weights' gradients are alike then, and a softmax passes on differences only, but for rounding.
        assert (generator.logits["position"].grad.abs().max() > 1e-4) == (length > 0)
