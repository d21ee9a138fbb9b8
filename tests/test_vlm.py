# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Vision-language models: the prompt stands in the text stack, beside the images."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from methods import KINDS, METHODS
from packaging import version
from peft import PeftModel
from tiny import VLMS, adapted, assert_same, generator_of, vlm

from peft_instance_prompt.engine.layer import InstancePromptLayer


NEW = 5
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "repetition_penalty": 5.0}
TYPES = ("mm_token_type_ids", "token_type_ids")  # which tokens are an image
# Every method meets one family; the first of each kind meets all of them.
CASES = [(m, f) for m in METHODS for f in VLMS if m in KINDS or f == "gemma3_vlm"]


def prompted(method: str, family: str) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    base, inputs = vlm(family)
    return adapted(base, METHODS[method](task_type="CAUSAL_LM")), inputs


def beside(inputs: dict[str, torch.Tensor], left: int = 0, right: int = 0) -> dict[str, torch.Tensor]:
    """The inputs with columns of padding on the left, or of text that is to come on the right."""
    named = {name: value for name, value in inputs.items() if name in TYPES}
    wide = {name: torch.nn.functional.pad(inputs[name], (left, right)) for name in ("input_ids", *named)}
    wide["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (left, 0))
    wide["attention_mask"] = torch.nn.functional.pad(wide["attention_mask"], (0, right), value=1)
    return {**inputs, **wide}


@pytest.mark.parametrize(("method", "family"), CASES)
@torch.no_grad()
def test_vlm(method: str, family: str) -> None:
    base, inputs = vlm(family)
    untouched = copy.deepcopy(base)
    plain = untouched(**inputs).logits
    model = adapted(base, METHODS[method](task_type="CAUSAL_LM"))
    (layer,) = (module for module in model.modules() if isinstance(module, InstancePromptLayer))
    assert "language_model" in layer.info.name and "vision" not in layer.info.name

    out = model(**inputs).logits
    assert out.shape == plain.shape and (out - plain).abs().max() > 1e-2, "the adapter does nothing"
    padded = beside(inputs, left=3)
    assert_same(model(**padded).logits[:, 3:], out)

    # The text alone as the instance. The image is still looked at, and reaches what is said.
    question = inputs["attention_mask"].clone()
    question[:, 2:8] = 0  # the image
    question[:, -1] = 0  # and the end, which some methods read
    asked = model(**inputs, instruction_mask=question).logits
    # Choices need not change with what they are made from.
    assert (asked - out).abs().max() > 1e-4 or method.startswith("dynamic_prompt"), "the mask makes no difference"
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    assert (model(**other, instruction_mask=question).logits[:, 8:] - asked[:, 8:]).abs().max() > 1e-2

    # The same text with a cache and without one, and what a single pass over it predicts.
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    text = model.generate(**inputs, **how, instruction_mask=question)
    assert len(text.sequences[0, -NEW:].unique()) > 2
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False, instruction_mask=question), text.sequences)
    grown = {**beside(inputs, right=NEW), "input_ids": text.sequences}
    within = torch.nn.functional.pad(question, (0, NEW))
    forced = model(**grown, instruction_mask=within).logits[:, -NEW - 1 : -1]  # (B, NEW, V)
    assert_same(torch.stack(text.logits, dim=1), forced)
    wide = torch.nn.functional.pad(question, (3, 0))
    if version.parse(tf.__version__) >= version.parse(
        "5.23"
    ):  # before, Qwen2.5-VL counts generated pad ids as padding
        assert torch.equal(model.generate(**padded, **GREEDY, instruction_mask=wide)[:, 3:], text.sequences)
    bare = untouched.generate(**inputs, **GREEDY)

    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model.generate(**inputs, **GREEDY), bare)
    again = model.unload()
    assert torch.equal(again(**inputs).logits, plain)
    assert again.state_dict().keys() == untouched.state_dict().keys()


@pytest.mark.parametrize("family", VLMS)
@torch.no_grad()
def test_image_sees_itself_whole(kind: str, family: str) -> None:
    """In Gemma 3 the tokens of an image see each other in both directions, with slots as without; in Qwen they do not."""
    base, inputs = vlm(family)
    base.set_attn_implementation("eager")
    plain = base(**inputs, output_attentions=True).attentions
    model = adapted(base, METHODS[kind](task_type="CAUSAL_LM"))
    found = model(**inputs, output_attentions=True).attentions
    assert [maps.shape for maps in found] == [maps.shape for maps in plain]
    allowed = torch.ones(11, 11).tril().bool()
    if family == "gemma3_vlm":
        allowed[3:7, 3:7] = True
    for maps in found:
        assert (maps[:, :, ~allowed] == 0).all()
        assert ((maps * allowed.triu(1)).sum(dim=(1, 2, 3)) > 0).all() == (family == "gemma3_vlm")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", VLMS)
@torch.no_grad()
def test_pass_without_prompts_is_the_bare_models_own(family: str, attention: str, monkeypatch) -> None:
    """Images keep their bidirectional attention in it, whatever cache the mask was made for."""
    base, inputs = vlm(family)
    base.set_attn_implementation(attention)
    bare = copy.deepcopy(base)
    model = adapted(base, METHODS["idpg"](task_type="CAUSAL_LM", instance_source="frozen"))
    expected, actual = [], []
    bare.get_decoder().register_forward_hook(lambda stack, args, output: expected.append(output.last_hidden_state))
    encode = type(generator_of(model)).encode
    note = lambda self, source: (actual.append(source.frozen_states()), encode(self, source))[1]  # noqa: E731
    monkeypatch.setattr(type(generator_of(model)), "encode", note)
    bare(**inputs)
    model(**inputs)
    for cache in ("dynamic", "static"):
        model.generate(**inputs, **GREEDY, cache_implementation=cache)
    assert len(actual) == 3
    for states in actual:
        assert_same(states, expected[0])
    model(**beside(inputs, left=3))
    assert_same(actual[-1][:, -11:], expected[0], 1e-4)


@pytest.mark.parametrize("family", VLMS)
def test_training(kind: str, family: str) -> None:
    model, inputs = prompted(kind, family)
    labels = inputs["input_ids"].clone()
    labels[:, :9] = -100
    model.train()(**inputs, labels=labels).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "vision" in n]


def test_beams(kind: str) -> None:
    for family in VLMS:
        model, inputs = prompted(kind, family)
        how = {**GREEDY, "num_beams": 2}
        text = model.generate(**inputs, **how)
        assert torch.equal(model.generate(**inputs, **how, use_cache=False), text)
