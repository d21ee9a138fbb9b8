# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Whether a stack is causal: by what it declares, and by the mask that it computes."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
import transformers as tf
from peft import get_peft_model
from tiny import DECODERS, ENCODERS, STATE_SPACES, batch, causal_lm, encoder, pair
from torch import nn
from uses import blip, git, paligemma

from peft_instance_prompt import IAPTConfig, PreFTConfig
from peft_instance_prompt.engine import probe as attention
from peft_instance_prompt.engine.calls import cache_argument
from peft_instance_prompt.engine.stack import describe, flags_of, tree_of


def read_attention(stack: nn.Module, name: str) -> attention.Attention:
    return attention.read_attention(stack, name, flags_of(tree_of(stack), name))


def layers_name(stack: nn.Module) -> str:
    return next(name for name, module in stack.named_modules() if isinstance(module, nn.ModuleList))


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_make_a_causal_mask(family: str) -> None:
    """Also of those that declare `is_causal`, the mask says the same."""
    stack = causal_lm(family).base_model
    stack = getattr(stack, "decoder", stack)  # OPT
    assert read_attention(stack, layers_name(stack)).causal
    assert attention._read_mask(stack, layers_name(stack)) == attention.Attention(True, true_hides=family == "mpt")


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_make_none(family: str) -> None:
    stack = encoder(family)
    assert not read_attention(stack, layers_name(stack)).causal
    assert not attention._read_mask(stack, layers_name(stack)).causal


def test_reading_the_mask_changes_nothing() -> None:
    model = causal_lm("bloom")
    before, modules = model(**batch(5)).logits, list(model.modules())
    kernel = model.config._attn_implementation
    attention._read_mask(model.transformer, "h")
    assert model.config._attn_implementation == kernel and list(model.modules()) == modules
    assert torch.equal(model(**batch(5)).logits, before)


def deberta() -> torch.nn.Module:
    return tf.DebertaModel(tf.DebertaConfig(**tiny._bert, relative_attention=True, pos_att_type=["c2p", "p2c"]))


MODELS = {
    **{family: partial(causal_lm, family) for family in ("llama", "gpt2", "opt", "bloom", "mpt", "falcon")},
    **{family: partial(encoder, family) for family in ENCODERS},
    "convbert": lambda: tf.ConvBertModel(tf.ConvBertConfig(**tiny._bert, embedding_size=32)),
    "roformer": lambda: tf.RoFormerModel(tf.RoFormerConfig(**tiny._bert, embedding_size=32)),
    "deberta": deberta,
    "t5": partial(pair, "t5"),
    "bart": partial(pair, "bart"),
    "paligemma": paligemma,
    "blip": blip,
    "git": git,
}


@pytest.mark.parametrize("fields", [{}, {"init_text": [5, 6, 7]}], ids=["plain", "text"])
@pytest.mark.parametrize("name", MODELS)
def test_attaching_draws_what_the_generator_draws(name: str, fields: dict[str, list[int]]) -> None:
    """No dropout of the base model draws random numbers while facts about it are found out, and nothing is left on it."""
    states = []
    for training in (False, True):
        base = MODELS[name]().train(training)
        modes = [module.training for module in base.modules()]
        modules = list(base.modules())
        torch.manual_seed(3)
        get_peft_model(base, IAPTConfig(**fields))
        states.append(torch.get_rng_state())
        assert [module.training for module in modules] == modes
    assert torch.equal(*states)


def test_causality_that_cannot_be_told() -> None:
    class Silent(tf.BloomModel):
        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, cache=None, **kwargs):
            return inputs_embeds

    with pytest.raises(
        ValueError, match="Whether Silent is causal cannot be told: .* its mask could not be read .* no layer is"
    ):
        read_attention(Silent(causal_lm("bloom").config), "h")
    with torch.device("meta"):
        nowhere = tf.BloomModel(causal_lm("bloom").config)
    with pytest.raises(ValueError, match="Whether BloomModel is causal cannot be told: .* its mask could not be read"):
        read_attention(nowhere, "h")


def test_layers_without_a_mask_tell_nothing() -> None:
    """RWKV is causal without attention, and XLM's layers lie in several lists, the largest of which has none: neither is an encoder."""
    small = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2}
    xlm = tf.XLMConfig(vocab_size=32, emb_dim=32, n_layers=2, n_heads=4, causal=True)
    for stack in (tf.RwkvModel(tf.RwkvConfig(**small)), tf.XLMModel(xlm)):
        name = "blocks" if isinstance(stack, tf.RwkvModel) else "ffns"
        with pytest.raises(
            ValueError, match=f"is causal cannot be told: .* modules of '{name}' take no `attention_mask`"
        ):
            read_attention(stack, name)


def test_a_causal_mask_outweighs_a_flag() -> None:
    """BigBird-Pegasus' decoder masks what is to come, and its attention declares that it does not."""
    small = {"vocab_size": 32, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    stack = tf.BigBirdPegasusForCausalLM(tf.BigBirdPegasusConfig(**small, max_position_embeddings=64)).model.decoder
    flags = [module.is_causal for module in stack.modules() if hasattr(module, "is_causal")]
    assert flags and not any(flags)
    assert read_attention(stack, "layers").causal


def test_a_causal_mask_within_the_layers() -> None:
    """GPT-1's attention holds it; its layers get one of padding only, as those of encoders do."""
    stack = tf.OpenAIGPTModel(tf.OpenAIGPTConfig(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=4))
    for training in (False, True):
        assert read_attention(stack.train(training), "h").causal


@pytest.mark.parametrize("family", STATE_SPACES)
def test_a_stack_without_attention(family: str) -> None:
    """What its layers let through is causal, but there are no keys that a prompt could be. Edits need none."""
    base = causal_lm(family)
    (info,) = describe(base)
    assert info.causal and info.causal_lm and "slots need layers" in info.no_slots
    with pytest.raises(ValueError, match="IAPT cannot be used here: slots need layers"):
        get_peft_model(base, IAPTConfig(task_type="CAUSAL_LM"))
    assert not any("iapt" in name for name, _ in base.named_modules())
    if cache_argument(type(base.backbone).forward) is not None:  # as in transformers 5.24
        get_peft_model(base, PreFTConfig(task_type="CAUSAL_LM", r=4))
