# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The tables of docs/scripts.md are what running their cells gives."""

from __future__ import annotations

import random

import pytest
import script_table
from methods import KINDS
from peft import LoraConfig, get_peft_model
from script_table import COLUMNS, PAGE, SCRIPTS
from tiny import causal_lm


TEXT = PAGE.read_text(encoding="utf-8")
CELLS = script_table.read(TEXT)
# What no script can be changed into, and what we refuse today.
STATED = {
    ("SFT, `text`", "dynamic_prompt"): "`instruction_length`",
    ("SFT, `text`", "dynamic_prompt_all"): "`instruction_length`",
}
# Each script with one method and each kind of method with one script or more; the others are drawn.
SPOTS = [(name, KINDS[i % len(KINDS)]) for i, name in enumerate(SCRIPTS)]
REST = [(name, method) for name in SCRIPTS for method in COLUMNS if (name, method) not in SPOTS]
SPOTS += random.Random(3).sample(REST, 6)


def test_every_cell_is_there() -> None:
    assert CELLS.keys() == {(name, method) for name in SCRIPTS for method in COLUMNS}
    assert {cell.what for cell in CELLS.values()} <= {"works", "refused", "fails"}


def test_the_page_is_made_from_the_cells() -> None:
    assert script_table.page(CELLS) == TEXT


def test_no_cell_is_worse_than_that_of_lora_without_being_stated() -> None:
    for (name, method), cell in CELLS.items():
        if method == "lora" or CELLS[name, "lora"].what != "works":
            continue
        stated = STATED.get((name, None)) or STATED.get((name, method))
        assert cell.what == ("refused" if stated else "works"), (name, method, cell.why)
        assert (stated or "") in cell.why


@pytest.mark.parametrize(("name", "method"), SPOTS)
def test_cell(name: str, method: str) -> None:
    assert script_table.run(name, method) == CELLS[name, method]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("name", "method"), [cell for cell in CELLS if cell not in SPOTS])
def test_other_cell(name: str, method: str) -> None:
    assert script_table.run(name, method) == CELLS[name, method]


def test_a_failure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cell says follows from what its check finds."""
    with monkeypatch.context() as patch:  # an adapter without any effect
        patch.setattr("peft_instance_prompt.engine.layer.group_rows", lambda *args: [])
        found = script_table.run("causal", "iapt")
        assert found.what == "fails" and found.why

    with monkeypatch.context() as patch:  # a prompt that reads the response
        patch.setattr("peft_instance_prompt.engine.scope.from_labels", lambda labels, tokens, *rest: tokens)
        found = script_table.run("causal", "iapt_after_first")
        assert found.what == "fails" and "a prompt was generated from" in found.why

    def broken(*args, **kwargs):
        return len(None)  # an error that nobody raises

    with monkeypatch.context() as patch:
        patch.setattr("peft_instance_prompt.engine.adapters.Group.run", broken)
        found = script_table.run("causal", "iapt")
        assert found.what == "fails" and found.why.startswith("TypeError: object of type 'NoneType'")


def test_a_refusal_from_upstream_names_its_file() -> None:
    with pytest.raises(ValueError) as caught:
        get_peft_model(causal_lm(), LoraConfig(target_modules=["nowhere"]))
    found = script_table.outcome(caught.value)
    assert found.what == "refused" and "(peft/tuners/tuners_utils.py, `" in found.why
