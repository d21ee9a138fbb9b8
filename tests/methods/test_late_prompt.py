# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Late prompts are exact: below their layer the text is the base model's, in every family and position, or these are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny import DECODERS, ENCODERS, PAIRS, VLMS, adapted, assert_same, batch, causal_lm, encoder, pair, perturb, vlm

from peft_instance_prompt import IDSPAMConfig, LPTConfig


LATE: dict[str, Callable[..., PeftConfig]] = {
    "lpt": lambda **kw: LPTConfig(num_virtual_tokens=3, bottleneck_dim=8, dropout=0.0, **kw),
    "idspam": lambda **kw: IDSPAMConfig(num_virtual_tokens=3, bottleneck_dim=8, attention_dim=8, dropout=0.0, **kw),
}
POSITIONS = ("before", "after_first", "end", "before_separator", "after_separator")
SEPARATOR = 95
# They read distances off the columns of their input, between which slots cannot stand below their layer.
COLUMNS = {
    *("mistral", "gemma2", "gemma3", "cohere2", "gemma3_vlm"),  # a sliding window
    *("bloom", "falcon", "mpt"),  # ALiBi
    *("deberta-v2", "modernbert", "mpnet", "t5", "mt5"),  # relative positions, a local window
}
FAMILIES = [*DECODERS, *ENCODERS, *PAIRS, *VLMS]
k = 2  # the layer at which the prompts enter


def with_separator(inputs: dict[str, torch.Tensor], place: int = 3) -> dict[str, torch.Tensor]:
    """A separator as a token of each row, by default the fourth."""
    at = inputs["attention_mask"].int().argmax(dim=1) + place  # (B,)
    inputs["input_ids"][torch.arange(len(at)), at] = SEPARATOR
    return inputs


@cache
def bare(family: str) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """A model, and batches of 9 and of 6 tokens, padded in each of the ways that move none of its tokens."""
    if family in VLMS:
        model, inputs = vlm(family)
        return model, [with_separator(inputs, place=9)]  # behind the image
    sides = ("left", "right") if family in DECODERS else ("right",)
    make = causal_lm if family in DECODERS else encoder if family in ENCODERS else pair
    batches = [with_separator(batch(9, 6, side=side)) for side in sides]
    for inputs in batches if family in PAIRS else ():
        inputs["decoder_input_ids"] = torch.tensor([[1, 5, 6], [1, 7, 8]])
    return make(family), batches


def of_row(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row alone, without padding."""
    alone = {
        name: value[row : row + 1] for name, value in inputs.items() if name not in ("pixel_values", "image_grid_thw")
    }
    real = inputs["attention_mask"][row].bool()
    return {n: value[:, real] if value.shape[1] == len(real) else value for n, value in alone.items()}


def states(out) -> tuple[torch.Tensor, ...]:
    return out.hidden_states if out.get("encoder_hidden_states") is None else out.encoder_hidden_states


@pytest.mark.parametrize("method", LATE)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_text_below_the_prompt_is_that_of_the_base_model(family: str, position: str, method: str) -> None:
    base, batches = bare(family)
    separator = {"separator_id": SEPARATOR} if "separator" in position else {}
    config = LATE[method](insertion_layer=k, prompt_position=position, **separator)
    if position != "before" and family in COLUMNS:
        with pytest.raises(
            ValueError, match=rf"`prompt_position` must be 'before' for late prompts in .*'{position}'"
        ):
            get_peft_model(base, config)
        return
    expected = []
    for inputs in batches:
        if family in VLMS:
            expected.append(list(zip(*states(base(**inputs, output_hidden_states=True)))))
        else:
            rows = [states(base(**of_row(inputs, row), output_hidden_states=True)) for row in range(2)]
            expected.append([[state[0] for state in row] for row in rows])
    model = adapted(base, config)
    try:
        for inputs, rows in zip(batches, expected):
            real = inputs["attention_mask"].bool()
            scope = real & (real.cumsum(dim=1) < 6 if family not in PAIRS and family in DECODERS else real)
            told = {"instruction_mask": scope} if family in DECODERS else {}
            actual = states(model(**inputs, **told, output_hidden_states=True))
            for row, plain in enumerate(rows):
                for depth in range(k + 1):
                    assert_same(actual[depth][row, real[row]], plain[depth])
                assert (actual[k + 1][row, real[row]] - plain[k + 1]).abs().max() > 1e-2
    finally:
        model.unload()


@pytest.mark.parametrize("method", LATE)
@pytest.mark.parametrize("position", ["before", "after_first", "end"])
@pytest.mark.parametrize("family", PAIRS)
@torch.no_grad()
def test_decoders_of_pairs(family: str, position: str, method: str) -> None:
    """Those of T5 are as its encoder; those of BART give each column a position, and the text follows the slots."""
    base, (inputs,) = bare(family)
    config = LATE[method](insertion_layer=1, prompt_position=position, target_modules=["decoder"])
    if family not in ("t5", "mt5"):
        with pytest.raises(ValueError, match=r"`insertion_layer` must be 0 in 'model.decoder.layers', got 1"):
            get_peft_model(base, config)
        config.insertion_layer = 0
        get_peft_model(base, config).unload()
    elif position != "before":
        with pytest.raises(ValueError, match=rf"`prompt_position` must be 'before' .*'{position}'"):
            get_peft_model(base, config)
    else:
        expected = base(**inputs, output_hidden_states=True).decoder_hidden_states
        model = adapted(base, config)
        actual = model(**inputs, output_hidden_states=True).decoder_hidden_states
        model.unload()
        for depth in range(2):
            assert_same(actual[depth], expected[depth])
        assert (actual[2] - expected[2]).abs().max() > 1e-2


@pytest.mark.parametrize("method", LATE)
@pytest.mark.parametrize("family", ["bart", "mbart", "pegasus", "marian"])
@torch.no_grad()
def test_positions_that_are_the_same_in_an_encoder_of_columns(family: str, method: str) -> None:
    """Late vectors have no position of their own there, so where the config puts them changes nothing, nor does padding; and
    those that the decoder attends to are the ones that were made."""
    inputs = bare(family)[1][0]
    separator = {"separator_id": SEPARATOR}
    outputs = {}
    for position in POSITIONS:
        fields = separator if "separator" in position else {}
        model = adapted(pair(family), LATE[method](insertion_layer=1, prompt_position=position, **fields))
        outputs[position] = model(**inputs).logits
        for row in range(2):
            assert_same(outputs[position][row], model(**of_row(inputs, row)).logits[0])
    for position in POSITIONS[1:]:
        assert_same(outputs[position], outputs["before"])


@pytest.mark.parametrize("method", LATE)
@torch.no_grad()
def test_rows_of_one_batch_with_other_numbers_of_slots(method: str) -> None:
    """A row has its own adapter's late slots, and unused ones beside them; a row without an adapter is the base model's."""
    model: PeftModel = adapted(pair("bart"), LATE[method](insertion_layer=1))
    other = LATE[method](insertion_layer=2)
    other.num_virtual_tokens = 5
    model.add_adapter("b", other)
    perturb(model, seed=5, adapter="b").eval()
    inputs = {name: value.repeat(2, 1)[:3] for name, value in bare("bart")[1][0].items()}
    names = ["b", "default", "__base__"]
    together = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names[:2]):
        assert_same(together[row], model(**of_row(inputs, row), adapter_names=[name]).logits[0])
    with model.disable_adapter():
        assert_same(together[2], model(**of_row(inputs, 2)).logits[0])
