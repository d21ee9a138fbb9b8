# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the sweep found, as tests/sweep.json keeps it and as docs/sweep.md shows it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from table_cells import Cell, footnotes, written


RIGHT, BARE, REFUSED, WRONG = "right", "as the bare model", "refused", "WRONG"
RANK = {RIGHT: 0, BARE: 1, REFUSED: 2, WRONG: 3}
TITLES = {"lora": "LoRA", "iapt": "IAPT", "lpt": "LPT", "idpg_single": "S-IDPG", "preft": "PreFT"}

GROUPS = {
    "CausalLM": "causal language models",
    "Seq2SeqLM": "encoder-decoder models",
    "SpeechSeq2Seq": "speech models",
    "ImageTextToText": "vision-language models",
    "SequenceClassification": "sequence classifiers",
    "MaskedLM": "masked language models",
}


def worst(found: dict[str, list[str]]) -> Cell:
    """The verdict of a cell: that of its worst check, and the first sentence of why."""
    what, why = max(found.values(), key=lambda one: RANK[one[0]])
    if what == BARE:
        why = "The bare model, too: " + why.partition(": off by")[0]
    elif what == REFUSED:
        why = why.split(". ")[0]
    return Cell(what, why.rstrip(".") + "." if why else "")


def collect(folder: Path, versions: dict[str, str], known: dict[str, Any]) -> dict[str, Any]:
    """The whole of what was found, from the files of the types. Methods that were not run have the cells of the table `known`."""
    table: dict[str, Any] = {"versions": versions, "classes": {}, "not_built": {}}
    for path in sorted(folder.glob("*.json")):
        for auto, result in json.loads(path.read_text()).items():
            own = f"{result['class']}"
            if (why := result.get("not_built")) is not None:
                table["not_built"].setdefault(short(why), []).append(f"{path.stem}, {auto}")
                continue
            cells = {m: list(worst(found)) for m, found in result["methods"].items() if m in TITLES}
            cells = {**known["classes"].get(auto, {}).get(path.stem, {}), **cells}
            table["classes"].setdefault(auto, {})[path.stem] = {
                "class": own,
                **{method: cells[method] for method in TITLES},
            }
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

`python tests/sweep.py --write` makes this page: it builds a tiny random model of each class that transformers lists for causal,
sequence-to-sequence, speech and vision-language models, sequence classifiers and masked language models, and runs it on text with LoRA
and with one method of each kind: IAPT writes at the input of each layer, LPT from a middle layer on, S-IDPG at the input of the first,
and PreFT edits the instruction.

- **right**: all of this holds. A row padded left or right gives what it gives alone; with a cache as without; no logits depend
  on later tokens, in evaluation and in training; the logits at the end of the instruction are the same in training and in
  generation; a gradient reaches each weight of the adapter; saved and loaded, it gives the same.
- **bare**: what does not hold does not hold without an adapter either.
- **refused**: a `ValueError` or `TypeError` of this package; in the table the number of its [kind](#reasons).
- **fails**: anything else, such as an error that PEFT raises for LoRA. `tests/test_sweep.py` allows none for our methods.

`tests/sweep.json` has each class's own reason.
"""
SHOWN = {RIGHT: RIGHT, BARE: "bare", REFUSED: REFUSED, WRONG: "fails"}
NAMED = re.compile(
    r"'[^']*'|\[[^]]*\]|\([^)]*\)|\b[A-Z]+[a-z0-9_]*[A-Z]\w*|\b\d+"
)  # what differs between classes in a refusal

CURE = re.compile(r": (?=set|pad|choose)")


def kind(why: str) -> str:
    """The kind of a refusal: what it says, without the names and numbers of the class, and without the cure."""
    return CURE.split(NAMED.sub("…", why))[0].rstrip(".") + "."


def shown(row: dict[str, Any], notes: list[str]) -> list[str]:
    """The cells of a class, one per method; of a refusal only the number."""
    cells = [Cell(SHOWN[what], kind(why) if what == REFUSED else "") for what, why in (row[m] for m in TITLES)]
    return [written(cell, notes).removeprefix(f"{REFUSED} ") for cell in cells]


def page(table: dict[str, Any]) -> str:
    notes: list[str] = []
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    rows = [row for group in table["classes"].values() for row in group.values()]
    missing = [one for types in table["not_built"].values() for one in types]
    counts = {m: Counter(row[m][0] for row in rows) for m in TITLES}
    lines = [
        HEAD,
        f"Run with {versions}: {len(rows)} classes. Of {len(missing)} no tiny model could be built, or its plain call fails (`not_built`).",
        "",
    ]
    lines += [f"| method | {' | '.join(SHOWN.values())} |", "|---" * (len(SHOWN) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(str(counts[m][what]) for what in SHOWN)} |" for m, title in TITLES.items()]
    alike: dict[tuple[str, ...], dict[str, None]] = {}
    lines += ["", "## The classes", "", "Right with all methods:", ""]
    for auto, group in table["classes"].items():
        of_group: dict[tuple[str, ...], dict[str, None]] = {}
        for row in group.values():
            of_group.setdefault(tuple(shown(row, notes)), {})[f"`{row['class']}`"] = None
        right = of_group.pop((RIGHT,) * len(TITLES), {})
        lines.append(f"- {GROUPS[auto]}: {', '.join(right) or 'none'}")
        for cells, names in of_group.items():
            alike.setdefault(cells, {}).update(names)
    lines += ["", "The others:", ""]
    lines += [f"| class | {' | '.join(TITLES.values())} |", "|---" * (len(TITLES) + 1) + "|"]
    lines += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in alike.items()]
    return "\n".join([*lines, "", "## Reasons", "", *footnotes(notes), ""])
