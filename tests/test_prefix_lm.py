# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Prefix-LMs, whose `token_type_ids` let a prefix see all of itself: the prefix is the instance."""

from __future__ import annotations

import pytest
import torch
from methods import KINDS, METHODS
from peft import PeftModel, get_peft_model
from tiny import adapted, assert_same, generator_of, perturb
from uses import noise, paligemma

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.engine.stack import describe


# An image, then four tokens of prefix, then three of suffix.
IDS = torch.tensor([[90] * 4 + [1, 7, 8, 9, 11, 12, 13], [90] * 4 + [1, 5, 6, 7, 33, 34, 35]])  # (2, 11)
SPLIT = 8
MASK = (torch.arange(11) < SPLIT).long().expand(2, -1)  # (2, 11)
TYPES = {"token_type_ids": 1 - MASK}
LABELS = {"labels": IDS.where(MASK == 0, -100)}
PIXELS = {"pixel_values": noise(2, 3, 8, 8)}
OTHER = IDS.clone()
OTHER[:, SPLIT + 1 :] += 20
NEW = 4
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
# The kernel of the second is told of no causality, and gets no mask where none is needed.
KERNELS = [("gemma", "eager"), ("gemma", "sdpa"), ("gemma2", "eager")]


def prompted(text: str, kernel: str, method: str = "iapt") -> PeftModel:
    return adapted(paligemma(text, kernel), METHODS[method](task_type="CAUSAL_LM"))


@pytest.mark.parametrize(("text", "kernel"), KERNELS)
def test_it_is_a_causal_language_model(text: str, kernel: str) -> None:
    (info,) = describe(paligemma(text, kernel))
    assert info.causal and info.causal_lm and info.prefix_lm


@pytest.mark.parametrize("tells", [TYPES, {**TYPES, **LABELS}, LABELS], ids=["types", "both", "labels"])
@pytest.mark.parametrize(("text", "kernel"), KERNELS)
@torch.no_grad()
def test_no_leak(text: str, kernel: str, tells: dict[str, torch.Tensor]) -> None:
    model = prompted(text, kernel)
    if kernel == "sdpa" and "token_type_ids" not in tells:  # the bare model's own attention reads the suffix
        for mode in (False, True):
            with pytest.raises(ValueError, match="GemmaModel shows its instruction the response under 'sdpa'"):
                model.train(mode)(IDS, **PIXELS, **tells)
        mask = torch.ones_like(IDS)
        mask[0, -1] = 0  # padding: a mask is made, which is causal
        model(IDS, **PIXELS, **tells, attention_mask=mask)
        return
    out = model(IDS, **PIXELS, **tells).logits
    assert_same(model(OTHER, **PIXELS, **tells).logits[:, : SPLIT + 1], out[:, : SPLIT + 1])
    assert_same(model(IDS, **PIXELS, **tells, instruction_mask=MASK).logits, out)
    with model.disable_adapter():
        bare = model(IDS, **PIXELS, **tells).logits
    assert_same(bare, paligemma(text, kernel)(IDS, **PIXELS, **tells).logits, 0)
    assert (out - bare).abs().max() > 1e-2, "the adapter does nothing"
    assert_same(model.train()(IDS, **PIXELS, **tells).logits, out)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["idpg", "dynamic_prompt"])
@pytest.mark.parametrize(("text", "kernel"), KERNELS)
@torch.no_grad()
def test_pass_without_prompts_shows_no_response(
    text: str, kernel: str, method: str, training: bool, monkeypatch
) -> None:
    """No instruction token sees what stands behind the instruction, even where the prefix that is told goes on."""
    model = prompted(text, kernel, method).train(training)  # its vector is made from the states of that pass
    seen, encode = [], type(generator_of(model)).encode
    note = lambda self, source: (seen.append((source.frozen_states(), source.mask)), encode(self, source))[1]  # noqa: E731
    monkeypatch.setattr(type(generator_of(model)), "encode", note)

    def run(ids: torch.Tensor, **tells: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)  # Dynamic Prompting draws its choices
        return model(ids, **PIXELS, **tells).logits

    tells = {**TYPES, **LABELS}
    assert_same(run(OTHER, **tells)[:, : SPLIT + 1], run(IDS, **tells)[:, : SPLIT + 1])
    cut = torch.tensor([[6], [5]])
    short = {**TYPES, "instruction_mask": (torch.arange(11) < cut).long()}  # ends before the prefix does
    other = torch.where(torch.arange(11) < cut, IDS, IDS + 20)
    pad = torch.nn.functional.pad
    padded = {name: pad(value, (2, 1)) for name, value in {**short, "attention_mask": torch.ones_like(IDS)}.items()}
    for ids, told in ((IDS, short), (other, short), (pad(IDS, (2, 1)), padded), (pad(other, (2, 1)), padded)):
        run(ids, **told)
    for (states, mask), (others, same) in zip(seen[::2], seen[1::2]):
        assert mask.any() and torch.equal(mask, same)
        assert_same(others[mask], states[mask])


