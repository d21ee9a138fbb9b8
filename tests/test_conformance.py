# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The tables of docs/conformance.md and its summary in docs/compatibility.md are what running their cells gives."""

from __future__ import annotations

import random

import conformance
import pytest
from conformance import BEGIN, CHECKS, END, PAGE, SUMMARY
from conformance_features import FEATURES
from conformance_table import COLUMNS, read
from tiny import native_refuses


TEXT = PAGE.read_text()
CELLS = read(TEXT)
# What a prompt that is made from the whole instance cannot be, or what a method cannot do without.
STATED = {
    ("`merge_and_unload`", None): "cannot be merged",
    ("`generate`: `prefill_chunk_size`", None): "generated from the whole instruction",
    ("`generate`: `inputs_embeds`", "ipt"): "looks the prompt up by token ids",
}
# Which methods do what is stated of all others.
TAKES = {"`generate`: `prefill_chunk_size`": {"preft"}}
SLOW = ("SFTTrainer", "`Trainer`", "torch.compile", "static cache")
QUICK = [row for row in CHECKS if not any(name in row for name in SLOW)]
AGAIN = random.Random(7).sample([(row, method) for row in QUICK for method in COLUMNS[1:]], 24)
REFUSED = [(row, "iapt" if method is None else method) for row, method in STATED if row in QUICK]


def test_every_cell_is_there() -> None:
    assert CELLS.keys() == {(row, method) for row in CHECKS for method in COLUMNS}
    assert {cell.what for cell in CELLS.values()} <= {"works", "refused", "fails"}


def test_page_and_summary_are_made_from_the_cells() -> None:
    body = TEXT.partition("## Features")
    assert conformance.page(CELLS).partition("## Features") == body
    assert SUMMARY.read_text().split(BEGIN)[1].split(END)[0].strip() == conformance.compact(CELLS)


def test_nothing_of_ours_fails_or_is_refused_without_being_stated() -> None:
    for (row, method), cell in CELLS.items():
        if method == "lora":
            continue
        assert cell.what != "fails", (row, method, cell.why)
        stated = STATED.get((row, None)) or STATED.get((row, method))
        stated = None if method in TAKES.get(row, ()) else stated
        assert (cell.what == "refused") == (stated is not None), (row, method, cell.why)
        assert (stated or "") in cell.why


def test_no_cell_is_worse_than_that_of_lora() -> None:
    rank = {"works": 0, "refused": 1, "fails": 2}
    worse = {
        (row, method)
        for row, method in CELLS
        if method != "lora" and rank[CELLS[row, method].what] > rank[CELLS[row, "lora"].what]
    }
    assert {row for row, _ in worse} <= {row for row, _ in STATED}


@pytest.mark.parametrize(("row", "method"), sorted({*AGAIN, *REFUSED}))
def test_cell(row: str, method: str) -> None:
    if "`add_adapter`" in row and (reason := native_refuses()):
        pytest.skip(reason)
    assert conformance.run(row, method) == CELLS[row, method]


@pytest.mark.parametrize("row", [row for row in QUICK if row in FEATURES][::6])
def test_cell_of_lora(row: str) -> None:
    assert conformance.run(row, "lora").what == CELLS[row, "lora"].what


def test_a_failure_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cell says follows from what its check finds."""

    def broken(*args, **kwargs):
        raise RuntimeError("broken.  It is.")

    monkeypatch.setattr("peft_instance_prompt.engine.adapters.Group.run", broken)
    row = next(iter(FEATURES))
    assert conformance.run(row, "iapt") == ("fails", "RuntimeError: broken.")
    monkeypatch.undo()
    # An adapter without any effect does not pass for one that works.
    monkeypatch.setattr("peft_instance_prompt.engine.layer.group_rows", lambda *args: [])
    for row in (row, "decoders: llama", "encoders: bert", "encoder-decoder models: t5"):
        found = conformance.run(row, "iapt")
        assert found.what == "fails" and "the adapter does nothing" in found.why
