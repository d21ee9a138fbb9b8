# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What works with which method and which model family, found out by running it: `python tests/conformance.py --write`.

Each cell of the tables in docs/conformance.md is one small check on a tiny model with weights far from their start. LoRA, as
PEFT has it, runs through the same checks. A ValueError is a refusal, with its message; any other exception is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers as tf  # noqa: E402
from conformance_families import FAMILIES  # noqa: E402
from conformance_features import FEATURES  # noqa: E402
from conformance_table import COLUMNS, compact, page  # noqa: E402
from table_cells import Cell  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
PAGE, SUMMARY = ROOT / "docs" / "conformance.md", ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- conformance:begin -->", "<!-- conformance:end -->"
CHECKS = {**FEATURES, **FAMILIES}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    tf.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(row: str, method: str) -> Cell:
    """The outcome of one cell."""
    torch.manual_seed(0)
    with quiet():
        try:
            CHECKS[row](method)
        except ValueError as error:
            return Cell("refused", sentence(error))
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else type(error).__name__ + ": "
            return Cell("fails", kind + sentence(error))
    return Cell("works")


def sentence(error: Exception) -> str:
    """The first sentence of a message, on one line, without the measured number."""
    line = " ".join(str(error).split()).replace(f"{ROOT}/", "").partition(": off by")[0]
    return line.split(". ")[0].rstrip(".") + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="write docs/conformance.md and its summary in docs/compatibility.md"
    )
    parser.add_argument("--only", default="", help="run the rows only that contain this text, and print them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for row in (row for row in CHECKS if args.only in row):
        for method in COLUMNS:
            results[row, method] = run(row, method)
        print(f"{row:60}", *(results[row, method].what for method in COLUMNS), flush=True)
        for why in sorted({results[row, method].why for method in COLUMNS} - {""}):
            print(" " * 8 + why)
    if args.write and not args.only:
        PAGE.write_text(page(results))
        before, rest = SUMMARY.read_text().split(BEGIN, 1)
        SUMMARY.write_text(f"{before}{BEGIN}\n\n{compact(results)}\n\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
