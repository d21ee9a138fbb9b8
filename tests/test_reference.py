# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Hidden states against a loop over the model's own layers with the prompts concatenated, IAPT written out as in the paper."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import adapted, assert_same, batch, causal_lm, encoder

from peft_instance_prompt import IAPTConfig


FACTOR = 0.25


def iapt(
    weights: dict[str, torch.Tensor], layer: int, H: torch.Tensor, start: torch.Tensor, paper: bool
) -> torch.Tensor:
    """What is generated (l, d) for one row at one layer, from the states H (n, d) of its instruction; arXiv 2405.18203.

    `z = H W_down`, `A = softmax(z W_pool)`, `p = g(A^T z) W_up`. Not so in the paper: by default z is divided by the
    root mean square of the states, each slot has a vector that is added to what it pools, g is GELU, and the outcome is in units of the state
    that the slots start from.
    """
    W_down, W_pool, W_up = (weights[part][layer] for part in ("down", "pool", "up"))
    z = H @ W_down * (1 if paper else FACTOR)  # (n, m)
    if not paper:
        z = z / (H.pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
    A = torch.exp(z @ W_pool)  # (n, l)
    A = A / A.sum(dim=0)
    x = A.T @ z + (0 if paper else weights["slot"][layer])  # (l, m)
    if paper:
        a, b = weights["activation"][layer, 0].split([7, 5])
        powers = torch.stack([x**j for j in range(7)])  # (7, l, m)
        g = torch.einsum("j,jlm->lm", a, powers) / (1 + torch.einsum("i,ilm->lm", b, powers[1:6]).abs())
    else:
        g = x * (1 + torch.erf(x / 2**0.5)) / 2  # GELU
    p = g @ W_up  # (l, d)
    return p if paper else (start.pow(2).mean() + 1e-6).sqrt() * p


def run_layers(base, embeds: torch.Tensor, write) -> list[torch.Tensor]:
    """The hidden states (N, d) at each layer and behind the last one; `write(layer, states)` puts the prompts in."""
    N = embeds.shape[0]
    mask = torch.full((N, N), -torch.inf).triu(1)[None, None]  # (1, 1, N, N)
    position_ids = torch.arange(N)[None]  # (1, N)
    stack, x = base.base_model, embeds[None]  # (1, N, d)
    if base.config.model_type == "gpt2":
        layers, norm, extra = stack.h, stack.ln_f, {}
        x = x + stack.wpe(position_ids)
    else:
        layers, norm = stack.layers, stack.norm
        extra = {"position_embeddings": stack.rotary_emb(x, position_ids), "position_ids": position_ids}
    states = []
    for number, layer in enumerate(layers):
        x = write(number, x[0])[None]
        states.append(x[0])
        out = layer(x, attention_mask=mask, **extra)
        x = out if isinstance(out, torch.Tensor) else out[0]
    return [*states, norm(x)[0]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("position", ["before", "after_first", "end"])
@pytest.mark.parametrize(("init_weights", "layers"), [(True, None), ("paper", None), (True, [1])])
@torch.no_grad()
def test_iapt(family: str, position: str, init_weights, layers: list[int] | None) -> None:
    base = causal_lm(family, attn_implementation="eager")
    bare = copy.deepcopy(base)
    l = 3
    config = IAPTConfig(
        num_virtual_tokens=l,
        bottleneck_dim=5,
        prompt_position=position,
        init_weights=init_weights,
        layers_to_transform=layers,
        down_factor=1.0 if init_weights == "paper" else FACTOR,
        task_type="CAUSAL_LM",
    )
    model = adapted(base, config)
    weights = {n.split(".default.")[1]: p for n, p in model.named_parameters() if ".default." in n}
    inputs = batch(9, 6, side="left")
    instruction = inputs["attention_mask"].clone()
    instruction[:, -2:] = 0  # the last two tokens are the response
    out = model(**inputs, instruction_mask=instruction, output_hidden_states=True)

    paper = init_weights == "paper"
    for row, n in enumerate((9, 6)):
        at = {"before": 0, "after_first": 1, "end": n - 2}[position]  # where the slots begin
        tokens = bare.get_input_embeddings()(inputs["input_ids"][row, -n:])  # (n, d)
        embeds = torch.cat([tokens[:at], tokens[:1].expand(l, -1), tokens[at:]])  # (n + l, d)
        text = [i for i in range(n + l) if not at <= i < at + l]
        own = list(range(3)) if layers is None else layers

        def write(
            number: int, states: torch.Tensor, n: int = n, at: int = at, text: list[int] = text, own: list[int] = own
        ) -> torch.Tensor:
            if number not in own:
                return states
            H = states[text][: n - 2]  # (n - 2, d)
            start = H[-1] if position == "end" else H[0]  # (d,)
            p = iapt(weights, own.index(number), H, start, paper)  # (l, d)
            if position == "end" and not paper and number != own[0]:
                p = p + states[at : at + l]
            elif not paper:
                p = p + start
            return torch.cat([states[:at], p, states[at + l :]])

        expected = run_layers(bare, embeds, write)
        assert len(expected) == len(out.hidden_states)
        # The powers of states that are not normalised, as in the paper, cost float32 one digit more.
        tolerance = 1e-4 if paper else 2e-5
        for actual, states in zip(out.hidden_states[:-1], expected):
            assert_same(actual[row, -n:], states[text], tolerance)
        if position == "end":  # the next token is predicted at the last slot
            text[n - 3] = at + l - 1
        assert_same(out.hidden_states[-1][row, -n:], expected[-1][text], tolerance)
        assert_same(out.logits[row, -n:], bare.lm_head(expected[-1][text]), tolerance)


@pytest.mark.parametrize("condition", ["instance", "constant"])
@torch.no_grad()
def test_iapt_in_an_encoder(condition: str) -> None:
    """What is generated is added to the states in the slots, which begin as copies of the first token's at the first layer."""
    l, ids = 3, batch(9)["input_ids"]
    fields = {"num_virtual_tokens": l, "bottleneck_dim": 5, "down_factor": FACTOR, "condition": condition}
    model, bare = adapted(encoder(), IAPTConfig(activation="tanh", **fields)), encoder()
    weights = {n.split(".default.")[1]: p for n, p in model.named_parameters() if ".default." in n}
    embeds = bare.embeddings.word_embeddings(ids)[0]  # (n, d)

    def write(number: int):
        def hook(layer, args):
            states = args[0][0].clone()  # (l + n, d)
            first = states[l]
            if condition == "constant":
                x = weights["constant"][number]  # (l, m)
            else:
                z = states[l:] @ weights["down"][number] * FACTOR  # (n, m)
                z = z / (states[l:].pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
                x = (z @ weights["pool"][number]).softmax(dim=0).T @ z + weights["slot"][number]  # (l, m)
            p = x.tanh() @ weights["up"][number] * (first.pow(2).mean() + 1e-6).sqrt()  # (l, d)
            states[:l] = p + (first if number == 0 else states[:l])
            return (states[None], *args[1:])

        return hook

    for number, layer in enumerate(bare.encoder.layer):
        layer.register_forward_pre_hook(write(number))
    widened = torch.cat([embeds[:1].expand(l, -1), embeds])[None]  # (1, l + n, d)
    expected = bare(inputs_embeds=widened).last_hidden_state[:, l:]
    assert_same(model(ids).last_hidden_state, expected)
