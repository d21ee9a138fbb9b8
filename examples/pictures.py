# Copyright 2026-present the peft_instance_prompt authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Ask whether the instance mattered to a trained IAPT adapter, and draw what its prompts do.

    python examples/finetune_iapt.py
    python examples/pictures.py

prints the report and writes `docs/images/prompts.png`, in about three minutes on two CPU cores. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from peft import PeftModel
from torch.utils.data import DataLoader

from finetune_iapt import Collator
from peft_instance_prompt import instance_report
from peft_instance_prompt.plots import plot_activations, plot_prompt_map, plot_reading
from smollm2 import load_smollm2
from vader import sentiment_splits


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--adapter", default="outputs/iapt", help="folder of a trained adapter (default: %(default)s)")
parser.add_argument("--layer", type=int, default=20, help="the layer that is drawn (default: %(default)s)")
parser.add_argument(
    "--output", default="docs/images/prompts.png", help="where the picture goes (default: %(default)s)"
)


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
    model, tokenizer = load_smollm2()
    _, test_examples = sentiment_splits()
    collator = Collator(tokenizer)
    model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    print(instance_report(model, DataLoader(test_examples, batch_size=20, collate_fn=collator)))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    draw(model, tokenizer, collator, test_examples, args.layer).savefig(args.output, dpi=110)
    print(f"{args.output}: {Path(args.output).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
