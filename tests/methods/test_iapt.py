# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What is IAPT's own: sizes, sharing, activations, the control, and where it starts. Its maths is in test_reference.py."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from tiny import DEGREES, adapted, batch, causal_lm, generator_of
from torch import nn

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.engine.intercept import intercept
from peft_instance_prompt.nn.rational import rational


INPUTS = batch(9, 6)
LABELS = INPUTS["input_ids"].where(torch.arange(9) > 5, -100)
d, L = 32, 3


def config(**fields) -> IAPTConfig:
    return IAPTConfig(**{"task_type": "CAUSAL_LM", "bottleneck_dim": 8, "activation": "rational", **fields})


def count(model: nn.Module, *parts: str) -> int:
    named = generator_of(model).named_parameters()
    return sum(p.numel() for name, p in named if not parts or name.startswith(parts))


@torch.no_grad()
def logits(model: PeftModel, **kwargs) -> torch.Tensor:
    return model(**INPUTS, **kwargs).logits


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("m", "l"), [(8, 4), (5, 1), (64, 7)])
def test_parameter_count(m: int, l: int) -> None:
    model = get_peft_model(causal_lm(), config(bottleneck_dim=m, num_virtual_tokens=l))
    assert count(model, "down", "up") == 2 * d * m * L
    assert count(model, "pool") == count(model, "slot") == l * m * L
    assert count(model) == 2 * d * m * L + 2 * l * m * L + 12 * L
    paper = get_peft_model(causal_lm(), config(bottleneck_dim=m, num_virtual_tokens=l, init_weights="paper"))
    assert count(paper) == 2 * d * m * L + l * m * L + 12 * L
    assert model.get_nb_trainable_parameters()[0] == count(model)


def test_parameter_count_of_llama_2_7b() -> None:
    """The figure that is reported for LLaMA-2 7B with m = 320 is that of the projections."""
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    with init_empty_weights(include_buffers=True):
        base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=32))
        model = get_peft_model(base, config(bottleneck_dim=320), low_cpu_mem_usage=True)
    assert count(model, "down", "up") == 83_886_080
    assert count(model) == 83_886_080 + 2 * 4 * 320 * 32 + 12 * 32


@pytest.mark.parametrize(("share_layers", "groups"), [(1, 3), (2, 2), (3, 1), (5, 1)])
def test_shared_projections(share_layers: int, groups: int) -> None:
    model = adapted(causal_lm(), config(share_layers=share_layers))
    m, l = 8, 4
    assert count(model, "down", "up") == 2 * d * m * groups
    assert count(model, "pool", "slot", "activation") == 2 * l * m * L + 12 * L
    # Layer 2 reads the last group, and all its layers read the same.
    before = logits(model)
    generator = generator_of(model)
    for i in range(L):
        assert generator.index_at(i) == {
            "down": i // share_layers,
            "up": i // share_layers,
            "pool": i,
            "slot": i,
            "activation": i,
        }
    with torch.no_grad():
        generator.up[groups - 1].add_(1.0)
    assert (logits(model) - before).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_fixed_activation(activation: str, monkeypatch) -> None:
    """Against the learned one, bent to be that function: both see the same weights."""
    model = adapted(causal_lm(), config(activation=activation))
    assert count(model, "activation") == 0
    assert count(model) == 2 * d * 8 * L + 2 * 4 * 8 * L
    assert count(get_peft_model(causal_lm(), IAPTConfig(bottleneck_dim=8))) == count(model)  # the default is GELU
    twin = adapted(causal_lm(), config())
    own = dict(generator_of(model).named_parameters())
    fixed = getattr(nn.functional, activation)
    with torch.no_grad():
        for name, parameter in generator_of(twin).named_parameters():
            if name in own:
                parameter.copy_(own[name])
    assert (logits(twin) - logits(model)).abs().max() > 1e-4
    monkeypatch.setattr("peft_instance_prompt.methods.iapt.rational", lambda x, coefficients: fixed(x))
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize(("fit", "reach", "error"), [("wide", 10, 5e-3), ("tight", 3, 1.3e-4)])
def test_rational_activation_starts_at_gelu(fit: str, reach: int, error: float) -> None:
    generator = generator_of(get_peft_model(causal_lm(), config(activation_fit=fit)))
    x = torch.linspace(-reach, reach, 1001)
    assert generator.activation.shape == (L, 1, 12) and generator.activation.requires_grad
    for coefficients in generator.activation:
        assert (rational(x[:, None], coefficients)[:, 0] - nn.functional.gelu(x)).abs().max() < error


def test_fresh_prompts_at_the_end_go_on_from_the_last_token() -> None:
    """The next token is predicted at the last slot: a copy of the first token would predict what follows that one."""
    ids = torch.randint(3, 96, (2, 7))
    model = get_peft_model(causal_lm(), config(prompt_position="end")).eval()
    with model.disable_adapter():
        states = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(prompts(model, ids)[0], states[0][:, -1:].expand(-1, 4, -1))


# --------------------------------------------------------------------------------------------------------- the control


@torch.no_grad()
def prompts(model: PeftModel, ids: torch.Tensor) -> list[torch.Tensor]:
    seen = []
    with intercept(lambda made: seen.append(made.values)):
        model(ids)
    return seen


