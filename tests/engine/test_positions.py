# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""How a stack numbers its tokens is read off what it gives to its first layer."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from tiny import VOCAB, adapted, assert_same, batch, causal_lm, encoder, pair, row_of

from peft_instance_prompt import IAPTConfig, LPTConfig
from peft_instance_prompt.engine.calls import release
from peft_instance_prompt.engine.stack import describe


_small = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_small.update(intermediate_size=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
_m2m = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "pad_token_id": 0}
_m2m.update(
    {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("attention_heads", 4), ("ffn_dim", 48))}
)
_m2m.update(max_position_embeddings=64, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)

MAKERS = {
    "roformer": lambda: tf.RoFormerModel(tf.RoFormerConfig(**_small)),
    "nystromformer": lambda: tf.NystromformerModel(tf.NystromformerConfig(**_small)),
    "biogpt": lambda: tf.BioGptForCausalLM(tf.BioGptConfig(**_small)),
    "xglm": lambda: tf.XGLMForCausalLM(tf.XGLMConfig(**_m2m, num_layers=3, attention_heads=4, ffn_dim=48)),
    "m2m_100": lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**_m2m)),
    "bert": encoder,
    "roberta": lambda: encoder("roberta"),
    "bart": lambda: pair("bart"),
    "t5": pair,
    **{
        family: lambda family=family: causal_lm(family)
        for family in ("llama", "gpt2", "opt", "bloom", "falcon_rotary")
    },
}
# The position id of the first token; whether columns are numbered, distances are those of columns, and tokens are counted.
FACTS = {
    "roformer": (0, False, True, False),  # it rotates by columns
    "nystromformer": (2, False, False, False),
    "biogpt": (0, False, False, False),  # its table would count tokens, but it is always given columns
    "xglm": (0, False, False, False),
    "m2m_100": (0, True, False, True),  # a table that is computed, and no `nn.Embedding`
    "bert": (0, False, False, False),
    "roberta": (2, False, False, True),
    "bart": (0, True, False, False),
    "t5": (0, False, True, False),
    "llama": (0, False, False, False),
    "gpt2": (0, False, False, False),
    "opt": (0, False, False, True),
    "bloom": (0, False, True, False),
    "falcon_rotary": (0, False, False, False),
}


@torch.no_grad()
def made(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MAKERS[family]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FACTS)
def test_facts(family: str, training: bool) -> None:
    """In training, too, where embeddings are dropped out; and nothing of the model changes, not even a random number."""
    model = made(family).train(training)
    for info in describe(model):
        found = (
            info.position_offset,
            info.absolute_column_positions,
            info.distance_by_column,
            info.positions_from_mask,
        )
        assert found == FACTS[family], info.name
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_where_the_weights_are_elsewhere_names_tell() -> None:
    for family in ("llama", "gpt2", "bert", "roberta", "bart", "opt"):
        with torch.device("meta"):
            model = made(family)
        for info in describe(model):
            found = (
                info.position_offset,
                info.absolute_column_positions,
                info.distance_by_column,
                info.positions_from_mask,
            )
            assert found == FACTS[family], family


@pytest.mark.parametrize("family", ["roformer", "bert"])
@pytest.mark.parametrize("config", [IAPTConfig, LPTConfig])
@torch.no_grad()
def test_padded_rows_of_encoders_are_those_alone(family: str, config: type) -> None:
    model, inputs = adapted(made(family), config(bottleneck_dim=8)), batch(12, 7, side="right")
    padded = model(**inputs).last_hidden_state[1, :7]
    assert_same(padded, model(**row_of(inputs, 1)).last_hidden_state[0])


def test_late_prompts_among_tokens_that_rotate_by_column_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`prompt_position` must be 'before' .*'end'"):
        get_peft_model(made("roformer"), LPTConfig(prompt_position="end"))


@torch.no_grad()
def test_late_prompts_beside_positions_that_are_computed() -> None:
    """M2M100's encoder is as BART's: below the prompt's layer the text is the base model's, wherever the config puts it."""
    inputs = {**batch(9, 6, side="right"), "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
    expected = made("m2m_100")(**inputs, output_hidden_states=True).encoder_hidden_states
    for position in ("before", "after_first", "end"):
        model = adapted(made("m2m_100"), LPTConfig(insertion_layer=2, prompt_position=position, bottleneck_dim=8))
        found = model(**inputs, output_hidden_states=True).encoder_hidden_states
        for depth in range(3):
            assert_same(found[depth][1, :6], expected[depth][1, :6])
        assert (found[3][1, :6] - expected[3][1, :6]).abs().max() > 1e-3


@torch.no_grad()
def test_rows_without_adapter_are_counted_as_the_bare_model_counts() -> None:
    base, inputs = made("biogpt"), batch(6, 9)
    expected = base(**inputs).logits[0, -6:]
    model = adapted(base, IAPTConfig(bottleneck_dim=8))
    assert_same(model(**inputs, adapter_names=["__base__", "default"]).logits[0, -6:], expected)


def test_a_stack_that_gives_embeddings_no_positions_is_refused() -> None:
    """ESM adds positions to what it looks up, and none to embeddings that it is given, which the prompts stand between."""
    sizes = {**_small, "position_embedding_type": "absolute", "token_dropout": False, "mask_token_id": 3}
    with pytest.raises(ValueError, match="different states for `inputs_embeds`"):
        get_peft_model(tf.EsmModel(tf.EsmConfig(**sizes)).eval(), IAPTConfig())


def test_a_stack_that_takes_embeddings_and_needs_ids_is_refused() -> None:
    """LayoutLMv3 counts its positions from the ids; the refusal comes before anything is attached."""
    base = tf.LayoutLMv3Model(tf.LayoutLMv3Config(**_small, coordinate_size=4, shape_size=8, visual_embed=False))
    newest = release() >= (5, 24)  # before, its mask could not be read
    says = "LayoutLMv3Model: its forward needs `input_ids`" if newest else "LayoutLMv3Model is causal cannot be told"
    with pytest.raises(ValueError, match=says):
        get_peft_model(base, IAPTConfig())
    assert not any("iapt" in name for name, _ in base.named_modules())


def test_a_stack_that_counts_otherwise_is_refused() -> None:
    class Counter(tf.BertModel):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
            if position_ids is None:
                position_ids = 3 * torch.arange((input_ids if inputs_embeds is None else inputs_embeds).shape[1])[None]
            return super().forward(input_ids, attention_mask, None, position_ids, inputs_embeds, **kwargs)

    with pytest.raises(ValueError, match="no `position_ids` that count on"):
        get_peft_model(Counter(tf.BertConfig(**_small)), IAPTConfig())
