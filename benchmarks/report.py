# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Writes the tables and pictures of Evidence (docs/evidence.md, docs/evidence/), Cost (docs/speed.md) and Serving with vLLM (docs/vllm.md) from
the results of the quality suites, of serving_cost.py and of serving.py.

    python benchmarks/report.py            # writes
    python benchmarks/report.py --check    # exit code 1 if a page is not what the results give

What stands between `<!-- generated: NAME -->` and `<!-- end -->` is generated; the rest of a page is written by hand and kept.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from charts import bars, intervals
from machine import RESULTS, ROOT
from quality.methods import CONTROLS, EDITS, METHODS, OURS, SETTING_OF
from quality.tables import (
    LORA,
    NOTHING,
    Results,
    against_lora,
    difference,
    instance,
    instance_by_task,
    overview,
    rates,
    scores,
    setups,
    summary,
)
from quality.tasks import is_mixture
from serving_tables import blocks as serving_blocks


PAGES = [
    ROOT / "docs" / name for name in ("evidence.md", "evidence/detail.md", "evidence/tables.md", "speed.md", "vllm.md")
]
SERVED = "serving_cost/smollm2-135m-instruct-cpu-float32-preft"  # the run that the first page's chart is of
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def blocks(folder: Path) -> dict[str, str]:
    """All generated blocks, by name: `SUITE.MODEL.WHAT`."""
    made, settings, mixed = serving_blocks(folder), {}, {}
    for path in sorted(p for p in folder.glob("quality_*/*") if p.is_dir()):
        results = Results(path)
        if not results.cells:
            continue
        name = f"{path.parent.name}.{path.name}"
        mixtures = [task for task in results.tasks if is_mixture(task)]
        single = [task for task in results.tasks if task not in mixtures]
        measures = dict.fromkeys([results.score, "accuracy"])  # of a causal model both
        for size in sorted({key[1] for key in results.cells}, key=lambda size: (size != "full", size)):
            for group, names in (("mixture", mixtures), ("tasks", single)):
                here = [task for task in names if any(key[:2] == (task, size) for key in results.cells)]
                if not here:
                    continue
                prefix = f"{name}.{group}-{size}"
                model = f"{path.name}, " * (len([*path.parent.iterdir()]) > 1)
                kind = ", single tasks" * (group == "tasks")
                few = f", {size} examples" * (size != "full")
                label = f"{model}{path.parent.name.removeprefix('quality_')}{kind}{few}"
                settings[label] = (results, size, here)
                if group == "mixture":
                    mixed[label] = settings[label]
                for measure in measures:
                    made[f"{prefix}.scores-{measure}"] = scores(results, size, here, measure)
                made[f"{prefix}.instance"] = instance(results, size, here, results.score)
                made[f"{prefix}.instance-loss"] = instance(results, size, here, "loss", percent=False)
                made[f"{prefix}.instance-by-task"] = instance_by_task(results, size, here, results.score)
                made[f"{prefix}.lora"] = against_lora(results, size, here, results.score)
                if group == "mixture":
                    for measure in ("match", "f1"):
                        made[f"{prefix}.scores-{measure}"] = scores(results, size, here, measure)
        made[f"{name}.rates"] = rates(results)
        made[f"{name}.setup"] = setups(results)
    made["quality.summary"] = summary(mixed)
    for what in ("scores", "constant", "lora", "default"):
        made[f"quality.{what}"] = overview(settings, what)
        made[f"quality.{what}-loss"] = overview(settings, what, loss=True)
    return made