def test_nothing_tells_the_prefix() -> None:
    model = prompted("gemma", "eager").train()
    with pytest.raises(ValueError, match="A causal language model in training mode cannot tell"):
        model(IDS, **PIXELS)


@pytest.mark.parametrize("method", KINDS)
@torch.no_grad()
def test_rows_with_prefixes_of_their_own(method: str) -> None:
    """Each is what it is alone, with padding on the left and on the right."""
    model = prompted("gemma", "eager", method)
    types = torch.stack([TYPES["token_type_ids"][0], (torch.arange(11) >= 6).long()])  # (2, 11)
    out = model(IDS, **PIXELS, token_type_ids=types).logits
    for row in range(2):
        own = {"pixel_values": PIXELS["pixel_values"][row : row + 1], "token_type_ids": types[row : row + 1]}
        assert_same(model(IDS[row : row + 1], **own).logits[0], out[row])
    pad = torch.nn.functional.pad
    for left, right in ((3, 0), (0, 2)):
        mask = pad(torch.ones_like(IDS), (left, right))
        places = (mask.cumsum(dim=1) - 1).clamp(min=0) + 1  # PaliGemma counts from 1, and padding, too
        padded = {"attention_mask": mask, "position_ids": places, "token_type_ids": pad(types, (left, right))}
        wide = model(pad(IDS, (left, right)), **PIXELS, **padded).logits
        assert_same(wide[:, left : left + 11], out)


@pytest.mark.parametrize("types", [True, False])
@pytest.mark.parametrize(("text", "kernel"), KERNELS)
@torch.no_grad()
def test_generation_and_a_second_turn(text: str, kernel: str, types: bool) -> None:
    if kernel == "sdpa" and not types:
        pytest.skip("without token types, the bare model's own attention reads the suffix under SDPA")
    model = prompted(text, kernel)
    inputs = {**PIXELS, **({"token_type_ids": torch.zeros_like(IDS)} if types else {})}
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    text_out = model.generate(IDS, **inputs, **how)
    caches = [{"use_cache": False}] + ([{"cache_implementation": "static"}] if text == "gemma" else [])
    for cache in caches:  # the bare PaliGemma 2 takes no static cache
        assert torch.equal(model.generate(IDS, **inputs, **GREEDY, **cache), text_out.sequences)
    # One pass over it, whose prompt is read from the prefix.
    whole = text_out.sequences
    after = torch.nn.functional.pad(torch.full_like(IDS, 0 if types else 1), (0, NEW), value=1)
    within = torch.nn.functional.pad(torch.ones_like(IDS), (0, NEW))
    said = {} if types else {"instruction_mask": within}
    forced = model(whole, **PIXELS, token_type_ids=after, **said).logits
    assert_same(torch.stack(text_out.logits, dim=1), forced[:, -NEW - 1 : -1])
    # The same in two turns.
    first = model(
        IDS, **PIXELS, token_type_ids=after[:, :11], **({} if types else {"instruction_mask": within[:, :11]})
    )
    places = torch.arange(12, 12 + NEW)[None]
    second = model(
        whole[:, 11:],
        attention_mask=torch.ones_like(whole),
        position_ids=places,
        past_key_values=first.past_key_values,
    )
    assert_same(second.logits, forced[:, 11:])


@torch.no_grad()
def test_a_causal_mask_is_kept_where_the_kernel_hides_nothing() -> None:
    """With a static cache, `generate` hands on a causal mask if no prefix is told."""
    how = {**GREEDY, "cache_implementation": "static", "output_logits": True, "return_dict_in_generate": True}
    eager, sdpa = (prompted("gemma", kernel).generate(IDS, **PIXELS, **how).logits for kernel in ("eager", "sdpa"))
    assert_same(torch.stack(sdpa), torch.stack(eager))


def test_adapter_on_its_text_stack_alone() -> None:
    """The head lies outside, but the mask that the stack gets tells the prefix."""
    model = paligemma("gemma", "eager")
    model.model.language_model = perturb(get_peft_model(model.model.language_model, IAPTConfig()))
    model.train()
    with torch.no_grad():
        out = model(IDS, **PIXELS, **TYPES).logits
        assert_same(model(OTHER, **PIXELS, **TYPES).logits[:, : SPLIT + 1], out[:, : SPLIT + 1])
    with pytest.raises(ValueError, match="Nothing in the adapted module says"):
        model(IDS, **PIXELS)


def test_packed_rows() -> None:
    """PaliGemma hands on masks that show no padding; its text stack alone says that it cannot keep sequences apart."""
    places = torch.tensor([[*range(6), *range(5)]])
    model = adapted(paligemma().model.language_model, IAPTConfig(task_type="FEATURE_EXTRACTION"))
    with pytest.raises(ValueError, match="packed or padding-free rows.* its kernel is not causal without a mask"):
        model(torch.arange(3, 14)[None], position_ids=places)
