# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The rows of model families: the promises that each kind of model keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import transformers as tf
from conformance_models import LENGTHS, NAMES, of_several
from tiny import DECODERS, ENCODERS, PAIRS, VLMS, batch, causal_lm, encoder, pair, vlm

from peft_instance_prompt.tools import promises
from peft_instance_prompt.tools.promises import Probe


def last_states(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**inputs, output_hidden_states=True).hidden_states[-1]


def check_family(method: str, group: str, family: str) -> None:
    _, task, build = GROUPS[group]
    inputs = vlm(family)[1] if group == "vision-language models" else batch(*LENGTHS, side="right")
    probe = Probe(of_several(method, build(family), task), per_token=task != "SEQ_2_SEQ_LM")
    # Not the logits of an encoder, which a head of the adapter's own changes too.
    promises.effect(replace(probe, outputs=last_states) if task == "TOKEN_CLS" else probe, inputs)
    if "pixel_values" in inputs:  # which are not told apart by row
        promises.mixed(probe, inputs, ["b", "default"], whole=True)
    else:
        promises.rows(probe, inputs)
        promises.mixed(probe, inputs, NAMES)
    if task != "TOKEN_CLS":
        promises.cache(probe, inputs)
    promises.disabled(probe, inputs, replace(probe, model=build(family))(**inputs))


GROUPS: dict[str, tuple[dict, str, Callable[[str], torch.nn.Module]]] = {
    "decoders": (DECODERS, "CAUSAL_LM", causal_lm),
    "encoders": (ENCODERS, "TOKEN_CLS", functools.partial(encoder, auto=tf.AutoModelForTokenClassification)),
    "encoder-decoder models": (PAIRS, "SEQ_2_SEQ_LM", pair),
    "vision-language models": (VLMS, "CAUSAL_LM", lambda family: vlm(family)[0]),
}
FAMILIES: dict[str, Callable[[str], None]] = {
    f"{group}: {family}": functools.partial(check_family, group=group, family=family)
    for group, (families, *_) in GROUPS.items()
    for family in families
}
