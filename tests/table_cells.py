# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A cell of the tables that are found out by running: what it says, how it is written, and how it is read back."""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """`what` is "works", "refused" or "fails"; `why` says it in a sentence."""

    what: str
    why: str = ""


def written(cell: Cell, notes: list[str]) -> str:
    """The text of a cell; its reason is added to `notes`, and the number of the reason stands in the text."""
    what, why = cell
    if why and why not in notes:
        notes.append(why)
    return f"{what} [{notes.index(why) + 1}]" if why else what


def footnotes(notes: list[str]) -> list[str]:
    return [f"{number}. {why}" for number, why in enumerate(notes, start=1)]


def reasons(page: str) -> dict[str, str]:
    """The footnotes of a page, by number."""
    return dict(line.split(". ", 1) for line in page.partition("## Reasons")[2].splitlines() if ". " in line)


def parsed(text: str, notes: dict[str, str]) -> Cell:
    what, _, number = text.partition(" ")
    return Cell(what, notes[number.strip("[]")] if number else "")
