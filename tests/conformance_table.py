# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The tables of conformance in Markdown, written from cells and read back."""

from __future__ import annotations

from conformance_families import FAMILIES, GROUPS
from conformance_features import FEATURES
from methods import KINDS, METHODS
from table_cells import Cell, footnotes, parsed, reasons, written


TITLES = {
    "lora": "LoRA",
    "iapt": "IAPT",
    "lpt": "LPT",
    "idpg": "IDPG",
    "ipt": "IPT",
    "dynamic_prompt": "DP",
    "idspam": "ID-SPAM",
    "preft": "PreFT",
}
COLUMNS = ["lora", *(kind for kind in KINDS if type(METHODS[kind]()).__module__.startswith("peft_instance_prompt."))]


def table(results: dict[tuple[str, str], Cell], rows: list[str], head: str, notes: list[str]) -> list[str]:
    """A table in Markdown; reasons are added to `notes` and their numbers stand in the cells."""
    lines = [f"| {head} | {' | '.join(TITLES.get(m, m) for m in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = [written(results[row, method], notes) for method in COLUMNS]
        lines.append(f"| {row.rpartition(': ')[2] if row in FAMILIES else row} | {' | '.join(cells)} |")
    return lines


def page(results: dict[tuple[str, str], Cell]) -> str:
    notes: list[str] = []
    lines = ["# Features and families", ""]
    lines += [
        "`python tests/conformance.py --write` makes this page: each cell is a small check on a tiny model of random weights, with an",
        "adapter far from its start. PEFT's LoRA, on the layers that PEFT chooses, runs through the same checks.",
        "",
        "- *works*: the check holds.",
        "- *refused*: a `ValueError` with the sentence below the tables.",
        "- *fails*: another exception, or the check does not hold.",
        "",
        "`tests/test_conformance.py` runs some of the cells again and compares.",
        "",
        "## Features",
        "",
        "On a Llama. Text and logits with a cache, in a batch, or of a copy are compared with those without.",
        "",
        *table(results, list(FEATURES), "feature", notes),
        "",
        "LoRA also has `add_weighted_adapter` and variants such as DoRA, which have no counterpart here.",
        "PEFT itself refuses adapters of different methods in one `PeftModel`; transformers' `add_adapter` takes LoRA and a",
        "prompt side by side.",
        "",
        "## Model families",
        "",
        "*works* means all of this: the adapter has an effect, and the output has the input's length; a row of a padded batch gives",
        "what it gives alone; `generate` with a cache = without; `adapter_names` with two adapters and the base model = each row",
        "alone; `disable_adapter` is bit-equal to the base model. The encoders are token classifiers.",
        "",
    ]
    for group, (families, *_) in GROUPS.items():
        rows = [f"{group}: {family}" for family in families]
        lines += [*table(results, rows, group, notes), ""]
    return "\n".join([*lines, "## Reasons", "", *footnotes(notes), ""])


def compact(results: dict[tuple[str, str], Cell]) -> str:
    """The summary on the page What works: rows in which all works are one row, families are counted."""
    notes: list[str] = []
    whole = [row for row in FEATURES if all(results[row, method].what == "works" for method in COLUMNS)]
    rest = [row for row in FEATURES if row not in whole]
    lines = table(results, rest, "feature", notes)
    works = " | ".join(["works"] * len(COLUMNS))
    lines.insert(
        2, f"| all {len(whole)} other features tested (padding, beams, `torch.compile`, `SFTTrainer` ...) | {works} |"
    )
    for group, (families, *_) in GROUPS.items():
        counts = [sum(results[f"{group}: {f}", m].what == "works" for f in families) for m in COLUMNS]
        lines.append(f"| {group} | {' | '.join(f'{n} of {len(families)}' for n in counts)} |")
    return "\n".join([*lines, "", *footnotes(notes)])


def read(text: str) -> dict[tuple[str, str], Cell]:
    """The cells of a page."""
    notes = reasons(text)
    methods = {title: name for name, title in TITLES.items()}
    results, columns, group = {}, [], ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| "):
            continue
        if cells[0] in ("feature", *GROUPS):
            group, columns = cells[0], [methods.get(title, title) for title in cells[1:]]
            continue
        row = cells[0] if group == "feature" else f"{group}: {cells[0]}"
        for method, cell in zip(columns, cells[1:]):
            results[row, method] = parsed(cell, notes)
    return results
