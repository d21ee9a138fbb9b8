# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Every form of attention mask, made by transformers itself, must give back the padding that it was made from."""

from __future__ import annotations

import pytest
import torch
from tiny import adapted, assert_same, batch, causal_lm
from transformers import StaticCache
from transformers.masking_utils import create_masks_for_generate

from peft_instance_prompt import LPTConfig
from peft_instance_prompt.engine.widen import hide, padding_mask


MASK = batch(9, 6)["attention_mask"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_masks_for_an_empty_static_cache(family: str, attention: str, side: str) -> None:
    model = causal_lm(family, attn_implementation=attention)
    mask = batch(9, 6, side=side)["attention_mask"]
    cache = StaticCache(config=model.config, max_cache_len=14)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.compiler.set_stance("force_eager"):  # a block mask would be compiled, for ten seconds
        made = create_masks_for_generate(model.config, torch.zeros(2, 9, 32), mask, cache, positions)
    assert isinstance(made, dict) == (family == "gemma3")
    found = padding_mask(made, 2, 9, from_static_cache=True)
    assert torch.equal(found.bool(), mask.bool())


def test_plain_forms() -> None:
    assert padding_mask(None, 2, 9, False) is None
    assert padding_mask({"full_attention": None, "sliding_attention": None}, 2, 9, False) is None
    assert padding_mask(MASK, 2, 9, False) is MASK
    assert padding_mask({"sliding_attention": None, "full_attention": MASK}, 2, 9, False) is MASK
    one = torch.ones(1, 1, 9, 14).tril().bool()  # the same for all rows
    assert padding_mask(one, 2, 9, True).shape == (2, 9)


@pytest.mark.parametrize(
    ("mask", "static"),
    [
        (torch.ones(2, 8), False),
        (torch.ones(1, 9), False),
        (torch.ones(2, 9, 9), True),
        (torch.ones(2, 1, 9, 9), False),  # biases
        (torch.ones(2, 1, 9, 9).tril().triu(-2).bool(), False),  # hides tokens that are no padding
        (torch.ones(9), False),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else None,
)
def test_other_forms_are_refused(mask: torch.Tensor, static: bool) -> None:
    with pytest.raises(ValueError, match="`attention_mask`"):
        padding_mask(mask, 2, 9, static)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_hidden_is_finite_where_softmax_runs(dtype: torch.dtype) -> None:
    """Attention in float64 takes its softmax in float32, too; a slot before the text sees no key at all."""
    hidden = torch.tensor([[True, False, False]])
    masks = [None, torch.zeros(1, 1, 3, 3, dtype=dtype)]
    for mask in masks:
        made = hide(mask, hidden, 3, 0, 0, causal=True, attention="eager", dtype=dtype)
        assert made.dtype == dtype and made[0, 0, 0, 0] < -1e4
        assert made.isfinite().all() and made.float().isfinite().all()
        assert made.float().softmax(dim=-1).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@torch.no_grad()
def test_late_prompts_in_float64(family: str) -> None:
    """Unpadded rows, whose first position is a slot that the two layers below the prompt do not see."""
    outputs = []
    for attention in ("eager", "sdpa"):
        model = adapted(
            causal_lm(family, attn_implementation=attention), LPTConfig(bottleneck_dim=8, insertion_layer=2)
        ).double()
        outputs.append(model(**batch(9, 9)).logits)
    assert outputs[0].dtype == torch.float64 and outputs[0].isfinite().all()
    assert_same(outputs[0], outputs[1], tolerance=1e-5)


def test_hiding_keys_in_masks_of_each_form() -> None:
    hidden = torch.tensor([[True, False, False, False], [False, True, False, False]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    expected = causal & ~hidden[:, None, None, :]  # (2, 1, 4, 4)
    how = {"num_queries": 4, "seen": 0, "start": 0, "causal": True}
    assert torch.equal(hide(None, hidden, **how, attention="sdpa"), expected)
    assert torch.equal(hide(None, hidden, **how, attention="eager") == 0, expected)
    assert torch.equal(hide(causal.expand(2, 1, 4, 4), hidden, **how, attention="sdpa"), expected)
    biases = torch.where(causal, 0.5, torch.finfo(torch.float32).min).expand(1, 3, 4, 4)
    lowest = torch.finfo(torch.float32).min
    assert torch.equal(
        hide(biases, hidden, **how, attention="eager"), torch.where(expected, 0.5, lowest).expand(2, 3, 4, 4)
    )
    # Flash attention knows which keys are there and is causal by itself.
    assert torch.equal(hide(None, hidden, **how, attention="flash_attention_2"), ~hidden)
    assert torch.equal(hide(torch.ones(2, 4), hidden, **how, attention="flash_attention_2"), (~hidden).float())
    # One query behind 5 positions, whose keys begin with the third: a sliding window.
    step = hide(None, hidden, num_queries=1, seen=5, start=2, causal=True, attention="sdpa")
    assert torch.equal(step[:, 0, 0], ~hidden)
    assert torch.equal(hide(None, hidden, 4, 0, 0, False, "sdpa"), (~hidden)[:, None, None, :].expand(2, 1, 4, 4))
    # MPT's mask says what is hidden.
    inverted = hide(~causal.expand(2, 1, 4, 4), hidden, **how, attention="eager", true_hides=True)
    assert torch.equal(~inverted, expected)
    for mask, attention in ((torch.ones(2, 4, 4), "sdpa"), (torch.ones(2, 3), "sdpa"), ("x", "sdpa")):
        with pytest.raises(ValueError, match="need a mask of a known form"):
            hide(mask, hidden, **how, attention=attention)
