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


def all_work(results: dict[tuple[str, str], Cell], row: str) -> bool:
    return all(results[row, method].what == "works" for method in COLUMNS)


def page(results: dict[tuple[str, str], Cell]) -> str:
    notes: list[str] = []
    lines = ["# Features and families", ""]
    lines += [
        "`python tests/conformance.py --write` makes this page by running small checks on tiny models of random weights, with adapters far",
        "from their start and with PEFT's LoRA. `tests/test_conformance.py` runs some again.",
        "",
        "- *works*: the check holds.",
        "- *refused*: a `ValueError` with the sentence below the tables.",
        "- *fails*: another exception, or the check does not hold.",
        "",
        "## Features",
        "",
        "On a Llama. Text and logits with a cache, in a batch, or of a copy are compared with those without. With LoRA and all methods",
        "these *work*:",
        "",
        *(f"- {row}" for row in FEATURES if all_work(results, row)),
        "",
        *table(results, [row for row in FEATURES if not all_work(results, row)], "feature", notes),
        "",
        "LoRA's `add_weighted_adapter` and variants such as DoRA have no counterpart here.",
        "",
        "## Model families",
        "",
        "*works* means all of this: the adapter has an effect, and the output has the input's length; a row of a padded batch gives",
        "what it gives alone; `generate` with a cache = without; `adapter_names` with two adapters and the base model = each row",
        "alone; `disable_adapter` is bit-equal to the base model. The encoders are token classifiers.",
        "",
        "| families | work with LoRA and all methods |",
        "|---|---|",
    ]
    rest = []
    for group, (families, *_) in GROUPS.items():
        rows = {f"{group}: {family}": family for family in families}
        whole = [family for row, family in rows.items() if all_work(results, row)]
        lines += [f"| {group} | {', '.join(whole)} |"] if whole else []
        if left := [row for row, family in rows.items() if family not in whole]:
            rest += ["", *table(results, left, group, notes)]
    return "\n".join([*lines, *rest, "", "## Reasons", "", *footnotes(notes), ""])


def compact(results: dict[tuple[str, str], Cell]) -> str:
    """The summary on the page What works: rows in which all work are one row, families are counted, and reasons are left out."""
    whole = [row for row in FEATURES if all_work(results, row)]
    told = {key: Cell(cell.what) for key, cell in results.items()}
    lines = table(told, [row for row in FEATURES if row not in whole], "feature", [])
    works = " | ".join(["works"] * len(COLUMNS))
    lines.insert(
        2, f"| all {len(whole)} other features tested (padding, beams, `torch.compile`, `SFTTrainer` ...) | {works} |"
    )
    alike: dict[str, list[str]] = {}  # groups of families, by the cells that they share
    for group, (families, *_) in GROUPS.items():
        counts = [sum(results[f"{group}: {f}", m].what == "works" for f in families) for m in COLUMNS]
        cells = " | ".join("works" if n == len(families) else f"{n} work" for n in counts)
        alike.setdefault(cells, []).append(f"{len(families)} {group}")
    return "\n".join([*lines, *(f"| {', '.join(groups)} | {cells} |" for cells, groups in alike.items())])


def read(text: str) -> dict[tuple[str, str], Cell]:
    """The cells of a page: those of its tables, and of what it says works with all that have a column there."""
    notes = reasons(text)
    methods = {title: name for name, title in TITLES.items()}
    results, columns, group, whole = {}, [], "", []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("- ") and line[2:] in FEATURES:
            whole.append(line[2:])
        if not line.startswith("| "):
            continue
        if len(cells) == 2:
            whole += [f"{cells[0]}: {family}" for family in cells[1].split(", ") if cells[0] in GROUPS]
        elif cells[0] in ("feature", *GROUPS):
            group, columns = cells[0], [methods.get(title, title) for title in cells[1:]]
        else:
            row = cells[0] if group == "feature" else f"{group}: {cells[0]}"
            for method, cell in zip(columns, cells[1:]):
                results[row, method] = parsed(cell, notes)
    return results | {(row, method): Cell("works") for row in whole for method in columns}
