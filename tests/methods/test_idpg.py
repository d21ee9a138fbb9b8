# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What is IDPG's own: sizes, maths, where M(x) comes from and when, the places of the slots, presets, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from idpg_models import INPUTS, LABELS, VECTORS, L, config, count, d, logits
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import adapted, assert_same, batch, causal_lm, encoder, generator_of, instances, pair
from torch import nn

from peft_instance_prompt import IDPGConfig
from peft_instance_prompt.engine.intercept import intercept
from peft_instance_prompt.engine.stack import describe
from peft_instance_prompt.methods.idpg import IDPGGenerator


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("m-phm", 137_232), ("m-dnn", 221_200), ("s-phm", 107_776), ("s-dnn", 1_578_240), ("m-phm-glove", 144_704)],
)
def test_parameter_count_of_the_paper(preset: str, expected: int) -> None:
    """RoBERTa-large: d = 1024, 24 layers, 5 prompt vectors; the generator alone."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 8}
    with torch.device("meta"):
        base = tf.RobertaModel(tf.RobertaConfig(vocab_size=8, **sizes))
        (info,) = describe(base)
        generator = IDPGGenerator(IDPGConfig.preset(preset), info)
    assert count(generator) == expected


@pytest.mark.parametrize(("sharing", "bottlenecks", "biases"), [("all", 1, 1), ("bias", 1, L), ("none", L, L)])
def test_what_depths_share(sharing: str, bottlenecks: int, biases: int) -> None:
    model = get_peft_model(causal_lm(), config(layer_sharing=sharing, bottleneck_dim=8))
    one = 2 * 4**3 + d * 8 // 4 + 8 + 8 * 4 * d // 4
    assert model.get_nb_trainable_parameters()[0] == bottlenecks * one + biases * 4 * d


def test_layers_to_transform() -> None:
    assert generator_of(get_peft_model(causal_lm(), config(layers_to_transform=[2, 0]))).depths == (-1, 2)
    assert generator_of(get_peft_model(causal_lm(), config(multi_layer=False))).depths == (-1,)


def test_shared_left_factors_are_one_tensor(tmp_path: Path) -> None:
    """Saved once, and still one tensor after loading: a step of training moves both matrices alike."""
    fields = {"phm_share_A": True, "layer_sharing": "none", "bottleneck_dim": 8}
    model = adapted(causal_lm(), config(**fields))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == model.get_nb_trainable_parameters()[0]
    (left,) = (tensor for name, tensor in saved.items() if ".A" in name)
    assert left.shape == (L, 4, 4, 4)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            causal_lm(), tmp_path, adapter_name="other", is_trainable=True, low_cpu_mem_usage=low
        )
        assert torch.equal(logits(loaded.eval()), expected)
        assert count(generator_of(loaded, "other")) == count(generator_of(model))
        generator = generator_of(loaded, "other")
        states, W1, W2 = torch.randn(1, 5, d), matrix(generator, 1, 1), matrix(generator, 2, 1)
        with torch.no_grad():
            generator.A1[1].mul_(2)
            x = states[0, -1] / states[0, -1].pow(2).mean().sqrt()
            expected_here = nn.functional.gelu(x @ (2 * W1) + generator.b1[1]) @ (2 * W2) + generator.b2[1]
            made = generator.generate(instances(states), 1, generator.weights(1))
        assert_same(made.flatten(), expected_here.flatten())


# --------------------------------------------------------------------------------------------------------------- maths


@torch.no_grad()
def matrix(generator: IDPGGenerator, number: int, row: int) -> torch.Tensor:
    """W1 or W2 of the depths that share a row."""
    if hasattr(generator, f"W{number}"):
        return getattr(generator, f"W{number}")[row]
    A = getattr(generator, f"A{number}", generator.A1)[row]
    return sum(torch.kron(a, b) for a, b in zip(A, getattr(generator, f"B{number}")[row]))


def bottleneck(generator: IDPGGenerator, x: torch.Tensor, number: int, bias: int, paper: bool) -> torch.Tensor:
    """What is generated (l, d) from one vector x (k): `gelu(x W1 + b1) W2 + b2`; x in units of its rms if not as in the paper."""
    x = x if paper else x / x.pow(2).mean().sqrt()
    u = nn.functional.gelu(x @ matrix(generator, 1, number) + generator.b1[number])
    return (u @ matrix(generator, 2, number) + generator.b2[bias]).view(4, -1)


@pytest.mark.parametrize("projection", ["phm", "dense"])
@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("depth_input", ["previous", "instance"])
@torch.no_grad()
def test_multi_layer_against_the_base_model_with_the_prompt_in_its_input(projection, paper, depth_input) -> None:
    """One row; the slots are given to the bare model as embeddings behind the first token, and hooks add to them."""
    fields = {"projection": projection, "depth_input": depth_input, "init_weights": "paper" if paper else True}
    model = adapted(causal_lm(), config(**fields))
    generator, base = generator_of(model), causal_lm()
    ids = INPUTS["input_ids"][:1]
    M = base.model(ids).last_hidden_state[0, -1]  # (d,)

    def unit(states: torch.Tensor) -> torch.Tensor:
        return 1.0 if paper else states[0].pow(2).mean().sqrt()

    embeds = base.get_input_embeddings()(ids)[0]  # (S, d)
    prompt = bottleneck(generator, M, 0, 0, paper) * unit(embeds) + (0 if paper else embeds[0])
    embeds = torch.cat([embeds[:1], prompt, embeds[1:]])  # (S + 4, d)

    def add(number: int):
        def hook(layer, args):
            states = args[0][0].clone()  # (S + 4, d)
            x = states[-1] if depth_input == "previous" else M
            states[1:5] += bottleneck(generator, x, 0, number, paper) * unit(states)
            return (states[None], *args[1:])

        return hook

    for number in (1, 2):
        base.model.layers[number].register_forward_pre_hook(add(number))
    expected = base(inputs_embeds=embeds[None]).logits[:, [0, *range(5, 13)]]
    assert_same(model(ids).logits, expected)


@torch.no_grad()
def test_embeddings_and_given_vectors() -> None:
    base = causal_lm()
    for fields, M in [
        ({"instance_source": "embeddings"}, base.get_input_embeddings()(INPUTS["input_ids"])[1, 3:6].mean(dim=0)),
        ({"instance_source": "instance_embeds", "instance_embeds_dim": 12}, VECTORS[1]),
    ]:
        model, seen = adapted(causal_lm(), config(multi_layer=False, bottleneck_dim=8, **fields)), []
        with intercept(lambda made: seen.append(made)):
            model(**INPUTS, labels=LABELS, **({"instance_embeds": VECTORS} if "instance_embeds_dim" in fields else {}))
        assert_same(seen[0].values[1], M)
        first = base.get_input_embeddings()(INPUTS["input_ids"])[1, 3]
        assert_same(
            seen[1].values[1], first + first.pow(2).mean().sqrt() * bottleneck(generator_of(model), M, 0, 0, False)
        )


@pytest.mark.parametrize(
    ("base", "pooling", "pick"),
    [
        (causal_lm, "auto", lambda states: states[-1]),
        (causal_lm, "first", lambda states: states[0]),
        (causal_lm, "mean", lambda states: states.mean(dim=0)),
        (encoder, "auto", lambda states: states[0]),
        (encoder, "last", lambda states: states[-1]),
        (pair, "auto", lambda states: states.mean(dim=0)),
    ],
)
@torch.no_grad()
def test_what_is_pooled(base, pooling: str, pick) -> None:
    model = base()
    stack = model.encoder if base is pair else getattr(model, "model", model)
    states = stack(**INPUTS).last_hidden_state[0]  # (S, d)
    fields = {"task_type": None, "multi_layer": False, "bottleneck_dim": 8, "instance_pooling": pooling}
    model, seen = get_peft_model(model, config(**fields)).eval(), []
    decoder = {"decoder_input_ids": torch.tensor([[0], [0]])} if base is pair else {}
    with intercept(lambda made: seen.append(made.values)):
        model(**INPUTS, **decoder)
    assert_same(seen[0][0], pick(states))


def test_projected_embeddings() -> None:
    """OPT-350m: embeddings of 24, layers of 32; the input has matrices of its own, and M(x) the width of the embeddings."""
    model = adapted(causal_lm("opt"), config())
    generator, n = generator_of(model), 4
    assert (generator.B1_input.shape[-2] * n, generator.B2_input.shape[-1] * n) == (24, 4 * 24)
    assert (generator.B1.shape[-2] * n, generator.B2.shape[-1] * n) == (32, 4 * 32)
    assert generator.b2_input.shape == (1, 1, 4 * 24) and generator.b2.shape == (L - 1, 1, 4 * 32)
    model(**INPUTS, labels=LABELS).loss.backward()
    assert all(p.grad.any() for p in generator_of(model).parameters())


# ------------------------------------------------------------------------------------------------- places of the slots


@torch.no_grad()
def test_end_of_a_causal_instruction() -> None:
    """The next token is predicted at the last slot."""
    fields = {"multi_layer": False, "bottleneck_dim": 8, "prompt_position": "end"}
    model, base, seen = adapted(causal_lm(), config(**fields)), causal_lm(), []
    with intercept(lambda made: seen.append(made.values)):
        actual = model(**INPUTS, labels=LABELS).logits  # the instruction is the tokens 0 to 5
    for row, start in ((0, 0), (1, 3)):
        embeds = base.get_input_embeddings()(INPUTS["input_ids"][row])  # (S, d)
        embeds = torch.cat([embeds[start:6], seen[1][row], embeds[6:]])
        expected = base(inputs_embeds=embeds[None]).logits[0]
        n = 6 - start
        assert_same(actual[row, start:], expected[[*range(n - 1), n + 3, *range(n + 4, n + 7)]])


@torch.no_grad()
def test_end_of_a_fresh_prompt_goes_on_from_the_last_token() -> None:
    model, seen = get_peft_model(causal_lm(), config(prompt_position="end")).eval(), []
    with intercept(lambda made: seen.append(made.values) if made.depth == -1 else None):
        model(**INPUTS)
    assert_same(seen[0], model.get_input_embeddings()(INPUTS["input_ids"][:, -1:]).expand(-1, 4, -1))


@torch.no_grad()
def test_end_of_an_encoder_is_before_its_end_token() -> None:
    fields = {"task_type": None, "multi_layer": False, "bottleneck_dim": 8, "prompt_position": "end"}
    model, base, seen = adapted(encoder(), config(**fields)), encoder(), []
    inputs = batch(9, 6, side="right")
    with intercept(lambda made: seen.append(made.values)):
        actual = model(**inputs).last_hidden_state
    for row, n in ((0, 9), (1, 6)):
        embeds = base.get_input_embeddings()(inputs["input_ids"][row, :n])  # (n, d)
        embeds = torch.cat([embeds[:-1], seen[1][row], embeds[-1:]])
        expected = base(inputs_embeds=embeds[None]).last_hidden_state[0]
        assert_same(actual[row, :n], expected[[*range(n - 1), n + 3]])


# ----------------------------------------------------------------------------------------------------- a trained model


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["m-phm", "s-phm"])
@torch.no_grad()
def test_fresh_adapter_does_not_hurt_a_trained_model(preset: str) -> None:
    from smollm2 import load_smollm2
    from vader import sentiment_splits

    model, tokenizer = load_smollm2()
    texts = [f"Review: {example['text']}" for example in sentiment_splits("movie", n_test=8)[1]]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)
    before = model(**inputs, labels=labels).loss
    model = get_peft_model(model, IDPGConfig.preset(preset, task_type="CAUSAL_LM")).eval()
    after = model(**inputs, labels=labels, instruction_mask=inputs["attention_mask"]).loss
    assert abs(after - before) < 0.02 * before
