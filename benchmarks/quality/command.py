# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""The command line of the two suites: which cells, in which order, what they will take, and running those that are not there."""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
import transformers
from machine import RESULTS, setup

from quality.cells import Cell, Plan, run_cell
from quality.methods import METHODS


# The fewest methods that say whether the instance matters, and whether it is better than LoRA.
CORE = ("lora-r16", "iapt", "iapt-constant", "m-idpg", "m-idpg-constant")
REST = tuple(name for name in METHODS if name not in CORE)


def cells(tasks: list[str], methods: list[str], sizes: list[str], seeds: list[int]) -> list[Cell]:
    """All cells, the most telling first; of a method and a task, seed 0 before the others."""
    core = [name for name in CORE if name in methods]
    rest = [name for name in REST if name in methods]
    phases = [(core, "full", [0]), (rest, "full", [0]), (core, "full", [1, 2]), (core, "100", [0, 1, 2])]
    phases += [(rest, "full", [1, 2]), (rest, "100", [0, 1, 2])]
    for size in sizes:
        phases.append((methods, size, sorted(seeds)))
    found = [
        Cell(task, size, method, seed)
        for names, size, numbers in phases
        for seed in numbers
        for task in tasks
        for method in names
        if size in sizes and seed in seeds and (method != "zero-shot" or seed == 0)
    ]
    return list(dict.fromkeys(found))


def estimate(cell: Cell, plan: Plan, known: list[dict], guess: float) -> float:
    """Seconds: what like cells took, or else a guess per step."""
    runs = plan.rates if cell.seed == 0 else 1
    if cell.method == "zero-shot":
        return 10.0
    like = [r for r in known if r["task"] == cell.task and r["method"] == cell.method and r["steps"]]
    like = like or [r for r in known if r["task"] == cell.task and r["steps"]]
    if like:
        train = statistics.median(r["train_seconds"] / r["steps"] for r in like) * plan.steps_of(cell.task)
        return runs * train * 1.1 + statistics.median(r["test_seconds"] for r in like)
    return (runs + 0.7) * plan.steps_of(cell.task) * guess


def main(name: str, description: str, make_suite, defaults: dict) -> None:
    """
    Args:
        name: Of the suite, and of its folder of results.
        make_suite: Takes folder, device and overrides of the model's config.
        defaults: `folder` (a function that gives the folder of the model), `tasks`, `methods`, `steps`, `mixture_steps`,
            `batch_size`, `most`, `step_seconds` (a guess, on one core), `smoke` (a task, and overrides of the model's config); if any,
            `likely` (as in `Plan`).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(defaults["tasks"]), help="(default: %(default)s)")
    parser.add_argument("--methods", default=",".join(defaults["methods"]), help="(default: %(default)s)")
    parser.add_argument("--sizes", default="full,100", help="numbers of training examples (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    parser.add_argument("--rates", type=int, default=3, help="learning rates to try (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=defaults["steps"], help="(default: %(default)s)")
    parser.add_argument("--mixture-steps", type=int, default=defaults["mixture_steps"], help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=defaults["batch_size"], help="(default: %(default)s)")
    parser.add_argument(
        "--most", default="{},{}".format(*defaults["most"]), help="examples in dev, test (%(default)s)"
    )
    parser.add_argument("--model", help="folder or hub name (default: the one that PyPI has)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; see --shard for more (default: %(default)s)")
    parser.add_argument("--results", type=Path, help=f"folder (default: benchmarks/results/{name}/MODEL)")
    parser.add_argument("--shard", default="0/1", help="k/n: one of n processes that share the cells (%(default)s)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin no cell after this many seconds")
    parser.add_argument(
        "--plan", action="store_true", help="print the cells that are missing, and what they will take"
    )
    parser.add_argument("--smoke", action="store_true", help="two layers, three steps, a few examples: does it run?")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    if args.smoke:
        args.steps = args.mixture_steps = 3
        args.rates, args.seeds, args.most, args.batch_size, args.sizes = 2, "0,1", "8,8", 4, "100"
        args.tasks, args.methods = defaults["smoke"][0], "zero-shot,lora-r16,iapt,iapt-constant"
    torch.set_num_threads(args.threads)
    setup(args.device)  # noted now: the repository may change while this runs
    tasks, methods = args.tasks.split(","), args.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    folder = args.model or str(defaults["folder"]())
    results = args.results or RESULTS / name / Path(folder).name
    suite = make_suite(folder, args.device, defaults["smoke"][1] if args.smoke else {})
    most = tuple(int(n) for n in args.most.split(","))
    likely = defaults.get("likely", {})
    plan = Plan(suite, args.steps, args.mixture_steps, args.batch_size, args.rates, most, results, likely)

    everything = cells(tasks, methods, args.sizes.split(","), [int(seed) for seed in args.seeds.split(",")])
    # The seeds of one method and task go to one process: the others wait for the learning rate of seed 0.
    shard, shards = (int(n) for n in args.shard.split("/"))
    groups = list(dict.fromkeys((cell.task, cell.size, cell.method) for cell in everything))
    mine = [c for c in everything if groups.index((c.task, c.size, c.method)) % shards == shard]
    missing = [cell for cell in mine if not cell.file(results).is_file()]
    known = [json.loads(file.read_text()) for file in sorted(results.glob("*/*.json"))]
    guesses = {cell: estimate(cell, plan, known, defaults["step_seconds"]) for cell in missing}
    total = sum(guesses.values())
    if args.plan:
        passed = 0.0
        for cell in missing:
            passed += guesses[cell]
            print(f"{passed / 60:8.1f} min  {guesses[cell]:6.0f} s  {cell}")
    print(
        f"{len(mine) - len(missing)} of {len(mine)} cells are there; the others will take about {total / 3600:.1f} h"
    )
    if args.plan:
        return
    start = time.perf_counter()
    left = total
    for number, cell in enumerate(missing, 1):
        passed = time.perf_counter() - start
        if passed > args.limit:
            print(f"the time is over: {len(missing) - number + 1} cells are left")
            break
        result = run_cell(plan, cell)
        left -= guesses[cell]
        pace = (time.perf_counter() - start) / max(total - left, 1e-9)
        print(
            f"[{number}/{len(missing)}, {left * pace / 60:.0f} min left] {cell}: {brief(result)}",
            flush=True,
        )


def brief(result: dict) -> str:
    """The scores of a cell, in a line."""
    texts = []
    for name, by_prompt in result["test"].items():
        for prompts in ("own", "shuffled"):
            if prompts in by_prompt:
                for measure in ("accuracy", "exact", "f1"):
                    if measure in by_prompt[prompts]:
                        mean = statistics.mean(numbers(by_prompt[prompts][measure]))
                        texts.append(f"{name} {prompts} {measure} {mean:.3f}")
    rate = f"rate {result['rate']:g}, " if "rate" in result else ""
    return rate + ", ".join(texts) + f" ({result['seconds']:.0f} s)"


def numbers(text: str) -> list[float]:
    """The numbers of the instances, from a result's file."""
    return [float(v) for v in (text.split() if " " in text or "." in text else text)]
