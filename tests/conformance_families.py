# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The rows of model families: one check for each kind of model."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import transformers as tf
from conformance_models import (
    GREEDY,
    LENGTHS,
    NAMES,
    NO_CACHE,
    close,
    logits,
    must,
    of_several,
    text,
)
from tiny import DECODERS, ENCODERS, PAIRS, VLMS, batch, causal_lm, encoder, pair, row_of, vlm, with_adapter


@torch.no_grad()
def check_decoder(method: str, family: str) -> None:
    model, bare, inputs = of_several(method, causal_lm(family)), causal_lm(family), batch(*LENGTHS)
    plain, out = logits(bare, "right"), logits(model, "right")
    must(out.shape == plain.shape and not close(out, plain, 1e-3), "forward: the adapter does nothing")
    for row, n in enumerate(LENGTHS):
        must(
            close(out[row, :n], model(**row_of(inputs, row)).logits[0]), "forward: a row depends on the rows beside it"
        )
    found = text(model)
    must(torch.equal(found, text(model, use_cache=False)), "generate: the cache changes the text")
    mixed = logits(model, "right", adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        alone = with_adapter(model, name, model, **row_of(inputs, row)).logits[0]
        must(close(mixed[row, : len(alone)], alone), "adapter_names in forward: a row differs from the row alone")
    with model.disable_adapter():
        must(torch.equal(logits(model, "right"), plain), "disable_adapter: not bit-equal")


@torch.no_grad()
def check_encoder(method: str, family: str) -> None:
    base, bare = (encoder(family, tf.AutoModelForTokenClassification) for _ in range(2))
    model, inputs = of_several(method, base, "TOKEN_CLS"), batch(*LENGTHS, side="right")
    plain, out = bare(**inputs).logits, model(**inputs).logits
    # Not the logits, which a head of the adapter's own changes too.
    states = [m(**inputs, output_hidden_states=True).hidden_states[-1] for m in (model, bare)]
    must(out.shape == plain.shape and not close(*states, 1e-3), "forward: the adapter does nothing")
    mixed = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        n = LENGTHS[row]
        must(
            close(out[row, :n], model(**row_of(inputs, row)).logits[0]), "forward: a row depends on the rows beside it"
        )
        alone = with_adapter(model, name, model, **row_of(inputs, row)).logits[0]
        must(close(mixed[row, :n], alone), "adapter_names in forward: a row differs from the row alone")
    with model.disable_adapter():
        must(torch.equal(model(**inputs).logits, plain), "disable_adapter: not bit-equal")


@torch.no_grad()
def check_pair(method: str, family: str) -> None:
    model, bare = of_several(method, pair(family), "SEQ_2_SEQ_LM"), pair(family)
    inputs, target = batch(*LENGTHS, side="right"), batch(4, 4, 4, seed=3)["input_ids"]
    plain, out = (m(**inputs, decoder_input_ids=target).logits for m in (bare, model))
    must(out.shape == plain.shape and not close(out, plain, 1e-3), "forward: the adapter does nothing")
    mixed = model(**inputs, decoder_input_ids=target, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        own = {**row_of(inputs, row), "decoder_input_ids": target[row : row + 1]}
        must(close(out[row], model(**own).logits[0]), "forward: a row depends on the rows beside it")
        alone = with_adapter(model, name, model, **own).logits[0]
        must(close(mixed[row], alone), "adapter_names in forward: a row differs from the row alone")
    found = model.generate(**inputs, **GREEDY)
    must(torch.equal(found, model.generate(**inputs, **GREEDY, **NO_CACHE)), "generate: the cache changes the text")
    with model.disable_adapter():
        must(torch.equal(model(**inputs, decoder_input_ids=target).logits, plain), "disable_adapter: not bit-equal")


@torch.no_grad()
def check_vlm(method: str, family: str) -> None:
    (base, inputs), (bare, _) = vlm(family), vlm(family)
    model = of_several(method, base)
    plain, out = bare(**inputs).logits, model(**inputs).logits
    must(out.shape == plain.shape and not close(out, plain, 1e-3), "forward: the adapter does nothing")
    found = model.generate(**inputs, **GREEDY)
    must(torch.equal(found, model.generate(**inputs, **GREEDY, **NO_CACHE)), "generate: the cache changes the text")
    mixed = model(**inputs, adapter_names=["b", "default"]).logits
    must(close(mixed[1], out[1]), "adapter_names in forward: a row differs from the row alone")
    named = with_adapter(model, "b", model, **inputs).logits
    must(close(mixed[0], named[0]), "adapter_names in forward: a row differs from the row alone")
    with model.disable_adapter():
        must(torch.equal(model(**inputs).logits, plain), "disable_adapter: not bit-equal")


GROUPS: dict[str, tuple[dict, Callable[[str, str], None]]] = {
    "decoders": (DECODERS, check_decoder),
    "encoders": (ENCODERS, check_encoder),
    "encoder-decoder models": (PAIRS, check_pair),
    "vision-language models": (VLMS, check_vlm),
}
FAMILIES: dict[str, Callable[[str], None]] = {
    f"{group}: {family}": functools.partial(check, family=family)
    for group, (families, check) in GROUPS.items()
    for family in families
}
