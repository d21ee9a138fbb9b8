# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The invariants of outputs: a row, a sequence or a step gives the same beside others as alone, and sees nothing later."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import DECODER_NAMES, any_model, attach, attach_second, make_config, probe, said, texts
from hypothesis import assume
from hypothesis import strategies as st
from tiny import VOCAB, batch, causal_lm

from peft_instance_prompt.tools import promises


def row_of_a_padded_batch_equals_the_row_alone(data: st.DataObject) -> None:
    """A row of a padded batch, on either side, has the logits and states of the row alone."""
    base, task = any_model(data)
    model = attach(base, make_config(data, task))
    lengths = data.draw(st.lists(st.integers(2, 10), min_size=2, max_size=4), "lengths")
    right = task != "CAUSAL_LM" or data.draw(st.booleans(), "right")
    promises.rows(probe(model, task), batch(*lengths, side="right" if right else "left"))


def packed_sequence_equals_the_sequence_alone(data: st.DataObject) -> None:
    """A sequence of a packed row has the logits of the sequence alone, whatever tells the response from the instruction."""
    how = data.draw(st.sampled_from(["labels", "instruction_mask", "response_template"]), "how")
    template = [7, 8] if how == "response_template" else None
    family = data.draw(st.sampled_from(DECODER_NAMES), "family")
    model = attach(causal_lm(family), make_config(data, response_template=template))
    lengths = data.draw(
        st.lists(st.lists(st.integers(4, 12), min_size=1, max_size=3), min_size=1, max_size=2), "lengths"
    )
    assume(max(map(len, lengths)) > 1)
    alone = [[texts(n, how, seed=10 * row + number) for number, n in enumerate(ns)] for row, ns in enumerate(lengths)]
    promises.packed(probe(model), alone, pads=data.draw(st.integers(0, 3), "pads"))


def generate_with_cache_equals_without(data: st.DataObject) -> None:
    """`generate` gives the same text and logits with a cache as without one."""
    model = attach(causal_lm(data.draw(st.sampled_from(DECODER_NAMES), "family")), make_config(data))
    inputs = batch(*data.draw(st.lists(st.integers(2, 10), min_size=1, max_size=3), "lengths"))
    promises.cache(replace(probe(model), tolerance=1e-5), inputs)  # `generate` returns float32


def mixed_batch_equals_each_adapter_alone(data: st.DataObject) -> None:
    """A row of a mixed batch equals the row with its adapter alone, and a `__base__` row the bare model in the same batch."""
    family, first = data.draw(st.sampled_from(DECODER_NAMES), "family"), make_config(data)
    model = attach(causal_lm(family), first, "a")
    attach_second(model, make_config(data, cls=type(first)))
    names = data.draw(st.lists(st.sampled_from(["a", "b", "__base__"]), min_size=2, max_size=4), "adapter_names")
    lengths = [data.draw(st.integers(2, 10), "length") for _ in names]
    right = data.draw(st.booleans(), "right")
    promises.mixed(probe(model), batch(*lengths, side="right" if right else "left"), names)


def logits_do_not_depend_on_later_response_tokens(data: st.DataObject) -> None:
    """No logits depend on response tokens that come later, whatever tells the response from the instruction."""
    how = data.draw(st.sampled_from(["labels", "instruction_mask", "response_template"]), "how")
    template = [7, 8] if how == "response_template" else None
    family = data.draw(st.sampled_from(DECODER_NAMES), "family")
    model = attach(causal_lm(family), make_config(data, response_template=template))
    mode = promises.MODES[data.draw(st.booleans(), "training")]
    instruction, response = data.draw(st.integers(3, 8), "instruction"), data.draw(st.integers(2, 5), "response")
    changed = instruction + data.draw(st.integers(0, response - 1), "first token that changes")
    ids = batch(instruction + response)["input_ids"].repeat(2, 1)  # (2, S)
    ids[:, instruction - 2 : instruction] = torch.tensor([7, 8])
    ids[1, changed:] = (ids[1, changed:] + data.draw(st.integers(1, 50), "by")) % (VOCAB - 3) + 3
    one, two = ({"input_ids": row, **said(how, row, instruction)} for row in ids.split(1))
    promises.leak(probe(model), one, two, changed, [mode])
