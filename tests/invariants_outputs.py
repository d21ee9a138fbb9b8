# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The invariants of outputs: a row, a sequence or a step gives the same beside others as alone, and sees nothing later."""

from __future__ import annotations

import torch
from cases import (
    DECODER_NAMES,
    GREEDY,
    any_model,
    attach,
    attach_second,
    make_config,
    near,
    pack,
    precise,
    rows,
    said,
    texts,
)
from hypothesis import assume
from hypothesis import strategies as st
from tiny import VOCAB, batch, causal_lm


@torch.no_grad()
def row_of_a_padded_batch_equals_the_row_alone(data: st.DataObject) -> None:
    """A row of a padded batch, on either side, has the logits and states of the row alone."""
    base, task = any_model(data)
    model = precise(attach(base, make_config(data, task)))
    lengths = data.draw(st.lists(st.integers(2, 10), min_size=2, max_size=4), "lengths")
    right = task != "CAUSAL_LM" or data.draw(st.booleans(), "right")
    inputs = batch(*lengths, side="right" if right else "left")
    together = rows(model, inputs, task)
    for row, n in enumerate(lengths):
        alone = rows(
            model, {k: v[row : row + 1, inputs["attention_mask"][row].bool()] for k, v in inputs.items()}, task
        )
        found = together[row : row + 1]  # (1, S, ...)
        if task != "SEQ_2_SEQ_LM":  # whose decoder has no padding
            found = found[:, :n] if right else found[:, -n:]  # (1, n, ...)
        near(found, alone, model)


@torch.no_grad()
def packed_sequence_equals_the_sequence_alone(data: st.DataObject) -> None:
    """A sequence of a packed row has the logits of the sequence alone, whatever tells the response from the instruction."""
    how = data.draw(st.sampled_from(["labels", "instruction_mask", "response_template"]), "how")
    template = [7, 8] if how == "response_template" else None
    family = data.draw(st.sampled_from(DECODER_NAMES), "family")
    model = precise(attach(causal_lm(family), make_config(data, response_template=template)))
    lengths = data.draw(
        st.lists(st.lists(st.integers(4, 12), min_size=1, max_size=3), min_size=1, max_size=2), "lengths"
    )
    assume(max(map(len, lengths)) > 1)
    alone = [[texts(n, how, seed=10 * row + number) for number, n in enumerate(ns)] for row, ns in enumerate(lengths)]
    packed = pack(alone, pads=data.draw(st.integers(0, 3), "pads"))
    found = model(**packed).logits
    for row, sequences in enumerate(alone):
        column = 0
        for one in sequences:
            own = slice(column, column := column + one["input_ids"].shape[1])
            near(found[row : row + 1, own], model(**one).logits, model)


@torch.no_grad()
def generate_with_cache_equals_without(data: st.DataObject) -> None:
    """`generate` gives the same text and logits with a cache as without one."""
    model = precise(attach(causal_lm(data.draw(st.sampled_from(DECODER_NAMES), "family")), make_config(data)))
    inputs = batch(*data.draw(st.lists(st.integers(2, 10), min_size=1, max_size=3), "lengths"))
    kwargs = {**inputs, **GREEDY, "return_dict_in_generate": True, "output_logits": True}
    found, expected = (model.generate(**kwargs, use_cache=cached) for cached in (True, False))
    near(torch.stack(found.logits), torch.stack(expected.logits), model)  # float32, as `generate` returns them
    assert torch.equal(found.sequences, expected.sequences)


@torch.no_grad()
def mixed_batch_equals_each_adapter_alone(data: st.DataObject) -> None:
    """A row of a mixed batch equals the row with its adapter alone, and a `__base__` row the bare model in the same batch."""
    family = data.draw(st.sampled_from(DECODER_NAMES), "family")
    bare, first = precise(causal_lm(family)), make_config(data)
    model = attach(causal_lm(family), first, "a")
    precise(attach_second(model, make_config(data, cls=type(first))))
    names = data.draw(st.lists(st.sampled_from(["a", "b", "__base__"]), min_size=2, max_size=4), "adapter_names")
    lengths = [data.draw(st.integers(2, 10), "length") for _ in names]
    right = data.draw(st.booleans(), "right")
    inputs = batch(*lengths, side="right" if right else "left")
    together = model(**inputs, adapter_names=names).logits
    for row, (name, n) in enumerate(zip(names, lengths)):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]}
        own = slice(0, n) if right else slice(-n, None)
        if name == "__base__":  # some models count padding as positions if they are left to themselves
            expected = bare(**inputs).logits[row : row + 1, own]
        else:
            model.set_adapter(name)
            expected = model(**alone).logits
        near(together[row : row + 1, own], expected, bare)


@torch.no_grad()
def logits_do_not_depend_on_later_response_tokens(data: st.DataObject) -> None:
    """No logits depend on response tokens that come later, whatever tells the response from the instruction."""
    how = data.draw(st.sampled_from(["labels", "instruction_mask", "response_template"]), "how")
    template = [7, 8] if how == "response_template" else None
    family = data.draw(st.sampled_from(DECODER_NAMES), "family")
    model = attach(causal_lm(family), make_config(data, response_template=template))
    precise(model)
    model.train(data.draw(st.booleans(), "training"))
    instruction, response = data.draw(st.integers(3, 8), "instruction"), data.draw(st.integers(2, 5), "response")
    changed = instruction + data.draw(st.integers(0, response - 1), "first token that changes")
    ids = batch(instruction + response)["input_ids"].repeat(2, 1)  # (2, S)
    ids[:, instruction - 2 : instruction] = torch.tensor([7, 8])
    ids[1, changed:] = (ids[1, changed:] + data.draw(st.integers(1, 50), "by")) % (VOCAB - 3) + 3
    logits = []
    for one in ids.split(1):  # apart, so that dropout and random choices are the same
        torch.manual_seed(0)
        logits.append(model(input_ids=one, **said(how, one, instruction)).logits[:, :changed])
    near(*logits, model)
