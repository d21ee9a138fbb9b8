# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Arguments of a stack with a place for each token: those that are not known are refused, Llama 3.2 Vision's are widened."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers as tf
from methods import METHODS
from tiny import adapted, assert_same, batch, causal_lm

from peft_instance_prompt.engine.calls import PER_QUERY_ARGUMENTS


IDS = torch.tensor([[5, 90, 6, 7, 8, 9, 10], [11, 90, 12, 3, 4, 13, 14]])
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@torch.no_grad()
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 7),
        torch.zeros(2, 7, 3, 4),  # a cross-attention mask as a processor gives it
        torch.zeros(2, 3, 7, 7),
        torch.zeros(1, 3, 7),
        torch.zeros(7, 2, 5),
        torch.zeros(14, 5),
        (torch.zeros(3), {"rows": torch.zeros(2, 7)}),
    ],
)
def test_unknown_argument_per_token_is_refused(value) -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    for name in ("visual_rows", *PER_QUERY_ARGUMENTS[:1]):
        with pytest.raises(ValueError, match=rf"`{name}` \(.*a place for each of 7 tokens. Call the model without it"):
            model(**batch(7, 5), **{name: value})
        with model.disable_adapter():
            model(**batch(7, 5), **{name: value})
    model(**batch(9, 5), visual_rows=value)  # nothing there has a place for each of nine tokens


def vision() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A tiny Llama 3.2 Vision, and two rows of text, each with an image. The first token sees no image, the last ones another tile."""
    text = {**tiny._text, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False}
    images = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_global_layers": 1}
    images |= {"attention_heads": 2, "image_size": 8, "patch_size": 4, "max_num_tiles": 2, "vision_output_dim": 32}
    images |= {"supported_aspect_ratios": [[1, 1], [1, 2]], "intermediate_layers_indices": [0]}
    config = tf.MllamaConfig(text_config=text, vision_config=images, image_token_index=90)
    model = tiny._random(tf.AutoModelForImageTextToText, config, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):  # zero, so that images would not be looked at
                parameter.fill_(1.0)
    seen = torch.ones(2, 7, 1, 2, dtype=torch.long)  # (B, S, images, tiles)
    seen[:, 0] = 0
    seen[:, 4:, :, 1] = 0
    pixels = torch.randn(2, 1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    tiles = {"aspect_ratio_ids": torch.tensor([[2], [2]]), "aspect_ratio_mask": torch.ones(2, 1, 2, dtype=torch.long)}
    return model, {
        "input_ids": IDS,
        "attention_mask": torch.ones_like(IDS),
        "pixel_values": pixels,
        "cross_attention_mask": seen,
        **tiles,
    }


@torch.no_grad()
@pytest.mark.parametrize("with_image", [True, False])
def test_layers_that_attend_to_an_image(kind: str, with_image: bool) -> None:
    """A text is the same with a cache, in one pass, and behind padding; without an image these layers are left out."""
    base, inputs = vision()
    bare = copy.deepcopy(base)
    inputs = inputs if with_image else {name: inputs[name] for name in ("input_ids", "attention_mask")}
    model = adapted(base, METHODS[kind](task_type="CAUSAL_LM"))
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    text = model.generate(**inputs, **how)
    ids, ones = text.sequences, torch.ones_like(text.sequences)
    scope = (torch.arange(11) < 7).expand_as(ids)
    grown = {**inputs, "input_ids": ids, "attention_mask": ones, "instruction_mask": scope}
    padded = {
        **inputs,
        "input_ids": torch.nn.functional.pad(IDS, (3, 0)),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (3, 0)),
    }
    if with_image:
        seen = inputs["cross_attention_mask"]
        grown["cross_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, 4, -1, -1)], dim=1)  # (B, 11, 1, 2)
        padded["cross_attention_mask"] = torch.cat([torch.zeros_like(seen[:, :3]), seen], dim=1)  # (B, 10, 1, 2)
    out = model(**inputs).logits
    assert (out - bare(**inputs).logits).abs().max() > 1e-2
    assert_same(torch.stack(text.logits, dim=1), model(**grown).logits[:, -5:-1])
    assert_same(model(**padded).logits[:, 3:], out)


@torch.no_grad()
@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("tokens", [3, 9], ids=["short", "long"])
def test_static_cache_whose_layers_hold_an_image(kind: str, tokens: int, with_image: bool) -> None:
    """These do not grow. The text has fewer places than the image there, or more."""
    base, inputs = vision()
    if "_prepare_static_cache" not in vars(type(base)):
        pytest.skip("this transformers gives these layers the length of the text")
    inputs = inputs if with_image else {name: inputs[name] for name in ("input_ids", "attention_mask")}
    model = adapted(base, METHODS[kind](task_type="CAUSAL_LM"))
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "output_logits": True}
    cut = {**inputs, "input_ids": IDS[:, :4], "attention_mask": torch.ones_like(IDS[:, :4])} if tokens == 3 else inputs
    if with_image:
        cut = {**cut, "cross_attention_mask": inputs["cross_attention_mask"][:, : cut["input_ids"].shape[1]]}
    both = [
        model.generate(**cut, **how, cache_implementation=cache, return_dict_in_generate=True)
        for cache in ("dynamic", "static")
    ]
    assert_same(*(torch.stack(text.logits) for text in both))
    assert torch.equal(*(text.sequences for text in both))


@torch.no_grad()
def test_slot_sees_of_an_image_what_the_token_before_it_sees(monkeypatch) -> None:
    base, inputs = vision()
    model = adapted(base, METHODS["iapt"](task_type="CAUSAL_LM", num_virtual_tokens=2, prompt_position="end"))
    rows: list[torch.Tensor] = []
    attention = base.model.language_model.layers[1]
    attention.register_forward_pre_hook(
        lambda layer, args, kwargs: rows.append(kwargs["cross_attention_mask"]), with_kwargs=True
    )
    model(**inputs, instruction_mask=(torch.arange(7) < 4).expand_as(IDS))
    (mask,) = rows  # (B, 1, 9, keys)
    # The slots stand behind the fourth token, the last that sees both tiles.
    expected = inputs["cross_attention_mask"][0, [0, 1, 2, 3, 3, 3, 4, 5, 6], 0]  # (9, tiles)
    for row in range(2):
        for place in range(1, 9):  # the first sees nothing, which the model writes in another way
            seen = (mask[row, 0, place] == 0).reshape(2, -1)  # (tiles, keys of each)
            assert torch.equal(seen, expected[place].bool()[:, None].expand_as(seen))
