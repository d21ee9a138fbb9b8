# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Hidden states against a loop over the model's own layers with the prompts concatenated, IAPT written out as in the paper."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import adapted, assert_same, batch, causal_lm

from peft_instance_prompt import IAPTConfig


def iapt(
    weights: dict[str, torch.Tensor], layer: int, H: torch.Tensor, first: torch.Tensor, paper: bool
) -> torch.Tensor:
    """The prompt (l, d) of one row at one layer, from the states H (n, d) of its instruction; arXiv 2405.18203.

    `z = H W_down`, `A = softmax(z W_pool)`, `p = g(A^T z) W_up`. Not so in the paper: by default z is divided by the
    root mean square of the states, and the outcome is added to the first token's state in units of its own.
    """
    W_down, W_pool, W_up = (weights[part][layer] for part in ("down", "pool", "up"))
    a, b = weights["activation"][layer, 0].split([7, 5])
    z = H @ W_down  # (n, m)
    if not paper:
        z = z / (H.pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
    A = torch.exp(z @ W_pool)  # (n, l)
    A = A / A.sum(dim=0)
    x = A.T @ z  # (l, m)
    powers = torch.stack([x**j for j in range(7)])  # (7, l, m)
    g = torch.einsum("j,jlm->lm", a, powers) / (1 + torch.einsum("i,ilm->lm", b, powers[1:6]).abs())
    p = g @ W_up  # (l, d)
    return p if paper else first + (first.pow(2).mean() + 1e-6).sqrt() * p


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
@pytest.mark.parametrize("position", ["before", "after_first"])
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
        task_type="CAUSAL_LM",
    )
    model = adapted(base, config)
    weights = {n.split(".default.")[1]: p for n, p in model.named_parameters() if ".default." in n}
    inputs = batch(9, 6, side="left")
    instruction = inputs["attention_mask"].clone()
    instruction[:, -2:] = 0  # the last two tokens are the response
    out = model(**inputs, instruction_mask=instruction, output_hidden_states=True)

    at = 0 if position == "before" else 1  # where the slots begin
    for row, n in enumerate((9, 6)):
        tokens = bare.get_input_embeddings()(inputs["input_ids"][row, -n:])  # (n, d)
        embeds = torch.cat([tokens[:at], tokens[:1].expand(l, -1), tokens[at:]])  # (n + l, d)
        text = [i for i in range(n + l) if not at <= i < at + l]

        def write(number: int, states: torch.Tensor, n: int = n, text: list[int] = text) -> torch.Tensor:
            own = list(range(3)) if layers is None else layers
            if number not in own:
                return states
            H = states[text][: n - 2]  # (n - 2, d)
            p = iapt(weights, own.index(number), H, H[0], init_weights == "paper")  # (l, d)
            return torch.cat([states[:at], p, states[at + l :]])

        expected = run_layers(bare, embeds, write)
        assert len(expected) == len(out.hidden_states)
        # The powers of states that are not normalised, as in the paper, cost float32 one digit more.
        tolerance = 1e-4 if init_weights == "paper" else 2e-5
        for actual, states in zip(out.hidden_states, expected):
            assert_same(actual[row, -n:], states[text], tolerance)
        assert_same(out.logits[row, -n:], bare.lm_head(expected[-1][text]), tolerance)
