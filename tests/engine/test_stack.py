# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Finding transformer stacks, and saying what is known of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from sweep_configs import tiny_config
from tiny import DECODERS, VOCAB, adapted, assert_same, batch, causal_lm

from peft_instance_prompt import IAPTConfig, LPTConfig
from peft_instance_prompt.engine.stack import describe, find_stacks, tree_of


_bert = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
ENCODERS = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(**_bert), "bert.encoder.layer"),
    "roberta": (tf.RobertaForTokenClassification, tf.RobertaConfig(**_bert, pad_token_id=1), "roberta.encoder.layer"),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(vocab_size=VOCAB, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
        "distilbert.transformer.layer",
    ),
    "electra": (tf.ElectraForQuestionAnswering, tf.ElectraConfig(**_bert, embedding_size=16), "electra.encoder.layer"),
    "deberta": (tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config(**_bert), "deberta.encoder.layer"),
    "modernbert": (
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig(**_bert, pad_token_id=0),
        "model.layers",
    ),
    "albert": (
        tf.AlbertForSequenceClassification,
        tf.AlbertConfig(**_bert, embedding_size=16, num_hidden_groups=1),
        "albert.encoder.albert_layer_groups",
    ),
}


def found(model: torch.nn.Module) -> dict:
    return {info.layers_name: info for info in describe(model)}


@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family: str) -> None:
    model = causal_lm(family)
    (info,) = found(model).values()
    stack = model.get_submodule(info.name)
    assert stack is model.base_model or stack is model.base_model.decoder  # OPT keeps it one level below
    layers = model.get_submodule(info.layers_name)
    assert info.layers_name.startswith(info.name + ".")
    assert len(layers) == info.num_layers == 3
    embedding = model.get_input_embeddings()
    assert (info.hidden_size, info.vocab_size, info.embedding_size) == (32, VOCAB, embedding.embedding_dim)
    assert (info.causal, info.causal_lm, info.encoder_of_pair, info.decoder_of_pair) == (True, True, False, False)
    assert info.max_positions == (128 if family in ("gpt2", "opt") else None)
    assert info.position_offset == 0
    assert info.sliding_window == (8 if family in ("mistral", "gemma2", "gemma3", "cohere2") else info.sliding_window)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family: str) -> None:
    model_cls, config, layers_name = ENCODERS[family]
    (info,) = found(model_cls(config)).values()
    assert info.layers_name == layers_name
    assert info.num_layers == 3, "ALBERT's one group of layers is run three times"
    assert info.hidden_size == 32
    assert info.embedding_size == (16 if family in ("electra", "albert") else 32)
    assert not (info.causal or info.causal_lm or info.encoder_of_pair or info.decoder_of_pair)
    limits = {"roberta": (62, 2), "distilbert": (512, 0), "deberta": (64, 0), "modernbert": (None, 0)}
    assert (info.max_positions, info.position_offset) == limits.get(family, (64, 0))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder(family: str) -> None:
    if family == "t5":
        config = tf.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4
        )
        model, names = tf.T5ForConditionalGeneration(config), ("encoder.block", "decoder.block")
    else:
        sizes = {
            f"{half}_{what}": n
            for half in ("encoder", "decoder")
            for what, n in (("ffn_dim", 48), ("attention_heads", 4))
        }
        config = tf.BartConfig(vocab_size=VOCAB, d_model=32, encoder_layers=3, decoder_layers=2, **sizes)
        config.max_position_embeddings = 64
        model, names = tf.BartForConditionalGeneration(config), ("model.encoder.layers", "model.decoder.layers")
    infos = found(model)
    assert tuple(infos) == names
    encoder, decoder = infos.values()
    assert (encoder.encoder_of_pair, encoder.decoder_of_pair, encoder.causal, encoder.num_layers) == (
        True,
        False,
        False,
        3,
    )
    assert (decoder.encoder_of_pair, decoder.decoder_of_pair, decoder.causal, decoder.num_layers) == (
        False,
        True,
        True,
        2,
    )
    assert not (encoder.causal_lm or decoder.causal_lm)
    assert encoder.max_positions == (None if family == "t5" else 64)


