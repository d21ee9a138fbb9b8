# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Ask whether the instance mattered to a trained IAPT adapter, and draw what its prompts do.

    python examples/finetune/finetune_iapt.py
    python examples/instance_report/pictures.py

prints the report and writes `docs/images/prompts.png`, in about three minutes on two CPU cores. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from peft import PeftModel
from torch.utils.data import DataLoader

from peft_instance_prompt import instance_report
from peft_instance_prompt.tools.plots import plot_activations, plot_prompt_map, plot_reading


sys.path.append(str(Path(__file__).resolve().parents[1]))

from reviews import N_TEST, Collator, load_base, load_examples


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--adapter", default="outputs/iapt", help="folder of a trained adapter (default: %(default)s)")
parser.add_argument("--layer", type=int, default=20, help="the layer that is drawn (default: %(default)s)")
parser.add_argument(
    "--output", default="docs/images/prompts.png", help="where the picture goes (default: %(default)s)"
)
parser.add_argument("--n-test", type=int, default=N_TEST, help="held-out sentences (default: %(default)s)")


def draw(model, tokenizer, collator, examples, layer):
    """One figure: a text and what is read of it, above the learned activations and a map of the instances."""
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.25])
    example = min(examples, key=lambda example: abs(len(example["text"]) - 80))
    plot_reading(model, collator([example]), tokenizer, depth=layer, ax=top.subplots())
    left, right = bottom.subplots(1, 2)
    plot_activations(model, ax=left)
    batches = DataLoader(examples, batch_size=20, collate_fn=collator)
    plot_prompt_map(model, batches, [example["label"] for example in examples], depth=layer, ax=right)
    return figure


def main():
    args = parser.parse_args()
    model, tokenizer = load_base(None)
    _, test_examples = load_examples(None, seed=0, n_test=args.n_test)
    collator = Collator(tokenizer)
    model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    print(instance_report(model, DataLoader(test_examples, batch_size=20, collate_fn=collator)))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    draw(model, tokenizer, collator, test_examples, args.layer).savefig(args.output, dpi=110)
    print(f"{args.output}: {Path(args.output).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
