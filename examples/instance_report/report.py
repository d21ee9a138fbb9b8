# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Did the instance matter? Train an adapter, then score the same reviews with four prompts: each review's own, that of another review, the
mean of all, and none.

    python examples/instance_report/report.py
    python examples/instance_report/report.py --condition constant     # the control, trained without the instance
    python examples/instance_report/report.py --adapter FOLDER         # an adapter that was trained on such reviews before
    python examples/instance_report/report.py --short                  # does it run?

Model and reviews come from PyPI packages. `report.json` in the output folder has the value of each review.
"""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401, first: the other imports may fail

from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import set_seed

from peft_instance_prompt import IAPTConfig, instance_report
from reviews import Collator, fit, load_base, load_examples, make_parser, parse


PASSES = 4


def report_with_bar(model, batches):
    with tqdm(total=PASSES * len(batches), desc="comparing prompts", leave=False) as bar:
        hook = model.register_forward_hook(
            lambda *_: bar.update() and None
        )  # a hook that returns None changes nothing
        try:
            return instance_report(model, batches)
        finally:
            hook.remove()


def verdict(report):
    """What the paired differences say, in a sentence each."""
    for measure, by_prompt in report.summary().items():
        cell = by_prompt["own - shuffled"]
        if cell["low"] <= 0 <= cell["high"]:
            said = "no contribution of the instance is to be seen: the interval holds zero"
        else:
            said = "the review's own prompt and another's differ by more than chance"
        yield f"{measure}, own - shuffled {cell['mean']:+.4f} [{cell['low']:+.4f}, {cell['high']:+.4f}]: {said}"


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed, args.n_test)
    collator = Collator(tokenizer)
    if args.adapter is None:
        model = get_peft_model(model, IAPTConfig(task_type="CAUSAL_LM", condition=args.condition))
        model.print_trainable_parameters()
        fit(model, train_examples, collator, args)
        model.save_pretrained(args.output)
    else:
        model = PeftModel.from_pretrained(model, args.adapter)
    report = report_with_bar(model, DataLoader(test_examples, batch_size=20, collate_fn=collator))
    print(report)
    print(*verdict(report), sep="\n")
    Path(args.output).mkdir(parents=True, exist_ok=True)
    Path(args.output, "report.json").write_text(report.to_json())


if __name__ == "__main__":
    parser = make_parser(__doc__, lr=1e-2, output="outputs/instance_report")
    parser.add_argument("--adapter", help="folder of a trained adapter (default: one is trained)")
    parser.add_argument(
        "--condition", choices=("instance", "constant"), default="instance", help="(default: %(default)s)"
    )
    main(parse(parser))
