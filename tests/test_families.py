# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What must hold in every architecture: one test for each pair of a method and a family of decoders."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import get_peft_model
from sweep_configs import tiny_config
from tiny import DECODERS, VOCAB, adapted, assert_same, batch, causal_lm

from peft_instance_prompt import to_prompt_embeds
from peft_instance_prompt.engine import calls
from peft_instance_prompt.engine.layer import InstancePromptLayer


# The first method meets all families, the others one family of each kind of positions and masks.
SPREAD = ("llama", "gpt2", "gemma3", "mistral", "bloom")
CASES = [(method, family) for i, method in enumerate(METHODS) for family in DECODERS if i == 0 or family in SPREAD]


def hooks(model: torch.nn.Module) -> list:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]


@pytest.mark.parametrize(("method", "family"), CASES)
@torch.no_grad()
def test_family(method: str, family: str) -> None:
    base = causal_lm(family, attn_implementation="eager")
    untouched = copy.deepcopy(base)
    model = adapted(base, METHODS[method](task_type="CAUSAL_LM"))
    left, right = batch(9, 6, side="left"), batch(9, 6, side="right")
    plain = untouched(**left, output_hidden_states=True, output_attentions=True)

    # Shapes: whoever stands outside of the stack sees the tokens and nothing else.
    out = model(**left, output_hidden_states=True, output_attentions=True)
    assert out.logits.shape == plain.logits.shape
    assert [x.shape for x in out.hidden_states] == [x.shape for x in plain.hidden_states]
    if plain.attentions and plain.attentions[0] is not None:
        assert [x.shape for x in out.attentions] == [x.shape for x in plain.attentions]
    assert (out.logits - plain.logits).abs().max() > 1e-2 * plain.logits.abs().max(), "the adapter does nothing"

    # Padding: a row's numbers depend neither on the side of the padding nor on the rows beside it.
    padded_right = model(**right).logits
    for row, n in enumerate((9, 6)):
        alone = model(right["input_ids"][row : row + 1, :n]).logits[0]
        assert_same(padded_right[row, :n], alone)
        assert_same(out.logits[row, -n:], alone)

    # Cache: the same text with it and without it, and the one that a single pass over the finished text predicts.
    kwargs = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    text = model.generate(**left, **kwargs, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(model.generate(**left, **kwargs, use_cache=False), text.sequences)
    grown = torch.cat([left["attention_mask"], left["attention_mask"].new_ones(2, 5)], dim=1)  # (B, S + 5)
    instruction = torch.cat([left["attention_mask"], left["attention_mask"].new_zeros(2, 5)], dim=1)  # (B, S + 5)
    forced = model(text.sequences, attention_mask=grown, instruction_mask=instruction).logits[:, 8:-1]  # (B, 5, V)
    assert_same(torch.stack(text.logits, dim=1), forced)
    bare = untouched.generate(**left, **kwargs, output_logits=True, return_dict_in_generate=True)
    # At the first step: late slots before the text can slide out of a window of 8 while it grows.
    assert (text.logits[0] - bare.logits[0]).abs().max() > 1e-2 * bare.logits[0].abs().max()

    # Disabled and unloaded: the base model, bit by bit, and nothing left of ours.
    with model.disable_adapter():
        assert torch.equal(model(**left).logits, plain.logits)
        assert torch.equal(model.generate(**left, **kwargs), bare.sequences)
    again = model.unload()
    assert torch.equal(again(**left).logits, plain.logits)
    assert not any(isinstance(module, InstancePromptLayer) for module in again.modules())
    assert len(hooks(again)) == len(hooks(untouched))
    assert again.state_dict().keys() == untouched.state_dict().keys()


_per_layer = {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
_per_layer.update(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
_per_layer.update(intermediate_size=48, num_kv_shared_layers=0, sliding_window=32, pad_token_id=0)
_per_layer.update(max_position_embeddings=128, layer_types=["sliding_attention", "full_attention"] * 2)
PER_LAYER = {
    "Gemma3n": {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    "Gemma4": {"global_head_dim": 8},
}


@pytest.mark.parametrize("family", PER_LAYER)
@pytest.mark.parametrize("method", ["ipt", "idpg_single", "dynamic_prompt"])
@torch.no_grad()
def test_embeddings_of_tokens_in_each_layer(method: str, family: str) -> None:
    """Against the bare stack, given the prompts and for each layer's table the first token once more for each of them."""
    if not hasattr(tf, f"{family}TextConfig"):
        pytest.skip(f"this release of transformers has no {family}")
    torch.manual_seed(0)
    base = getattr(tf, f"{family}ForCausalLM")(
        getattr(tf, f"{family}TextConfig")(**_per_layer, **PER_LAYER[family])
    ).eval()
    for parameter in base.parameters():
        parameter.normal_(std=0.3)
    model, ids = adapted(base, METHODS[method](task_type="CAUSAL_LM")).eval(), batch(9)["input_ids"]
    found, (embeds,) = base.model(ids).last_hidden_state, to_prompt_embeds(model, ids)
    with model.disable_adapter():
        table = base.model.embed_tokens_per_layer(ids).unflatten(-1, (4, 8))  # (1, S, layers, width)
        l = len(embeds) - 9
        table = torch.cat([table[:, :1].expand(-1, l, -1, -1), table], dim=1)  # (1, N, layers, width)
        expected = base.model(inputs_embeds=embeds[None], per_layer_inputs=table).last_hidden_state
    assert_same(found[:, 1:], expected[:, 1 + l :], 1e-4)
    base.model.embed_tokens_per_layer.weight.zero_()
    assert (found - base.model(ids).last_hidden_state).abs().max() > 1e-2, "the table is of no effect"


@torch.no_grad()
def test_inputs_of_each_layer_that_are_handed_to_the_stack() -> None:
    """Gemma 4's multimodal model looks them up itself: it gives what its language model alone gives."""
    if not hasattr(tf, "Gemma4Config"):
        pytest.skip("this release of transformers has no Gemma 4")
    torch.manual_seed(0)
    text = tf.Gemma4TextConfig(**_per_layer, **PER_LAYER["Gemma4"])
    whole = tf.Gemma4ForConditionalGeneration(tf.Gemma4Config(text_config=text, vision_config=None, audio_config=None))
    for parameter in whole.parameters():
        parameter.normal_(std=0.3)
    alone = tf.Gemma4ForCausalLM(text)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    models = []
    for base in (whole, alone):
        torch.manual_seed(1)
        models.append(adapted(base.eval(), METHODS["iapt"](task_type="CAUSAL_LM")))
    inputs = batch(9, 6)
    assert_same(*(model(**inputs).logits[0] for model in models))
    texts = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in models]
    assert torch.equal(*texts)


def test_a_cache_that_the_model_fills_but_does_not_return() -> None:
    torch.manual_seed(0)
    config = tf.RecurrentGemmaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        lru_width=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    base, ids = tf.RecurrentGemmaForCausalLM(config).eval(), batch(9)["input_ids"]
    kwargs = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def with_cache_and_without(model):
        return [torch.stack(model.generate(ids, **kwargs, use_cache=use).logits) for use in (True, False)]

    if calls.release() < (5, 24):
        with pytest.raises(ValueError, match="RecurrentGemmaModel keeps states of the text on its modules"):
            adapted(base, METHODS["iapt"](task_type="CAUSAL_LM"))
        return
    assert_same(*with_cache_and_without(adapted(base, METHODS["iapt"](task_type="CAUSAL_LM"))))


def test_layers_that_take_other_states_are_refused() -> None:
    torch.manual_seed(0)
    base = tf.Gemma3nForCausalLM(tf.Gemma3nTextConfig(**_per_layer, **PER_LAYER["Gemma3n"]))
    model = get_peft_model(base, METHODS["iapt"](task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match=r"take states of shape \(2, 1, 13, 32\).*writes to the input only"):
        model(batch(9)["input_ids"])
    assert model.unload()(batch(9)["input_ids"]).logits.isfinite().all()


def test_layers_that_take_several_states_per_position_are_refused() -> None:
    if not hasattr(tf, "HYV4Config"):
        pytest.skip("this release of transformers has no HYV4")
    base = tf.AutoModelForCausalLM.from_config(tiny_config("hy_v4"))
    model = get_peft_model(base, METHODS["iapt"](task_type="CAUSAL_LM")).eval()
    with pytest.raises(
        ValueError, match=r"take states of shape \(2, 13, 4, 32\), where its input has \(2, 13\) positions"
    ):
        model(**batch(9, 6))


def test_layers_that_read_token_ids_are_refused() -> None:
    """DeepSeek V4's first layers look the experts of a token up by its id."""
    if not hasattr(tf, "DeepseekV4Config"):
        pytest.skip("this release of transformers has no DeepSeek V4")
    base = tf.AutoModelForCausalLM.from_config(tiny_config("deepseek_v4"))
    with pytest.raises(
        ValueError, match="a DeepseekV4HashRouter in its layers .* needs the `input_ids` of each position"
    ):
        get_peft_model(base, METHODS["ipt"](task_type="CAUSAL_LM"))


def test_several_states_for_each_position_in_an_output_are_refused() -> None:
    small = {"vocab_size": VOCAB, "hidden_size": 32, "decoder_ffn_dim": 48, "num_decoder_layers": 2}
    config = tf.ProphetNetConfig(**small, num_decoder_attention_heads=4, max_position_embeddings=64, ngram=2)
    model = adapted(tf.ProphetNetForCausalLM(config), METHODS["idpg_single"](task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"out of the output `last_hidden_state_ngram` \(2, 26, 32\)"):
        model(**batch(9, 6))
