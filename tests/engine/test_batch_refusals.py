# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Mixed batches that are refused: names, rows that would be moved, and adapters of another kind."""

from __future__ import annotations

import pytest
import torch
from methods import KINDS, METHODS, at_the_first_layer
from mixed_batches import GREEDY, several
from peft import LoraConfig
from tiny import adapted, assert_same, batch, causal_lm, pair, row_of, with_adapter


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_bad_names(kind: str, call: str) -> None:
    model, inputs = several(causal_lm(), kind, "CAUSAL_LM"), batch(9, 6)

    @torch.no_grad()
    def run(names) -> torch.Tensor:
        if call == "forward":
            return model(**inputs, adapter_names=names).logits
        return model.generate(**inputs, **GREEDY, adapter_names=names)

    expected = run(["a", "b"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody, someone$"):
        run(["someone", "nobody"])
    for names in (["a", "b", "c"], ["a"]):
        with pytest.raises(ValueError, match=rf"`adapter_names` must name .* each of the 2 rows, got {len(names)}\."):
            run(names)
    with pytest.raises(TypeError, match="expected a list of str"):
        run("a")
    model.train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        run(["a", "b"])
    model.eval()
    assert torch.equal(run(["a", "b"]), expected)


@torch.no_grad()
def test_bad_names_while_the_adapters_are_disabled(kind: str) -> None:
    """A head that was trained with an adapter still names the adapter of each row."""
    config = METHODS[kind](task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    model, inputs = adapted(causal_lm(), config), batch(9, 6)
    expected = causal_lm()(**inputs).logits
    tuner = model.base_model
    tuner.disable_adapter_layers()
    assert_same(tuner(**inputs, adapter_names=["default", "__base__"]).logits, expected)
    for names in ([], ["default"] * 3):
        with pytest.raises(ValueError, match=rf"`adapter_names` must name .* each of the 2 rows, got {len(names)}\."):
            tuner(**inputs, adapter_names=names)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): None$"):
        tuner(**inputs, adapter_names=[None, "default"])
    assert_same(tuner(**inputs).logits, expected)


@torch.no_grad()
@pytest.mark.slots
def test_decoder_that_counts_its_own_positions(kind: str) -> None:
    """BART's decoder takes no position ids, so rows with fewer slots than others would be moved."""
    fields = {"target_modules": ["decoder"], **at_the_first_layer(kind)}
    model = several(pair("bart"), kind, "SEQ_2_SEQ_LM", **fields)
    inputs = {**batch(9, 6, side="right"), "decoder_input_ids": batch(4, 4, seed=3)["input_ids"]}
    for names in (["a", "c"], ["a", "__base__"]):
        with pytest.raises(
            ValueError, match="different numbers of prompt slots in 'model.decoder'.*num_virtual_tokens"
        ):
            model(**inputs, adapter_names=names)
    mixed = model(**inputs, adapter_names=["a", "b"]).logits
    for row, name in enumerate("ab"):
        own = {**row_of(inputs, row), "decoder_input_ids": inputs["decoder_input_ids"][row : row + 1]}
        assert_same(mixed[row], with_adapter(model, name, model, **own).logits[0])


@pytest.mark.parametrize("other", ["lora", *KINDS])
def test_kinds_do_not_mix(kind: str, other: str) -> None:
    """One model holds adapters of one kind, as PEFT has it; and the refusal changes nothing."""
    if other == kind:
        pytest.skip("one kind")
    model, inputs = several(causal_lm(), kind, "CAUSAL_LM"), batch(9, 6)
    with torch.no_grad():
        expected = model(**inputs, adapter_names=["a", "b"]).logits
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("other", lora if other == "lora" else METHODS[other](task_type="CAUSAL_LM"))
    assert "other" not in model.peft_config
    with torch.no_grad():
        assert torch.equal(model(**inputs, adapter_names=["a", "b"]).logits, expected)
