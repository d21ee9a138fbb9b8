# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Encoder-decoder models: the slots stand in the encoder, and the decoder attends to them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from methods import KINDS, METHODS, at_the_first_layer
from peft import PeftModel, PeftModelForSeq2SeqLM
from tiny import PAIRS, VOCAB, adapted, assert_same, batch, pair, row_of

from peft_instance_prompt.engine.layer import InstancePromptLayer


LENGTHS = (9, 6, 4)
INPUTS = batch(*LENGTHS, side="right")
NEW = 6
# Tokens do not repeat: the greedy text of some random models would be one token over and over.
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "no_repeat_ngram_size": 1}
SIDES = {"encoder": None, "decoder": ["decoder"], "both": ["encoder", "decoder"]}
# The first method meets all families, the others one with relative and one with learned positions.
CASES = [(m, f) for i, m in enumerate(METHODS) for f in PAIRS if i == 0 or f == "t5" or (f == "bart" and m in KINDS)]


def prompted(method: str, family: str = "t5", side: str = "encoder", **fields) -> PeftModel:
    fields = {"task_type": "SEQ_2_SEQ_LM", "target_modules": SIDES[side], **fields}
    if family == "bart" and side != "encoder":
        fields.update(at_the_first_layer(method))
    return adapted(pair(family), METHODS[method](**fields))


def targets(model: torch.nn.Module, length: int = NEW) -> torch.Tensor:
    """Some text (B, length) for the decoder to be fed with."""
    ids = batch(length, length, length, seed=3)["input_ids"].clone()
    ids[:, 0] = model.config.decoder_start_token_id
    return ids


def row_alone(row: int) -> dict[str, torch.Tensor]:
    return {"input_ids": INPUTS["input_ids"][row : row + 1, : LENGTHS[row]]}