def test_vision_language_model_has_its_text_stack_only() -> None:
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    model = tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    (info,) = found(model).values()
    assert info.layers_name == "model.language_model.layers"
    assert (info.hidden_size, info.num_layers, info.causal_lm) == (32, 2, True)


def test_bare_stack_is_its_own_stack() -> None:
    (info,) = found(tf.BertModel(ENCODERS["bert"][1])).values()
    assert (info.name, info.layers_name) == ("", "encoder.layer")
    (info,) = found(causal_lm().model).values()
    assert (info.name, info.layers_name, info.causal, info.causal_lm) == ("", "layers", True, False)


def test_a_larger_list_that_is_no_list_of_layers() -> None:
    """Chameleon's text stack holds the tokenizer of its images, which outweighs the layers of a small model."""
    config = tiny_config("chameleon")
    config.vq_config.base_channels = 256
    model = tf.ChameleonForConditionalGeneration(config)
    sizes = [
        sum(p.numel() for p in part.parameters()) for part in (model.model.layers, model.model.vqmodel.encoder.down)
    ]
    assert sizes[0] < sizes[1]
    assert find_stacks(tree_of(model)) == {"model.layers": "model"}


def test_none() -> None:
    assert find_stacks(tree_of(torch.nn.Sequential(torch.nn.Linear(2, 2)))) == {}
    vit = tf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8)
    assert find_stacks(tree_of(tf.ViTModel(vit))) == {}


def test_an_input_that_is_no_table_of_embeddings_is_refused() -> None:
    """I-BERT's is quantised, and CANINE hashes characters."""
    with pytest.raises(ValueError, match="IBertModel has a QuantEmbedding in its place"):
        get_peft_model(tf.IBertModel(tf.IBertConfig(**_bert)), IAPTConfig())
    small = {**_bert, "num_hash_functions": 2, "num_hash_buckets": 16, "local_transformer_stride": 8}
    canine = tf.CanineModel(tf.CanineConfig(**{k: v for k, v in small.items() if k != "vocab_size"}))
    with pytest.raises(ValueError, match="found in CanineModel: none of its modules .* has a table of embeddings"):
        get_peft_model(canine, IAPTConfig())


@pytest.mark.skipif(not hasattr(tf, "HrmTextConfig"), reason="this release of transformers has no HRM")
def test_two_lists_of_layers_that_run_in_turns() -> None:
    """HRM's second list would see the slots that the first layers are not to see."""
    config = tf.HrmTextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers_per_stack=2,
        num_attention_heads=4,
        intermediate_size=48,
        head_dim=8,
    )
    model = tf.HrmTextForCausalLM(config).eval()
    (info,) = found(model).values()
    assert {info.layers_name, "model." + info.twin_layers} == {"model.L_module.layers", "model.H_module.layers"}
    with pytest.raises(ValueError, match="in turns: set `insertion_layer` to 0, got 1"):
        get_peft_model(model, LPTConfig(task_type="CAUSAL_LM"))
    first = adapted(model, LPTConfig(task_type="CAUSAL_LM", insertion_layer=0, dropout=0.0))
    texts = [first.generate(**batch(7, 5), max_new_tokens=4, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts)


def test_info_can_be_copied_and_pickled() -> None:
    (info,) = found(causal_lm()).values()
    assert copy.deepcopy(info) == info == pickle.loads(pickle.dumps(info))


def test_an_adapter_that_outweighs_the_layers_is_no_stack() -> None:
    """Its lists of modules lie in the stack, too, and hold more parameters than the layers of a small model."""
    base = causal_lm()
    model = get_peft_model(base, IAPTConfig(task_type="CAUSAL_LM", bottleneck_dim=2048))
    assert find_stacks(tree_of(base)) == {"model.layers": "model"}
    model.add_adapter("other", IAPTConfig(task_type="CAUSAL_LM"))
    assert set(model.peft_config["other"].target_modules) == {"model.layers"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_rows_without_adapter_have_the_positions_of_the_bare_model(family: str) -> None:
    """GPT-2 counts columns and OPT tokens where a call has no position ids."""
    base, inputs = causal_lm(family), batch(6, 9)
    expected = base(**inputs).logits[0, -6:]
    found = adapted(base, IAPTConfig(task_type="CAUSAL_LM"))(**inputs, adapter_names=["__base__", "default"]).logits
    assert_same(found[0, -6:], expected)