def picture(results: Results, size: str, file: Path) -> None:
    """Points with intervals: own minus constant, and own minus shuffled, over all tasks that are there."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "peft_instance_prompt"
    from matplotlib import pyplot as plt

    tasks = [task for task in results.tasks if any(key[:2] == (task, size) for key in results.cells)]
    figure, ax = plt.subplots(figsize=(7, 3.2))
    names = [name for name in OURS if name in results.methods]
    for offset, label in enumerate(("constant", "shuffled", "mean")):
        for row, name in enumerate(names):
            right = (CONTROLS[name], "own") if label == "constant" else (name, label)
            found = difference(results, size, (name, "own"), right, results.score, tasks)
            if found:
                (mean, low, high), _ = found
                ax.errorbar(
                    [100 * mean],
                    [row + 0.2 * (offset - 1)],
                    xerr=[[100 * (mean - low)], [100 * (high - mean)]],
                    fmt="o",
                    capsize=3,
                    color=f"C{offset}",
                    label=f"own - {label}" if row == 0 else None,
                )
    ax.axvline(0, color="grey", linewidth=1)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel(f"{results.score}, points (95 % interval)")
    if ax.get_legend_handles_labels()[0]:
        ax.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def charts(folder: Path) -> dict[str, str]:
    """The charts that are text, by the name of their file: a decoding step of eight tenants, and each mixture's scores beside LoRA's."""
    made = {}
    served = folder / SERVED / "serving-8-32.json"
    if served.is_file():
        group = json.loads(served.read_text())
        ratios = {"bare model": 1.0}
        for name, label in (("iapt", "IAPT x 8"), ("preft", "PreFT x 8"), ("lora-r16", "LoRA x 8 (r = 16)")):
            ratios[label] = group["methods"][name]["per_token"]["ratio"]
        note = "8 adapters in 8 rows, times the bare model's; SmolLM2-135M, float32, one CPU thread, no GPU"
        made["decoding.svg"] = bars(ratios, {"IAPT x 8", "PreFT x 8"}, note)
    for path in sorted(p for p in folder.glob("quality_*/*") if p.is_dir()):
        results = Results(path)
        mixtures = [task for task in results.tasks if is_mixture(task)]
        lora = next((name for name in LORA if name in results.methods), None)
        controls = {*CONTROLS.values(), *SETTING_OF, "zero-shot", "head", lora}
        found = {}
        for name in (name for name in METHODS if name not in controls):
            if beside := difference(results, "full", (name, "own"), (lora, "own"), results.score, mixtures):
                found[name] = tuple(100 * value for value in beside[0])
        if found:
            suite = path.parent.name.removeprefix("quality_")
            note = f"points of accuracy, minus {lora}; 95 % intervals; {suite}, mixture"
            made[f"against-lora-{suite}-{path.name}.svg"] = intervals(found, {*OURS, *EDITS}, note)
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """The page with each block replaced; a block that no results belong to says so."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{made.get(m[2], NOTHING)}\n{m[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    parser.add_argument(
        "--page", type=Path, nargs="+", default=PAGES, help="(default: those of Evidence, Cost and Serving with vLLM)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    parser.add_argument("--list", action="store_true", help="print the names of all blocks")
    args = parser.parse_args()
    made = blocks(args.results)
    if args.list:
        print("\n".join(made))
        return
    texts = {page: page.read_text() for page in args.page}
    stale = [str(page) for page, text in texts.items() if fill(text, made) != text]
    images = args.page[0].parent / "images"
    drawn = {images / name: text for name, text in charts(args.results).items()}
    stale += [str(file) for file, text in drawn.items() if not file.is_file() or file.read_text() != text]
    if args.check:
        sys.exit(f"{', '.join(stale)}: not what the results give, run python benchmarks/report.py" if stale else 0)
    for page, text in texts.items():
        page.write_text(fill(text, made))
        print(f"{page}: {len(BLOCK.findall(text))} blocks; {len(made)} can be made")
    images.mkdir(exist_ok=True)
    for file, text in drawn.items():
        file.write_text(text)
    for path in sorted(p for p in args.results.glob("quality_*/*") if p.is_dir()):
        results = Results(path)
        for size in sorted({key[1] for key in results.cells}):
            picture(results, size, images / f"{path.parent.name}-{path.name}-{size}.svg")


if __name__ == "__main__":
    main()
