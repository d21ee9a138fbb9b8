# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the sweep found, as tests/sweep.json keeps it and as docs/sweep.md shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from table_cells import Cell, footnotes, written


RIGHT, BARE, REFUSED, WRONG = "right", "as the bare model", "refused", "WRONG"
RANK = {RIGHT: 0, BARE: 1, REFUSED: 2, WRONG: 3}
TITLES = {"lora": "LoRA", "iapt": "IAPT", "lpt": "LPT", "idpg_single": "S-IDPG"}
GROUPS = {
    "CausalLM": "Causal language models",
    "Seq2SeqLM": "Encoder-decoder models",
    "SpeechSeq2Seq": "Speech models",
    "ImageTextToText": "Vision-language models",
    "SequenceClassification": "Sequence classifiers",
    "MaskedLM": "Masked language models",
}


def worst(found: dict[str, list[str]]) -> Cell:
    """The verdict of a cell: that of its worst check, and the first sentence of why."""
    what, why = max(found.values(), key=lambda one: RANK[one[0]])
    if what == BARE:
        why = "The bare model, too: " + why.partition(": off by")[0]
    elif what == REFUSED:
        why = why.split(". ")[0]
    return Cell(what, why.rstrip(".") + "." if why else "")


def collect(folder: Path, versions: dict[str, str]) -> dict[str, Any]:
    """The whole of what was found, from the files of the types."""
    table: dict[str, Any] = {"versions": versions, "classes": {}, "not_built": {}}
    for path in sorted(folder.glob("*.json")):
        for auto, result in json.loads(path.read_text()).items():
            own = f"{result['class']}"
            if (why := result.get("not_built")) is not None:
                table["not_built"].setdefault(short(why), []).append(f"{path.stem}, {auto}")
                continue
            cells = {method: list(worst(result["methods"][method])) for method in TITLES}
            table["classes"].setdefault(auto, {})[path.stem] = {"class": own, **cells}
    return table


def short(why: str) -> str:
    return why.split(". ")[0].split("\n")[0][:160].rstrip(".") + "."


def dumped(table: dict[str, Any]) -> str:
    """As JSON with a line per class."""
    lines = [f'{{"versions": {json.dumps(table["versions"])},', '"classes": {']
    groups = []
    for auto, rows in table["classes"].items():
        body = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        groups.append(f"{json.dumps(auto)}: {{\n{body}\n}}")
    lines += [",\n".join(groups), "},", '"not_built": {']
    lines += [
        ",\n".join(f"{json.dumps(why)}: {json.dumps(types)}" for why, types in table["not_built"].items()),
        "}}",
        "",
    ]
    return "\n".join(lines)


HEAD = """# Every class of transformers

`python tests/sweep.py --write` makes this page: it builds a tiny model of random weights of each class that transformers lists for
causal, sequence-to-sequence, speech and vision-language models, sequence classifiers and masked language models, and runs it with
LoRA and with one method of each kind. IAPT writes at the input of each layer, LPT from a middle layer on, S-IDPG (from the
embeddings) at the input of the first. Vision-language and speech models that take text alone get text alone.

- **right**: all of this holds. A row padded left or right gives what it gives alone; with a cache as without; no logits depend
  on later tokens, in evaluation and in training; the logits at the end of the instruction are the same in training and in
  generation; a gradient reaches each weight of the adapter; saved and loaded, it gives the same.
- **as the bare model**: what does not hold does not hold without an adapter either.
- **refused**: a `ValueError` or `TypeError` of this package, with the sentence below the tables.
- **fails**: anything else, such as an error that PEFT raises for LoRA. `tests/test_sweep.py` allows none for our methods.
"""


def page(table: dict[str, Any]) -> str:
    notes: list[str] = []
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    counts: dict[str, dict[str, int]] = {method: dict.fromkeys(RANK, 0) for method in TITLES}
    for rows in table["classes"].values():
        for row in rows.values():
            for method in TITLES:
                counts[method][row[method][0]] += 1
    number = sum(len(rows) for rows in table["classes"].values())
    missing = sum(len(types) for types in table["not_built"].values())
    lines = [HEAD, f"Run with {versions}: {number} classes, and {missing} that are [not in the tables](#not-run).", ""]
    lines += [f"| method | {' | '.join([*RANK][:-1])} | fails |", "|---" * (len(RANK) + 1) + "|"]
    lines += [
        f"| {TITLES[m]} | {' | '.join(str(counts[m][what]) for what in RANK)} |".replace(WRONG, "fails")
        for m in TITLES
    ]
    for auto, rows in table["classes"].items():
        lines += [
            "",
            f"## {GROUPS[auto]}",
            "",
            f"| class | {' | '.join(TITLES.values())} |",
            "|---" * (len(TITLES) + 1) + "|",
        ]
        for row in rows.values():
            cells = [written(Cell(*row[method]), notes).replace(WRONG, "fails") for method in TITLES]
            lines.append(f"| `{row['class']}` | {' | '.join(cells)} |")
    lines += ["", "## Not run", "", "No tiny model of these could be built, or its plain call fails:", ""]
    for why, types in table["not_built"].items():
        lines.append(f"- {', '.join(f'`{one}`' for one in types)}: `{why}`")
    reasons = [f"`{line}`" if "`" not in line else line for line in notes]
    return "\n".join([*lines, "", "## Reasons", "", *footnotes(reasons), ""])
