# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What a stack is used for: decoders behind audio or images, stacks whose head lies elsewhere, modules of the user's own."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import transformers as tf
from methods import METHODS, at_the_first_layer
from peft import PeftModel, get_peft_model
from scoped_rows import IDS, LABELS, MASK, SPLIT, TEMPLATE
from tiny import PAIRS, VOCAB, adapted, assert_same, causal_lm, configure, encoder, pair, perturb
from uses import SPOKEN_OR_SHOWN, Around, AroundBatch, OwnHead, OwnLoss, blip, git, noise

from peft_instance_prompt import IAPTConfig, instruction_scope
from peft_instance_prompt.engine import scope as rules
from peft_instance_prompt.engine.stack import describe


OTHER = IDS.clone()
OTHER[:, SPLIT + 1 :] = (OTHER[:, SPLIT + 1 :] + 7) % VOCAB
NEW = 5
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
ASKS = "Nothing in the adapted module says whether tokens of its causal stack are predicted"


# -------------------------------------------------------------------------------- encoder-decoder models of other things


@pytest.mark.parametrize("family", SPOKEN_OR_SHOWN)
def test_decoder_behind_audio_or_images(family: str) -> None:
    base, inputs = SPOKEN_OR_SHOWN[family]()
    (info,) = describe(base)
    assert info.decoder_of_pair and info.causal and not (info.causal_lm or info.undeclared or info.encoder_of_pair)
    with pytest.raises(ValueError, match=rf"from the start token alone: set `target_modules=\['{info.name}'\]`"):
        get_peft_model(base, IAPTConfig())
    with pytest.raises(ValueError, match="CAUSAL_LM does not fit the base model, which is an encoder-decoder model"):
        get_peft_model(base, IAPTConfig(task_type="CAUSAL_LM", target_modules=[info.name]))


@pytest.mark.parametrize(("method", "family"), [("iapt", f) for f in SPOKEN_OR_SHOWN] + [("idpg", "whisper")])
def test_its_instance_is_the_start_token(method: str, family: str) -> None:
    base, inputs = SPOKEN_OR_SHOWN[family]()
    (info,) = describe(base)
    config = METHODS[method](target_modules=[info.name], **at_the_first_layer(method))
    model = adapted(base, config)
    ids = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 15, 16, 17, 18, 19]])
    changed = ids.clone()
    changed[:, 3:] += 40
    with torch.no_grad():
        out = model(**inputs, decoder_input_ids=ids).logits
        assert_same(model(**inputs, decoder_input_ids=changed).logits[:, :3], out[:, :3])
        with model.disable_adapter():
            assert (model(**inputs, decoder_input_ids=ids).logits - out).abs().max() > 1e-2, "the adapter does nothing"
        how = {**GREEDY, "tgt_lang": "eng"} if family == "seamless" else GREEDY
        text = torch.as_tensor(model.generate(**inputs, **how))
        assert torch.equal(torch.as_tensor(model.generate(**inputs, **how, use_cache=False)), text)
        if family == "whisper":  # it returns what follows the start token
            text = torch.cat([torch.ones(2, 1, dtype=torch.long), text], dim=1)
        forced = model(**inputs, decoder_input_ids=text).logits.argmax(dim=-1)  # (2, 1 + NEW)
        assert torch.equal(forced[:, -NEW - 1 : -1], text[:, -NEW:])
    model.train()(**inputs, labels=ids[:, 1:].contiguous()).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_halves_are_told_apart_by_what_they_are() -> None:
    """SeamlessM4T calls its decoders `text_decoder` and `t2u_model.model.decoder`; before the second, no encoder takes tokens."""
    small = {"encoder_layers": 1, "decoder_layers": 1, "hidden_size": 32, "vocab_size": VOCAB, "t2u_vocab_size": VOCAB}
    with torch.device("meta"):
        model = tf.SeamlessM4TForTextToSpeech(tf.SeamlessM4TConfig(**small))
    assert {i.name: (i.encoder_of_pair, i.decoder_of_pair) for i in describe(model)} == {
        "text_encoder": (True, False),
        "text_decoder": (False, True),
        "t2u_model.model.decoder": (False, True),
    }
    same = tf.BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    both = tf.EncoderDecoderConfig.from_encoder_decoder_configs(same, copy.deepcopy(same))
    assert [(i.encoder_of_pair, i.decoder_of_pair) for i in describe(tf.EncoderDecoderModel(both))] == [
        (True, False),
        (False, True),
    ]
    half = tf.T5EncoderModel(PAIRS["t5"]())
    assert [(i.encoder_of_pair, i.causal) for i in describe(half)] == [(False, False)]
    for family in ("t5", "bart"):  # a decoder whose encoder lies outside of what is adapted
        (info,) = describe(pair(family).get_decoder())
        assert info.decoder_of_pair