@pytest.mark.parametrize("init_weights", ["paper", True])
def test_constant_condition(init_weights) -> None:
    constant, instance = (
        adapted(causal_lm(), config(condition=condition, init_weights=init_weights, prompt_position="before"))
        for condition in ("constant", "instance")
    )
    assert count(constant, "constant") == 4 * 8 * L and count(constant, "down", "pool", "slot") == 0
    ids = INPUTS["input_ids"][:1]
    other = ids.clone()
    other[:, 4:] += 1
    # What is generated is the same for all instances. Unless it is the paper's it is added to a copy of a token's state, which these two
    # share at the first layer if it is the first token's.
    shown = L if init_weights == "paper" else 1
    for model, same in ((constant, True), (instance, False)):
        pairs = list(zip(prompts(model, ids), prompts(model, other)))[:shown]
        assert all(torch.equal(a, b) == same for a, b in pairs)
    constant.train()(**INPUTS, labels=LABELS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator_of(constant).parameters())


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("layers", [[1], [0, 2], 2, [2, 0]])
def test_layers_to_transform(layers) -> None:
    model = adapted(causal_lm(), config(layers_to_transform=layers))
    own = sorted([layers] if isinstance(layers, int) else layers)
    assert generator_of(model).depths == tuple(own)
    assert count(model) == (2 * d * 8 + 2 * 4 * 8 + 12) * len(own)
    called = []
    generator = generator_of(model)
    forward = generator.forward
    generator.forward = lambda instances, depth, weights: called.append(depth) or forward(instances, depth, weights)
    assert (logits(model) - logits(causal_lm())).abs().max() > 1e-2
    assert called == own


def test_layers_with_shared_projections() -> None:
    model = adapted(causal_lm(), config(layers_to_transform=[0, 2], share_layers=2))
    assert count(model, "down", "up") == 2 * d * 8


# --------------------------------------------------------------------------------------------------------------- start


@torch.no_grad()
def test_fresh_adapter_disturbs_less_than_the_papers() -> None:
    """A tiny random model has no attention sink, so not even a copy of the first token goes unnoticed; still it must be
    noticed less than what the paper starts with, and no more than a random start in the same form."""
    inputs = batch(24, 24)
    change = {True: 0.0, "paper": 0.0, False: 0.0}
    for seed in range(6):
        for init_weights in change:
            base = causal_lm(seed=seed)
            plain = base(**inputs).logits[:, 8:].log_softmax(dim=-1)
            torch.manual_seed(seed)
            model = get_peft_model(base, config(init_weights=init_weights)).eval()
            fresh = model(**inputs).logits[:, 8:].log_softmax(dim=-1)
            change[init_weights] += float((plain.exp() * (plain - fresh)).sum(dim=-1).mean())  # KL divergence
    assert change[True] < 0.9 * change["paper"]
    assert change[True] < 1.05 * change[False]


def test_weights_at_the_start() -> None:
    for init_weights, zero in ((True, True), (False, False), ("paper", False)):
        generator = generator_of(get_peft_model(causal_lm(), config(init_weights=init_weights)))
        assert all((up == 0).all() == zero for up in generator.up)
        assert all(down.std() > 0.01 for down in generator.down)


def test_gradient_of_the_papers_form() -> None:
    """Against the slope of the loss along each weight's gradient, in double precision (GPT-2 computes nothing in single)."""
    torch.set_default_dtype(torch.float64)
    try:
        model = adapted(causal_lm("gpt2", attn_implementation="eager"), config(init_weights="paper"))
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def loss() -> torch.Tensor:
            out = model(**INPUTS, instruction_mask=(LABELS == -100) & INPUTS["attention_mask"].bool()).logits[:, :-1]
            return nn.functional.cross_entropy(out.flatten(0, 1), LABELS[:, 1:].flatten())

        for (name, weight), grad in zip(weights.items(), torch.autograd.grad(loss(), list(weights.values()))):
            # The sixth powers of states that are not normalised are steep: a step along them would leave the tangent.
            along = grad * 16.0**-DEGREES if name.endswith(".activation") else grad
            along, step, losses = along / along.norm(), 1e-5, []
            with torch.no_grad():
                for times in (1, -2, 1):
                    weight.add_(along, alpha=times * step)
                    losses.append(loss())
            slope = (grad * along).sum()
            assert slope > 1e-2
            torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope, rtol=1e-5, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_base_state_gets_no_gradient() -> None:
    """`p = a + rms(a) * generated` with a detached: with W_up at zero, the embeddings get gradients through the text only."""
    fields = {"layers_to_transform": [0], "num_virtual_tokens": 2, "prompt_position": "before"}
    model, seen = get_peft_model(causal_lm(), config(**fields)), []
    embeds = torch.randn(1, 5, d, requires_grad=True)
    with intercept(lambda made: seen.append(made.values)):
        model(inputs_embeds=embeds)
    assert torch.equal(seen[0], embeds[:, :1].expand(-1, 2, -1))
    (grad,) = torch.autograd.grad(seen[0].sum(), embeds)
    assert (grad == 0).all()


@pytest.mark.parametrize(
    ("name", "value", "error", "says"),
    [
        ("activation", "swish", ValueError, "'rational', 'gelu', 'relu', 'silu', 'tanh'.*'swish'"),
        ("activation_fit", "narrow", ValueError, "'wide', 'tight'.*'narrow'"),
        ("share_layers", 0, ValueError, "at least 1, got 0"),
        ("share_layers", 1.5, TypeError, "integer, got 1.5"),
        ("bottleneck_dim", 0, ValueError, "at least 1, got 0"),
        ("bottleneck_dim", "16", TypeError, "integer, got '16'"),
    ],
)
def test_bad_field(name: str, value, error: type, says: str) -> None:
    with pytest.raises(error, match=f"`{name}`.*{says}"):
        config(**{name: value})


def test_defaults() -> None:
    fresh = IAPTConfig()
    assert (fresh.num_virtual_tokens, fresh.activation, fresh.share_layers, fresh.condition) == (
        4,
        "gelu",
        1,
        "instance",
    )
    assert (fresh.bottleneck_dim, fresh.init_weights, fresh.prompt_position) == (16, True, None)
    assert IAPTConfig(init_weights="paper").activation == "rational"