@pytest.mark.parametrize(("method", "family"), CASES)
@torch.no_grad()
def test_pair(method: str, family: str) -> None:
    base = pair(family, attn_implementation="eager")
    untouched = copy.deepcopy(base)
    decoder_ids = targets(base)
    shown = {"output_hidden_states": True, "output_attentions": True}
    plain = untouched(**INPUTS, decoder_input_ids=decoder_ids, **shown)
    model = adapted(base, METHODS[method](task_type="SEQ_2_SEQ_LM"))
    assert isinstance(model, PeftModelForSeq2SeqLM)
    (layer,) = (module for module in model.modules() if isinstance(module, InstancePromptLayer))
    assert layer.info.encoder_of_pair and "encoder" in layer.info.name
    num_slots = layer.generators["default"].num_slots

    # The decoder keeps its length and attends to the slots, which the encoder's output keeps.
    out = model(**INPUTS, decoder_input_ids=decoder_ids, **shown)
    assert out.logits.shape == plain.logits.shape
    assert [x.shape for x in out.decoder_hidden_states] == [x.shape for x in plain.decoder_hidden_states]
    assert [x.shape for x in out.encoder_hidden_states] == [x.shape for x in plain.encoder_hidden_states]
    assert [x.shape for x in out.encoder_attentions] == [x.shape for x in plain.encoder_attentions]
    assert out.encoder_last_hidden_state.shape[1] == 9 + num_slots
    assert all(maps.shape[-1] == 9 + num_slots for maps in out.cross_attentions)
    assert (out.logits - plain.logits).abs().max() > 1e-2 * plain.logits.abs().max(), "the adapter does nothing"

    # Padding: a row's numbers do not depend on the rows beside it, so the widened cross mask hides what it should.
    for row in range(3):
        alone = model(**row_alone(row), decoder_input_ids=decoder_ids[row : row + 1], **shown)
        assert_same(out.logits[row], alone.logits[0])
    assert_same(model(**batch(*LENGTHS, side="left"), decoder_input_ids=decoder_ids).logits[0], out.logits[0])

    # The same text with every kind of cache and without one, and what a single pass over it predicts.
    text = model.generate(**INPUTS, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert len(text.sequences[0].unique()) >= NEW
    for how in ({"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1}):
        assert torch.equal(model.generate(**INPUTS, **GREEDY, **how), text.sequences), how
    forced = model(**INPUTS, decoder_input_ids=text.sequences[:, :-1]).logits  # (B, NEW, V)
    assert_same(torch.stack(text.logits, dim=1), forced)
    bare = untouched.generate(**INPUTS, **GREEDY)

    # Disabled and unloaded: the base model, bit by bit.
    with model.disable_adapter():
        assert torch.equal(model(**INPUTS, decoder_input_ids=decoder_ids).logits, plain.logits)
        assert torch.equal(model.generate(**INPUTS, **GREEDY), bare)
    again = model.unload()
    assert torch.equal(again(**INPUTS, decoder_input_ids=decoder_ids).logits, plain.logits)
    assert torch.equal(again.generate(**INPUTS, **GREEDY), bare)
    assert again.state_dict().keys() == untouched.state_dict().keys()
    for one, other in zip(again.modules(), untouched.modules()):
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert len(one._forward_hooks) == len(other._forward_hooks)


@torch.no_grad()
@pytest.mark.slots
def test_decoder_attends_to_the_slots(kind: str) -> None:
    """With the encoder's output by hand: the logits are those of a bare decoder that is given all of its positions."""
    for family in ("t5", "bart"):
        model = prompted(kind, family)
        base, decoder_ids = model.get_base_model(), targets(model)
        encoded = base.get_encoder()(**INPUTS)
        states, order, used = (
            encoded.last_hidden_state,
            encoded.slot_order,
            encoded.slot_used,
        )  # (B, N, d), (B, N), (B, L)
        num_slots = used.shape[1]
        assert states.shape[1] == 9 + num_slots == order.shape[1]
        mask = torch.cat([used.long(), INPUTS["attention_mask"]], dim=1).gather(1, order)  # (B, N)
        expected = model(**INPUTS, decoder_input_ids=decoder_ids).logits
        plain = tf.modeling_outputs.BaseModelOutput(last_hidden_state=states)
        bare = pair(family)
        found = bare(encoder_outputs=plain, attention_mask=mask, decoder_input_ids=decoder_ids).logits
        assert_same(found, expected)
        # The slots count: without them, the decoder says something else.
        tokens = order.argsort(dim=1)[:, num_slots:]  # (B, 9)
        states = states.gather(1, tokens[..., None].expand(-1, -1, states.shape[-1]))  # (B, 9, d)
        plain = tf.modeling_outputs.BaseModelOutput(last_hidden_state=states)
        found = bare(
            encoder_outputs=plain, attention_mask=INPUTS["attention_mask"], decoder_input_ids=decoder_ids
        ).logits
        assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("side", ["decoder", "both"])
@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_slots_in_the_decoder(kind: str, family: str, side: str) -> None:
    model = prompted(kind, family, side)
    layers = [module.info for module in model.modules() if isinstance(module, InstancePromptLayer)]
    assert [info.decoder_of_pair for info in layers] == ([True] if side == "decoder" else [False, True])
    decoder_ids = targets(model)
    out = model(**INPUTS, decoder_input_ids=decoder_ids)
    assert out.logits.shape == (3, NEW, VOCAB)
    assert (out.logits - pair(family)(**INPUTS, decoder_input_ids=decoder_ids).logits).abs().max() > 1e-3
    if side == "decoder":
        assert out.encoder_last_hidden_state.shape[1] == 9
    for row in range(3):
        alone = model(**row_alone(row), decoder_input_ids=decoder_ids[row : row + 1]).logits[0]
        assert_same(out.logits[row], alone)
    # No token of the decoder but the first one is seen by its prompt, or it would leak what is to be predicted.
    changed = decoder_ids.clone()
    changed[:, 3:] = (changed[:, 3:] + 7) % VOCAB
    assert_same(model(**INPUTS, decoder_input_ids=changed).logits[:, :3], out.logits[:, :3])
    text = model.generate(**INPUTS, **GREEDY, output_logits=True, return_dict_in_generate=True)
    for how in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**INPUTS, **GREEDY, **how), text.sequences), how
    forced = model(**INPUTS, decoder_input_ids=text.sequences[:, :-1]).logits
    assert_same(torch.stack(text.logits, dim=1), forced)
    with model.disable_adapter():
        assert torch.equal(
            model(**INPUTS, decoder_input_ids=decoder_ids).logits,
            pair(family)(**INPUTS, decoder_input_ids=decoder_ids).logits,
        )


@pytest.mark.parametrize(
    ("side", "how"),
    [
        ("encoder", {"num_beams": 3, "length_penalty": 0.5}),
        ("both", {"num_beams": 3, "num_return_sequences": 2}),
        ("encoder", {"do_sample": True, "num_return_sequences": 2}),
        ("both", {"num_beams": 2, "do_sample": True}),
    ],
    ids=str,
)
def test_beams_and_sampling(kind: str, side: str, how: dict) -> None:
    model, texts = prompted(kind, "mt5", side), []
    for use_cache in (True, False):
        torch.manual_seed(1)
        texts.append(model.generate(**INPUTS, **{**GREEDY, **how}, use_cache=use_cache))
    assert torch.equal(*texts)
    assert len(texts[0]) == 3 * how.get("num_return_sequences", 1)
    if not how.get("do_sample"):
        alone = [model.generate(**row_alone(row), **{**GREEDY, **how}) for row in range(3)]
        assert torch.equal(texts[0], torch.cat(alone))


@pytest.mark.parametrize("side", ["encoder", "both"])
@torch.no_grad()
def test_encoder_outputs_given(kind: str, side: str) -> None:
    model = prompted(kind, "bart", side)
    decoder_ids = targets(model)
    expected, text = model(**INPUTS, decoder_input_ids=decoder_ids).logits, model.generate(**INPUTS, **GREEDY)
    encoded = model.get_encoder()(**INPUTS)
    other = model.get_encoder()(**batch(5, 3, 2, side="right", seed=4))  # what came last is not what counts
    assert other.last_hidden_state.shape[1] < encoded.last_hidden_state.shape[1]
    mask = INPUTS["attention_mask"]
    assert_same(model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=decoder_ids).logits, expected, 0)
    assert torch.equal(model.generate(encoder_outputs=encoded, attention_mask=mask, **GREEDY), text)
    beams = {**GREEDY, "num_beams": 2}
    expected = model.generate(**INPUTS, **beams)
    assert torch.equal(model.generate(encoder_outputs=encoded, attention_mask=mask, **beams), expected)


