# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which classes of transformers take a prompt, found out by running each: `python tests/sweep.py --write`.

One process per model type, with a time limit and a memory limit; what it found is kept in outputs/sweep/, so that a run that was
stopped goes on where it stopped. `--write` collects that in tests/sweep.json and writes docs/sweep.md; `--check` compares.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers as tf  # noqa: E402
from peft import PeftModel  # noqa: E402, F401
from sweep_checks import Checks, Subject  # noqa: E402
from sweep_models import NotBuilt, classes, subject  # noqa: E402
from sweep_table import BARE, REFUSED, RIGHT, TITLES, WRONG, collect, dumped, page, worst  # noqa: E402

import peft_instance_prompt  # noqa: E402


FOLDER, TABLE, PAGE = ROOT / "outputs" / "sweep", ROOT / "tests" / "sweep.json", ROOT / "docs" / "sweep.md"
OURS = str(Path(peft_instance_prompt.__file__).parent)
LONGEST = 300  # letters of a refusal
SECONDS, GIB = 240, 10

Found = tuple[str, str]  # a verdict, and why


def sentence(error: BaseException) -> str:
    """A message on one line. A set in it, which is written in another order in each process, is sorted."""
    text = " ".join(str(error).split()).replace(f"{ROOT}/", "")
    return re.sub(r"\{('[^{}:]*')\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", text)


def refusal(error: Exception) -> bool:
    """Whether an error is raised on purpose, by the package."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        isinstance(error, (ValueError, TypeError)) and last.filename.startswith(OURS) and "raise " in (last.line or "")
    )


def outcome(check: Any) -> Found:
    """What a check finds, seen alone."""
    try:
        check()
    except AssertionError as error:
        return WRONG, sentence(error)
    except Exception as error:
        if refusal(error):
            text = sentence(error)
            return (REFUSED, text) if len(text) < LONGEST else (WRONG, f"a refusal of {len(text)} letters: {text}")
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return WRONG, f"{type(error).__name__}: {sentence(error)[:400]} ({where})"
    return RIGHT, ""


def checked(made: Subject, model: torch.nn.Module) -> dict[str, Found]:
    """The outcome of each check, by its name."""
    checks = Checks(made, model)
    found = {}
    for name, check in checks.of():
        torch.manual_seed(0)
        found[name] = outcome(check)
    return found


def run_class(model_type: str, auto: str, methods: Iterable[str] = TITLES) -> dict[str, dict[str, Found]]:
    """What each method's checks find in a class, by method; the bare model's under "bare"."""
    made = subject(model_type, auto)
    bare = checked(made, copy.deepcopy(made.bare))
    results = {"bare": bare}
    for method in methods:
        built: dict[str, torch.nn.Module] = {}

        def attach(method: str = method) -> None:
            built["model"] = made.with_method(method)

        attached = outcome(attach)
        found = {"attached": attached}
        if attached[0] == RIGHT:
            found.update(checked(made, built["model"]))
        for name, (what, _) in found.items():
            if what == WRONG and bare.get(name, (RIGHT,))[0] == WRONG:
                found[name] = (BARE, bare[name][1])
        results[method] = found
    return results


def run_type(model_type: str, methods: Iterable[str]) -> dict[str, Any]:
    """The outcome of each auto class of a type: a table by method and check, or the reason why there is none."""
    results: dict[str, Any] = {}
    for auto, name in classes()[model_type].items():
        start = time.monotonic()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                results[auto] = {"class": name, "methods": run_class(model_type, auto, methods)}
            except NotBuilt as error:
                results[auto] = {"class": name, "not_built": sentence(error)[:300]}
        results[auto]["seconds"] = round(time.monotonic() - start, 1)
    return results


def run_apart(model_type: str, methods: Iterable[str]) -> dict[str, Any]:
    """`run_type` in a process of its own."""
    path = FOLDER / f"{model_type}.json"
    path.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # ends the process
        resource.setrlimit(resource.RLIMIT_AS, (GIB << 30, GIB << 30))
        code = 1
        try:
            part = path.with_suffix(".part")
            part.write_text(json.dumps(run_type(model_type, methods), indent=1))
            part.rename(path)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if not path.exists():
        code = os.waitstatus_to_exitcode(status)
        why = f"took more than {SECONDS} s" if code == -signal.SIGALRM else f"its process ended with {code}"
        broken = {auto: {"class": name, "not_built": why} for auto, name in classes()[model_type].items()}
        path.write_text(json.dumps(broken, indent=1))
    return json.loads(path.read_text())


def line(model_type: str, results: dict[str, Any]) -> str:
    parts = []
    for auto, result in results.items():
        cells = result.get("methods")
        text = result.get("not_built") if cells is None else " / ".join(worst(f)[0] for m, f in cells.items())
        parts.append(f"{auto}: {text} ({result.get('seconds', 0)} s)")
    return f"{model_type:22} " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default="", help="these model types only, again: names with commas")
    parser.add_argument(
        "--methods", default=",".join(TITLES), help="names with commas; the cells of others stay as they are"
    )
    parser.add_argument("--again", action="store_true", help="also the types that outputs/sweep has already")
    parser.add_argument("--shard", default="1/1", help="k/n: the k-th of n parts")
    parser.add_argument("--write", action="store_true", help="write tests/sweep.json and docs/sweep.md afterwards")
    parser.add_argument("--check", action="store_true", help="say which cells differ from those of tests/sweep.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    FOLDER.mkdir(parents=True, exist_ok=True)
    shard, shards = map(int, args.shard.split("/"))
    methods = args.methods.split(",")
    types = args.types.split(",") if args.types else list(classes())[shard - 1 :: shards]
    for model_type in types:
        if args.types or args.again or not (FOLDER / f"{model_type}.json").exists():
            print(line(model_type, run_apart(model_type, methods)), flush=True)
    versions = {name: metadata.version(name).partition("+")[0] for name in ("transformers", "peft", "torch")}
    known = json.loads(TABLE.read_text())
    table = collect(FOLDER, versions, known)
    if args.check:
        other = differences(known, table)
        sys.exit("\n".join(other) or None)
    if args.write:
        TABLE.write_text(dumped(table))
        PAGE.write_text(page(table))


def differences(committed: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Where two tables differ, a line per class; classes that one of them does not have are left out, as a release may add some."""
    lines = []
    for auto, rows in found["classes"].items():
        for name, row in rows.items():
            own = committed["classes"].get(auto, {}).get(name)
            if own is not None and [own[m][0] for m in TITLES] != [row[m][0] for m in TITLES]:
                lines.append(f"{name}, {auto}: {[own[m][0] for m in TITLES]} became {[row[m] for m in TITLES]}")
            elif own is None and any(row[method][0] == WRONG for method in TITLES if method != "lora"):
                lines.append(f"{name}, {auto}: {[row[m] for m in TITLES]}")
    return lines


if __name__ == "__main__":
    main()
