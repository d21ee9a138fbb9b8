# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""IDPG's control of output biases, and the ablations of the paper: a residual and a layer norm at the input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, encoder, generator_of
from torch import nn

from peft_instance_prompt import IDPGConfig
from peft_instance_prompt.engine.intercept import intercept
from peft_instance_prompt.engine.open import run_plain


INPUTS = batch(9, 6)
LABELS = INPUTS["input_ids"].where(torch.arange(9) > 5, -100)
l, d = 4, 32


def config(**fields) -> IDPGConfig:
    return IDPGConfig(**{"task_type": "CAUSAL_LM", "phm_n": 4, "num_virtual_tokens": l, "dropout": 0.0, **fields})


@torch.no_grad()
def prompts(model: PeftModel) -> dict[int | None, torch.Tensor]:
    """What is generated at each depth, and M(x) at None."""
    made: dict[int | None, torch.Tensor] = {}
    with intercept(lambda generated: made.__setitem__(generated.depth, generated.values)):
        model(**INPUTS)
    return made


# --------------------------------------------------------------------------------------------------------- the control


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 122_880),
        ({"layer_sharing": "all"}, 5_120),
        ({"multi_layer": False}, 5_120),
        ({"projection": "dense"}, 122_880),
    ],
)
def test_parameter_counts_of_the_biases(fields: dict, expected: int) -> None:
    """RoBERTa-large: 24 layers of 5 vectors of 1024, the paper's 120 K of P-tuning v2; at the input alone its 5 K of prompt tuning."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8}
    with torch.device("meta"):
        base = tf.RobertaModel(tf.RobertaConfig(vocab_size=8, **sizes))
        model = get_peft_model(base, IDPGConfig(condition="bias", **fields))
    assert model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("projection", ["phm", "dense"])
@pytest.mark.parametrize("form", [True, "paper"])
@pytest.mark.parametrize("multi_layer", [True, False])
@torch.no_grad()
def test_it_is_the_generator_whose_matrices_are_zero(multi_layer: bool, form, projection: str) -> None:
    fields = {"multi_layer": multi_layer, "bottleneck_dim": 8, "projection": projection, "init_weights": form}
    model, control = adapted(causal_lm(), config(**fields)), adapted(causal_lm(), config(**fields, condition="bias"))
    generator, biases = generator_of(model), dict(generator_of(control).named_parameters())
    assert set(biases) == {"b2"}
    for name, parameter in generator.named_parameters():
        parameter.copy_(biases[name]) if name == "b2" else parameter.zero_()
    expected = prompts(model)
    del expected[None]
    actual = prompts(control)
    assert set(actual) == set(expected)
    for depth, value in expected.items():
        assert_same(actual[depth], value)
    a = control.get_input_embeddings()(INPUTS["input_ids"])[[0, 1], [0, 3]][:, None]  # (B, 1, d), the first tokens
    p = biases["b2"][0, 0].view(l, d)
    assert_same(actual[-1], p.expand(2, -1, -1) if form == "paper" else a + a.pow(2).mean(-1, keepdim=True).sqrt() * p)


def test_no_frozen_pass_and_all_of_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the instance is computed, and what is given of it is not needed."""
    runs = []
    monkeypatch.setattr("peft_instance_prompt.engine.open.run_plain", lambda *args: runs.append(1) or run_plain(*args))
    for condition, expected in (("instance", 1), ("bias", 0)):
        runs.clear()
        model = get_peft_model(causal_lm(), config(condition=condition))
        model(**INPUTS, labels=LABELS).loss.backward()
        assert len(runs) == expected
    assert generator_of(model).b2.grad.abs().amax(dim=(1, 2)).min() > 0
    given = adapted(causal_lm(), config(condition="bias", instance_source="instance_embeds", instance_embeds_dim=12))
    with torch.no_grad():
        assert given(**INPUTS).logits.isfinite().all()


@torch.no_grad()
def test_saved_and_in_a_batch_of_several(tmp_path: Path) -> None:
    model = adapted(causal_lm(), config(condition="bias"))
    model.save_pretrained(tmp_path)
    expected = model(**INPUTS).logits
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path).eval()
    assert torch.equal(loaded(**INPUTS).logits, expected)
    loaded.add_adapter("b", config(condition="bias", init_weights=False))
    together = loaded(**INPUTS, adapter_names=["default", "b"]).logits
    assert_same(together[0], expected[0])
    real = INPUTS["attention_mask"][1].bool()
    alone = {name: value[1:, real] for name, value in INPUTS.items()}
    assert_same(together[1, real], loaded(**alone, adapter_names=["b"]).logits[0])


# ------------------------------------------------------------------------------------------------------- the ablations