def test_instruction_mask(kind: str) -> None:
    """A part of the encoder's row can be the instance; the rest of it, a document perhaps, then changes no prompt."""
    model = prompted(kind)
    part = INPUTS["attention_mask"].clone()
    part[:, 3:] = 0
    with torch.no_grad():
        decoder_ids = targets(model)
        some = model(**INPUTS, instruction_mask=part, decoder_input_ids=decoder_ids).logits
        for row in range(3):
            own = part[row : row + 1, : LENGTHS[row]]
            alone = model(**row_alone(row), instruction_mask=own, decoder_input_ids=decoder_ids[row : row + 1]).logits
            assert_same(some[row], alone[0])
    text = model.generate(**INPUTS, instruction_mask=part, **GREEDY)
    assert torch.equal(model.generate(**INPUTS, instruction_mask=part, **GREEDY, use_cache=False), text)


@pytest.mark.parametrize(
    ("method", "family", "side"),
    [(m, "t5", "encoder") for m in METHODS] + [(m, "bart", "both") for m in KINDS] + [(KINDS[0], "bart", "decoder")],
)
def test_loss_and_checkpointing(method: str, family: str, side: str) -> None:
    model = prompted(method, family, side)
    labels = targets(model)[:, 1:].clone()
    labels[1, 3:] = -100

    def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(3)
        out = model.train()(**INPUTS, labels=labels)
        out.loss.backward()
        return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    out, expected = gradients()
    by_hand = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    assert_same(out.loss, by_hand)
    assert all(grad is not None and grad.isfinite().all() for grad in expected.values())
    assert sum(bool(grad.any()) for grad in expected.values()) > 0.5 * len(expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    out, actual = gradients()
    assert_same(out.loss, by_hand)
    for name in expected:
        assert_same(actual[name], expected[name], 2e-5)


@torch.no_grad()
def test_classifier_of_a_pair(kind: str) -> None:
    """BART pools its decoder at the last end token."""
    base = pair("bart", tf.AutoModelForSequenceClassification).double()  # what is compared is equal but for rounding
    inputs = {name: value.clone() for name, value in INPUTS.items()}
    for row, n in enumerate(LENGTHS):
        inputs["input_ids"][row, n - 1] = 2
    plain = base(**inputs).logits
    model = adapted(base, METHODS[kind](task_type="SEQ_CLS"))
    out = model(**inputs).logits
    assert out.shape == plain.shape and (out - plain).abs().max() > 1e-3
    for row, n in enumerate(LENGTHS):
        assert_same(out[row], model(inputs["input_ids"][row : row + 1, :n]).logits[0])
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_encoder_of_t5_alone(kind: str) -> None:
    """Without a decoder the slots leave no trace in the output."""
    torch.manual_seed(0)
    base = tf.T5EncoderModel(PAIRS["t5"]()).eval()
    plain = base(**INPUTS).last_hidden_state
    model = adapted(base, METHODS[kind](task_type="FEATURE_EXTRACTION"))
    out = model(**INPUTS).last_hidden_state
    assert out.shape == plain.shape and (out - plain).abs().max() > 1e-3
    for row, n in enumerate(LENGTHS):
        assert_same(out[row, :n], model(**row_alone(row)).last_hidden_state[0])


def test_padding_that_only_its_id_shows() -> None:
    """M2M100 numbers tokens by ids and columns of embeddings, so only rows that are padded on the right are right."""
    config = tf.M2M100Config(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = adapted(tf.M2M100ForConditionalGeneration(config).eval(), METHODS["iapt"](task_type="SEQ_2_SEQ_LM"))
    inputs, target = batch(9, 6, side="right"), batch(4, 4, seed=3)["input_ids"]
    alone = model(**row_of(inputs, 1), decoder_input_ids=target[1:]).logits
    assert_same(model(**inputs, decoder_input_ids=target).logits[1:], alone)
    with pytest.raises(ValueError, match="'model.encoder' counts its positions from the first id .* pad on the right"):
        model(**batch(9, 6, side="left"), decoder_input_ids=target)
