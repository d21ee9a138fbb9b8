# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The search for counterexamples to the invariants: `python tests/fuzz.py --seconds 120 --write docs/invariants.md`.

`FUZZ_SEED` is the seed of the first round (0), `FUZZ_SECONDS` the time for all invariants; without it each is tried in one
round, the same every time. A failure says how to see it again.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hypothesis import HealthCheck, Phase, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from invariants import INVARIANTS  # noqa: E402


PAGE = Path(__file__).resolve().parents[1] / "docs" / "invariants.md"
ROUND = 24  # cases
SEED = int(os.environ.get("FUZZ_SEED", 0))
SECONDS = float(os.environ["FUZZ_SECONDS"]) if "FUZZ_SECONDS" in os.environ else None
PACKAGES = ("torch", "transformers", "peft", "hypothesis")


class Found(NamedTuple):
    """`tried` counts the cases that were tried to their end; `failure` is the smallest counterexample of the last round."""

    tried: int
    failure: Exception | None
    seed: int


def search(
    invariant: Callable[[st.DataObject], None], seed: int = SEED, seconds: float | None = None, shrink: bool = True
) -> Found:
    """Try an invariant on cases that follow from the seed, in rounds whose seeds count upwards, until one of them fails.

    Args:
        invariant (`Callable`): Draws a case and raises an exception if it does not hold.
        seed (`int`): The seed of the first round.
        seconds (`float`, *optional*): No round begins later than this. None: one round.
        shrink (`bool`): Whether to look for the smallest counterexample.
    """
    started, tried = time.monotonic(), 0

    def counted(data: st.DataObject) -> None:
        nonlocal tried
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            invariant(data)
        tried += 1

    while True:
        case = hypothesis.seed(seed)(hypothesis.given(st.data())(counted))
        try:
            # No database: what an earlier run has found must not decide what this one tries.
            settings(
                max_examples=ROUND,
                deadline=None,
                database=None,
                print_blob=False,
                report_multiple_bugs=False,
                phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            )(case)()
        except Exception as failure:
            name = invariant.__name__
            failure.add_note(f"Seed {seed}. Again: FUZZ_SEED={seed} python -m pytest tests/test_fuzz.py -k {name}")
            return Found(tried, failure, seed)
        if seconds is None or time.monotonic() - started > seconds:
            return Found(tried, None, seed)
        seed += 1


def page(results: dict[str, Any]) -> str:
    """The page of the invariants' docstrings, with what was found of each."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [
        "# Invariants",
        "",
        "`python tests/fuzz.py --seconds 90 --write docs/invariants.md` writes this page: it draws configs, tiny models of all families,",
        "batches, adapters and damaged files, and looks for a case in which an invariant does not hold. The test suite tries each again.",
        f"Seed {SEED}, Python {platform.python_version()}, {packages}.",
        "",
        "| invariant | cases tried | failures |",
        "|---|---|---|",
    ]
    for name, invariant in INVARIANTS.items():
        found = results[name]
        lines.append(f"| {invariant.__doc__} | {found.tried} | {int(found.failure is not None)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS or 60.0, help="the time for all invariants together")
    parser.add_argument("--only", default="", help="try the invariants only whose name contains this text")
    parser.add_argument("--write", type=Path, help="the page to write, e.g. docs/invariants.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = {name: invariant for name, invariant in INVARIANTS.items() if args.only in name}
    results = {}
    for name, invariant in chosen.items():
        results[name] = found = search(invariant, SEED, args.seconds / len(chosen))
        print(f"{name:40} seeds {SEED} to {found.seed}: {found.tried} cases", flush=True)
        if found.failure is not None:
            print("   ", type(found.failure).__name__, str(found.failure)[:1500])
            print(*(f"    {line}" for line in getattr(found.failure, "__notes__", ())), sep="\n", flush=True)
    if args.write and chosen == INVARIANTS:
        args.write.write_text(page(results), encoding="utf-8")
    raise SystemExit(any(found.failure is not None for found in results.values()))


if __name__ == "__main__":
    main()
