# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Ask whether the instance mattered to a trained IAPT adapter, and draw what its prompts do.

    python examples/finetune/finetune_iapt.py
    python examples/instance_report/pictures.py

prints the report, and writes it as a page, `outputs/report.html`. Writes `prompts-light.png` and `prompts-dark.png` to
`outputs/pictures`. In about three minutes on two CPU cores. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401, first: the other imports may fail

from matplotlib.figure import Figure
from peft import PeftModel
from torch.utils.data import DataLoader

from peft_instance_prompt import instance_report
from peft_instance_prompt.tools.plots import plot_reading, plot_report, plot_separation
from peft_instance_prompt.tools.themes import THEMES
from reviews import N_TEST, Collator, load_base, load_examples


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--adapter", default="outputs/iapt", help="folder of a trained adapter (default: %(default)s)")
parser.add_argument("--layer", type=int, default=22, help="the layer that is read (default: %(default)s)")
parser.add_argument("--report", default="outputs/report.html", help="where the page goes (default: %(default)s)")
parser.add_argument("--output", default="outputs/pictures", help="folder for the pictures (default: %(default)s)")
parser.add_argument("--n-test", type=int, default=N_TEST, help="held-out sentences (default: %(default)s)")


def draw(model, tokenizer, collator, examples, report, layer, theme):
    """One figure: what is read of a text, above what the prompts know of the label and what they are worth."""
    figure = Figure(figsize=(9, 6), layout="constrained", facecolor=THEMES[theme].paper)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1])
    example = min(examples, key=lambda example: abs(len(example["text"]) - 80))
    plot_reading(model, collator([example]), tokenizer, depth=layer, theme=theme, ax=top.subplots())
    left, right = bottom.subplots(1, 2)
    batches = DataLoader(examples, batch_size=20, collate_fn=collator)
    plot_separation(model, batches, [example["label"] for example in examples], theme=theme, ax=left)
    plot_report(report, theme=theme, ax=right)
    return figure


def main():
    args = parser.parse_args()
    model, tokenizer = load_base(None)
    _, examples = load_examples(None, seed=0, n_test=args.n_test)
    collator = Collator(tokenizer)
    model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    report = instance_report(model, DataLoader(examples, batch_size=20, collate_fn=collator), tokenizer=tokenizer)
    print(report)
    Path(args.report).parent.mkdir(parents=True, exist_ok=True)
    report.to_html(args.report)
    for theme in THEMES:
        file = Path(args.output, f"prompts-{theme}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(model, tokenizer, collator, examples, report, args.layer, theme).savefig(file, dpi=110)
        print(f"{file}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