def norm(vector: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    centred = vector - vector.mean()
    return centred / (centred.pow(2).mean() + 1e-5).sqrt() * weight.flatten() + bias.flatten()


@pytest.mark.parametrize("form", [True, "paper"])
@pytest.mark.parametrize(("residual", "ends"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("multi_layer", [True, False])
@torch.no_grad()
def test_against_a_loop_over_rows_and_vectors(multi_layer: bool, residual: bool, ends: bool, form) -> None:
    """As in the released code: at the input, `M(x) + N(p)`, then `N'`; between the layers there is neither."""
    fields = {"multi_layer": multi_layer, "projection": "dense", "bottleneck_dim": 8, "init_weights": form}
    model = adapted(causal_lm(), config(**fields, generator_residual=residual, generator_layer_norm=ends))
    W = dict(generator_of(model).named_parameters())
    assert all((W[name] - 1).abs().max() > 0 for name in W if name.endswith("norm"))  # far from their start
    made = prompts(model)
    embeds = model.get_input_embeddings()(INPUTS["input_ids"])
    for row, start in ((0, 0), (1, 3)):
        M = made[None][row]  # (d,)
        x = M if form == "paper" else M / M.pow(2).mean().sqrt()
        u = nn.functional.gelu(x @ W["W1"][0] + W["b1"][0, 0])  # (m,)
        p = (u @ W["W2"][0] + W["b2"][0, 0]).view(l, d)
        expected = []
        for vector in p:
            vector = x + norm(vector, W["residual_norm"], W["residual_norm_bias"]) if residual else vector
            vector = norm(vector, W["norm"], W["norm_bias"]) if ends else vector
            first = embeds[row, start]
            expected.append(vector if form == "paper" else first + first.pow(2).mean().sqrt() * vector)
        assert_same(made[-1][row], torch.stack(expected))
    if multi_layer:
        plain = adapted(causal_lm(), config(**fields))
        for name, parameter in generator_of(plain).named_parameters():
            parameter.copy_(W[name])
        depths = {}
        with intercept(lambda generated: depths.__setitem__(generated.depth, generated)):
            model(**INPUTS)
        made_there = depths[2]
        again = generator_of(plain)(made_there.instances, 2)
        assert_same(made_there.values, again)


@pytest.mark.parametrize("ablation", ["generator_residual", "generator_layer_norm"])
@torch.no_grad()
def test_rows_of_several_adapters(ablation: str) -> None:
    model = adapted(encoder(), config(task_type=None, **{ablation: True}))
    model.add_adapter("b", config(task_type=None, init_weights=False, **{ablation: True}))
    inputs = batch(9, 6, side="right")
    together = model(**inputs, adapter_names=["default", "b"]).last_hidden_state
    for row, (name, n) in enumerate((("default", 9), ("b", 6))):
        alone = model(inputs["input_ids"][row : row + 1, :n], adapter_names=[name]).last_hidden_state[0]
        assert_same(together[row, :n], alone)


def test_counts_and_gradients_of_the_ablations() -> None:
    fields = {"generator_residual": True, "generator_layer_norm": True}
    model = get_peft_model(causal_lm(), config(**fields))
    plain = get_peft_model(causal_lm(), config())
    assert model.get_nb_trainable_parameters()[0] - plain.get_nb_trainable_parameters()[0] == 4 * d
    optimizer = torch.optim.SGD(generator_of(model).parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**INPUTS, labels=LABELS).loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in generator_of(model).parameters())


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"condition": "shuffled"}, r"`condition` must be one of \['instance', 'constant', 'bias'\], got 'shuffled'"),
        (
            {"condition": "bias", "generator_residual": True},
            "`generator_residual` must be False with `condition='bias'`",
        ),
        ({"generator_residual": 1}, r"`generator_residual` must be one of \[True, False\], got 1"),
        ({"generator_layer_norm": "yes"}, r"`generator_layer_norm` must be one of \[True, False\], got 'yes'"),
        (
            {"generator_layer_norm": True, "layers_to_transform": [1, 2]},
            r"`generator_layer_norm` acts .*0 .*got \[1, 2\]",
        ),
        ({"generator_residual": True, "layers_to_transform": 1}, r"`generator_residual` acts .*0 .*got 1"),
    ],
)
def test_bad_fields(fields: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(**fields)


def test_residual_of_another_width() -> None:
    base = causal_lm()
    fields = {"generator_residual": True, "instance_source": "instance_embeds", "instance_embeds_dim": 12}
    with pytest.raises(
        ValueError, match=r"`generator_residual` needs .*32; those of `instance_source='instance_embeds'` have 12"
    ):
        get_peft_model(base, config(**fields))
    assert not any("idpg" in name for name, _ in base.named_modules())


def test_other_methods_have_no_such_control() -> None:
    from peft_instance_prompt import IAPTConfig

    with pytest.raises(ValueError, match=r"`condition` must be one of \['instance', 'constant'\], got 'bias'"):
        IAPTConfig(condition="bias")
