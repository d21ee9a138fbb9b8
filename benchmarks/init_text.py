# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Is a start from text better than the anchored one? SmolLM2-135M on film reviews, as in examples/finetune: for each method
of several layers, start, number of slots and seed the loss of the fresh adapter, and the accuracy and loss after training.

    python benchmarks/init_text.py

trains 18 adapters (about 5 minutes each on one CPU core), one after the other, and writes each into the results file as
soon as it is done. A run that was broken off goes on behind the last of them; a finished one only prints the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from transformers import set_seed


# The data, the training and the model.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
sys.path.append(str(Path(__file__).resolve().parent.parent / "realdata"))

from peft_instance_prompt import IAPTConfig, IDPGConfig, IPTConfig
from reviews import Collator, accuracy, fit, load_examples
from smollm2 import load_smollm2


# The learning rates are those of the examples.
METHODS = {
    "iapt": (lambda **kw: IAPTConfig(bottleneck_dim=16, prompt_position="before", **kw), 2e-3),
    "m-idpg": (lambda **kw: IDPGConfig.preset("m-phm", **kw), 2e-3),
    "ipt-deep": (lambda **kw: IPTConfig(strategy="lookup", host="deep", **kw), 5e-2),
}
# By the number of slots; each has at most as many tokens.
TEXTS = {
    4: "Review sentiment: positive",
    16: "Is the review positive or negative? Review: great film. Sentiment: positive",
}
STARTS = ("anchored", "text")


@torch.no_grad()
def loss_of(model, collator, examples, batch_size=20):
    """The mean loss of the labels, and of all tokens but the first of each row."""
    model.eval()
    of_labels, of_text, count = 0.0, 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collator(examples[start : start + batch_size])
        output = model(**batch)
        of_labels += float(output.loss) * len(batch["input_ids"])
        logits = output.logits[:, :-1]  # (B, S - 1, V)
        kept = (batch["attention_mask"][:, 1:] * batch["attention_mask"][:, :-1]).bool()  # (B, S - 1)
        of_text += float(
            torch.nn.functional.cross_entropy(logits[kept], batch["input_ids"][:, 1:][kept], reduction="sum")
        )
        count += int(kept.sum())
    return of_labels / len(examples), of_text / count


def run(base, tokenizer, method, start, slots, seed, args, bare):
    """One cell; `bare` keeps what the model without an adapter gives, by seed."""
    set_seed(seed)
    train, test = load_examples(None, seed)
    test = test[: args.n_test]
    labels = sorted({example["label"] for example in train})
    make, lr = METHODS[method]
    text = {"init_text": tokenizer(TEXTS[slots], add_special_tokens=False)["input_ids"]} if start == "text" else {}
    model = get_peft_model(copy.deepcopy(base), make(task_type="CAUSAL_LM", num_virtual_tokens=slots, **text))
    collator = Collator(tokenizer)
    cell = {"method": method, "start": start, "slots": slots, "seed": seed, "lr": lr, "steps": args.steps}
    cell["text"] = TEXTS[slots] if text else None
    cell["parameters"] = model.get_nb_trainable_parameters()[0]
    cell["fresh_label_loss"], cell["fresh_text_loss"] = loss_of(model, collator, test[:64])
    if seed not in bare:  # the same for each method and start
        with model.disable_adapter():
            label_loss, text_loss = loss_of(model, collator, test[:64])
            bare[seed] = {"bare_label_loss": label_loss, "bare_text_loss": text_loss}
            bare[seed]["bare_accuracy"] = accuracy(model, tokenizer, test, labels)
    cell.update(bare[seed])
    cell["fresh_accuracy"] = accuracy(model, tokenizer, test, labels)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, train, collator, argparse.Namespace(output=folder, steps=args.steps, lr=lr, seed=seed))
    cell["accuracy"] = accuracy(model, tokenizer, test, labels)
    cell["label_loss"] = loss_of(model, collator, test)[0]
    return cell


def report(cells):
    """Print a line for each method, start and number of slots: means over the seeds, with the standard deviation."""
    print(
        f"{'method':<10} {'slots':>5} {'start':<9} {'seeds':>5} {'fresh text loss':>16} {'fresh acc.':>10} {'accuracy':>16} {'label loss':>16}"
    )
    groups = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["slots"], cell["start"]), []).append(cell)
    for (method, slots, start), own in sorted(groups.items()):

        def mean(name):
            return statistics.mean(cell[name] for cell in own)

        def spread(name):
            return statistics.stdev(cell[name] for cell in own) if len(own) > 1 else float("nan")

        change = 100 * (mean("fresh_text_loss") / mean("bare_text_loss") - 1)
        fresh = f"{mean('fresh_text_loss'):.3f} ({change:+.1f} %)"
        after = [f"{mean(name):.3f} +- {spread(name):.3f}" for name in ("accuracy", "label_loss")]
        row = f"{method:<10} {slots:>5} {start:<9} {len(own):>5} {fresh:>16} {mean('fresh_accuracy'):>10.3f}"
        print(f"{row} {after[0]:>16} {after[1]:>16}")
    if cells:
        print(f"without an adapter: accuracy {statistics.mean(cell['bare_accuracy'] for cell in cells):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="(default: %(default)s)")
    parser.add_argument("--slots", default="4", help=f"of {', '.join(map(str, TEXTS))} (default: %(default)s)")
    parser.add_argument("--seeds", default="0,1,2", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="of 8 sentences (default: %(default)s)")
    parser.add_argument("--n-test", type=int, default=200, help="held-out sentences (default: %(default)s)")
    parser.add_argument(
        "--results",
        default=str(Path(__file__).resolve().parent / "results" / "init_text.json"),
        help="(default: %(default)s)",
    )
    args = parser.parse_args()
    methods, slots, seeds = (
        args.methods.split(","),
        *([int(n) for n in x.split(",")] for x in (args.slots, args.seeds)),
    )
    for name, values, known in (("methods", methods, METHODS), ("slots", slots, TEXTS)):
        if unknown := set(values) - set(known):
            parser.error(f"--{name}: {sorted(unknown)} are unknown, choose from {list(known)}")
    transformers.logging.set_verbosity_error()

    file = Path(args.results)
    cells = json.loads(file.read_text())["cells"] if file.is_file() else []
    settings = {"steps": args.steps, "n_test": args.n_test}
    known = {tuple(cell[name] for name in ("method", "start", "slots", "seed", *settings)) for cell in cells}
    wanted = [(m, s, l, seed, *settings.values()) for seed in seeds for l in slots for m in methods for s in STARTS]
    missing = [cell for cell in wanted if cell not in known]
    base, tokenizer = load_smollm2() if missing else (None, None)
    bare = {}
    for number, (method, start, l, seed, *_) in enumerate(missing):
        print(
            f"{number + 1} of {len(missing)}: {method}, {start}, {l} slots, seed {seed}", file=sys.stderr, flush=True
        )
        cells.append({**run(base, tokenizer, method, start, l, seed, args, bare), **settings})
        file.parent.mkdir(parents=True, exist_ok=True)
        releases = {"torch": torch.__version__, "transformers": transformers.__version__}
        whole = {
            "model": "SmolLM2-135M-Instruct, float32",
            "threads": torch.get_num_threads(),
            **releases,
            "cells": cells,
        }
        file.with_suffix(".new").write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(file.with_suffix(".new"), file)  # whole, whenever the run is broken off
    report(
        [
            cell
            for cell in cells
            if tuple(cell[n] for n in ("method", "start", "slots", "seed", *settings)) in set(wanted)
        ]
    )


if __name__ == "__main__":
    main()