@torch.no_grad()
def test_a_language_model_that_makes_its_stack_causal() -> None:
    base, images = blip(), {"pixel_values": noise(2, 3, 8, 8)}
    (info,) = describe(base)
    assert info.causal and info.causal_lm
    model = adapted(base, IAPTConfig())
    out = model(input_ids=IDS, labels=LABELS, **images).logits
    assert_same(model(input_ids=OTHER, labels=LABELS, **images).logits[:, : SPLIT + 1], out[:, : SPLIT + 1])
    # Its `generate` cuts the prompt before it hands it to the language model inside.
    text = model.generate(input_ids=IDS, **images, **GREEDY)
    assert torch.equal(model.generate(input_ids=IDS, **images, **GREEDY, use_cache=False), text)


def test_a_stack_that_holds_its_head() -> None:
    text = {"hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    vision = {"hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tf.Pix2StructForConditionalGeneration(tf.Pix2StructConfig(text_config=text, vision_config=vision))
    with pytest.raises(ValueError, match="Pix2StructTextModel .'decoder'. has its head within the stack"):
        get_peft_model(model, IAPTConfig(target_modules=["decoder"]))


@torch.no_grad()
def test_a_stack_that_adds_tokens() -> None:
    """A method that writes to the input alone meets no layer, where the states would show it."""
    model = adapted(git(), METHODS["ipt"](task_type="CAUSAL_LM"))
    with pytest.raises(
        ValueError, match="GitModel, which returns 20 states for 15 positions: it adds tokens of its own"
    ):
        model(IDS, pixel_values=noise(2, 3, 8, 8), instruction_mask=MASK)


@pytest.mark.parametrize("method", ["iapt", "dynamic_prompt"])
def test_a_stack_that_adds_tokens_in_training(method: str) -> None:
    """No method fits, and none is named as a cure. It adds positions where the embeddings lie, which gradients must bear."""
    model = adapted(git(), METHODS[method](task_type="CAUSAL_LM")).train()
    says = "adds tokens of its own[,;] (and where the slots stand is not known|choose another base model)"
    with pytest.raises(ValueError, match=says):
        model(IDS, pixel_values=noise(2, 3, 8, 8), instruction_mask=MASK)
    model(IDS, instruction_mask=MASK).logits.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("method", ["idpg", "dynamic_prompt"])
def test_a_stack_that_changes_its_embeddings_where_they_lie(method: str) -> None:
    """The pass without prompts, which comes first, leaves the caller's as they are."""
    model = adapted(git(), METHODS[method](task_type="CAUSAL_LM"))
    embeds = model.get_input_embeddings()(IDS)
    expected = model(IDS, instruction_mask=MASK).logits
    assert_same(model(inputs_embeds=embeds.clone(), instruction_mask=MASK).logits, expected)


# -------------------------------------------------------------------------------------------- heads that lie elsewhere


PLACE = {"prompt_position": "before"}  # the default of a stack whose head is not known


def headless(family: str, **fields) -> torch.nn.Module:
    """A causal LM whose inner stack has the adapter, in training mode and without dropout."""
    base = causal_lm(family)
    name = base.base_model_prefix
    setattr(base, name, perturb(get_peft_model(getattr(base, name), IAPTConfig(**{**PLACE, **fields}))))
    for module in base.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return base


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3"])
@torch.no_grad()
def test_head_outside_of_the_adapted_module(family: str) -> None:
    model = headless(family)
    with pytest.raises(ValueError, match=ASKS) as caught:
        model(IDS, labels=LABELS)
    assert len(str(caught.value)) < 300
    expected = adapted(causal_lm(family), IAPTConfig(**PLACE))(IDS, instruction_mask=MASK).logits
    with instruction_scope(MASK):
        assert_same(model(IDS, labels=LABELS).logits, expected)
    fields = {"response_template": TEMPLATE}
    assert_same(headless(family, **fields)(IDS, labels=LABELS).logits, expected)
    fields = {"instruction_length": SPLIT, "prompt_position": "end"}
    assert_same(
        headless(family, **fields)(IDS).logits,
        adapted(causal_lm(family), IAPTConfig(**fields))(IDS).logits,
    )
    # In generation, what is read is the prompt.
    expected = adapted(causal_lm(family), IAPTConfig(**PLACE)).generate(IDS, **GREEDY)
    assert torch.equal(model.eval().generate(IDS, **GREEDY), expected)


@torch.no_grad()
def test_several_rows_without_a_scope_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules._SAID, "plain", False)
    model = headless("llama").eval()
    with pytest.warns(UserWarning, match="A causal stack got several rows and was not told"):
        model(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_declared_task_reads_whole_rows(task: str) -> None:
    model = PeftModel(causal_lm().model, IAPTConfig(task_type=task))
    perturb(model).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(IDS).last_hidden_state
    assert_same(model(IDS, instruction_mask=torch.ones_like(IDS)).last_hidden_state, out)
    assert (model(OTHER).last_hidden_state[:, :SPLIT] - out[:, :SPLIT]).abs().max() > 1e-2


@pytest.mark.parametrize("auto", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_class_with_the_loss_of_a_classifier_reads_whole_rows(family: str, auto: str) -> None:
    base = getattr(tf, f"AutoModelFor{auto}").from_config(configure(family))
    for own in (base, Around(base)):
        (info,) = describe(own)
        assert info.causal and not (info.causal_lm or info.undeclared)
    model = adapted(base, IAPTConfig()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)
    with pytest.raises(ValueError, match="CAUSAL_LM does not fit the base model, which is an encoder, a classifier"):
        get_peft_model(model.unload(), IAPTConfig(task_type="CAUSAL_LM"))


# --------------------------------------------------------------------------------------------- modules of the user's own


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
@pytest.mark.parametrize("cls", [Around, AroundBatch, OwnLoss, OwnHead])
@torch.no_grad()
def test_module_around_a_language_model(cls: type, family: str) -> None:
    base = causal_lm(family)
    own = cls(base if cls is not OwnHead else base.base_model)
    untouched = set(vars(own.inner))
    model = adapted(own, IAPTConfig(**PLACE))
    names = ("input_ids", "labels")

    def call(*values: torch.Tensor | None) -> torch.Tensor:
        inputs = dict(zip(names, values))
        return model(inputs) if cls is AroundBatch else model(**inputs)

    reference = adapted(causal_lm(family), IAPTConfig(**PLACE))
    if cls is OwnHead:
        shown = reference(IDS, instruction_mask=MASK, output_hidden_states=True).hidden_states[-1]
        expected = own.head(shown)
    else:
        expected = reference(IDS, instruction_mask=MASK).logits
    for mode in (True, False):
        model.train(mode)
        assert_same(call(IDS, LABELS), expected)
    with pytest.raises(ValueError, match=ASKS):
        model.train()
        call(IDS, None)
    with instruction_scope(MASK):
        assert_same(call(IDS, None), expected)
    if cls in (Around, OwnLoss):
        assert_same(model(input_ids=IDS, instruction_mask=MASK), expected)
    assert set(vars(model.unload().inner)) == untouched
    assert not any("_instance_prompt" in name for module in own.modules() for name in vars(module))


@torch.no_grad()
def test_generate_of_the_language_model_inside() -> None:
    class Generating(Around):
        def generate(self, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
            return self.inner.generate(input_ids, **kwargs)

    reference = adapted(causal_lm(), IAPTConfig(**PLACE))
    for said, scope in (
        ({}, nullcontext()),
        ({"instruction_mask": MASK}, nullcontext()),
        ({}, instruction_scope(MASK)),
    ):
        expected = reference.generate(
            IDS, **GREEDY, instruction_mask=MASK if said or scope.__class__ is not nullcontext else None
        )
        for own in (Generating, Around):
            model = adapted(own(causal_lm()), IAPTConfig(**PLACE))
            generate = model.generate if own is Generating else model.get_base_model().inner.generate
            with scope if scope.__class__ is nullcontext else instruction_scope(MASK):
                for use_cache in (True, False):
                    assert torch.equal(generate(IDS, **GREEDY, **said, use_cache=use_cache), expected)


def test_own_head_on_whole_rows() -> None:
    """Labels that are one per row ask for none of its tokens; labels of another length may."""
    model = adapted(OwnHead(causal_lm().model, pools=True), IAPTConfig()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(IDS, labels=torch.tensor([0, 1]))
        assert_same(model(IDS, labels=torch.tensor([[0.5], [1.0]])), out)
    assert_same(model(IDS, instruction_mask=torch.ones_like(IDS)), out)
    for labels in (None, LABELS[:, 2:]):
        with pytest.raises(ValueError, match=ASKS):
            model(IDS, labels=labels)


def test_tasks_that_do_not_fit() -> None:
    own = Around(causal_lm())
    for model, task, says in (
        (own, "SEQ_2_SEQ_LM", "which is a causal stack without a head that is known"),
        (own, "CAUSAL_LM", "Around has no `prepare_inputs_for_generation`. Leave `task_type` out"),
        (encoder(), "CAUSAL_LM", "which is an encoder, a classifier"),
        (causal_lm(), "SEQ_CLS", "which is a causal language model"),
    ):
        before = [*model.state_dict()]
        with pytest.raises(ValueError, match=says):
            get_peft_model(model, IAPTConfig(task_type=task))
        assert [*model.state_dict()] == before
