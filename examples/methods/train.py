# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Any method on film reviews: one training script, and a table of configs.

    python examples/methods/train.py --method lpt
    python examples/methods/train.py --method idpg --help     # the options of one method
    python examples/methods/train.py --method ipt --short     # does it run?

takes a few minutes on two CPU cores; base model and sentences come from PyPI packages. Each method has the learning rate that works for
it here. `--condition constant` trains the control, whose generated part is the same for all reviews; PreFT has none.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401, first: the other imports may fail

from peft import get_peft_model
from transformers import set_seed

from peft_instance_prompt import (
    DynamicPromptConfig,
    IAPTConfig,
    IDPGConfig,
    IDSPAMConfig,
    IPTConfig,
    LPTConfig,
    PreFTConfig,
    learned_position,
    record_choices,
)
from reviews import (
    Collator,
    accuracy,
    fit,
    load_base,
    load_examples,
    make_parser,
    make_prompt,
    parse,
    save_and_compare,
)


def iapt(args, **shared):
    return IAPTConfig(num_virtual_tokens=args.tokens, bottleneck_dim=args.bottleneck_dim, **shared)


def idpg(args, **shared):
    return IDPGConfig.preset(args.preset, instance_source=args.vectors, **shared)


def ipt(args, **shared):
    """From what pretrain_ipt.py has learned, if it is given."""
    start = {} if args.init_file is None else {"init": "pretrained", "init_file": args.init_file}
    return IPTConfig(strategy=args.strategy, encoder=args.encoder, host=args.host, **start, **shared)


def lpt(args, **shared):
    return LPTConfig(generator_type=args.generator, insertion_layer=args.layer, **shared)


def idspam(args, **shared):
    return IDSPAMConfig(attention_dim=args.attention_dim, insertion_layer=args.layer, **shared)


def preft(args, condition, **shared):
    if condition != "instance":
        raise SystemExit("PreFT edits the instruction's own states: it has no control that reads a constant.")
    return PreFTConfig(r=args.rank, **shared)


def dynamic_prompt(args, preset=None, **shared):
    return DynamicPromptConfig.preset(
        preset or args.preset,
        num_virtual_tokens=args.tokens,
        instance_source=args.source,
        anneal_steps=args.steps,
        **shared,
    )


def place_first(args, model, fit_one, shared):
    """The paper's two stages of `adap_pos_ins_vec`: first where the prompt stands, then what it is."""
    if args.preset != "adap_pos_ins_vec":
        return {}
    first = get_peft_model(model, dynamic_prompt(args, preset="adap_pos", **shared))
    fit_one(first)
    position = learned_position(first)
    first.unload()
    print(f"the first stage puts {position} of {args.tokens} prompt tokens behind the review", flush=True)
    return {"position": position}


@dataclass
class Method:
    """
    Attributes:
        config: Makes the config from the arguments, and from the fields that all methods share.
        lr: The learning rate.
        options: What the method's own options are, as `add_argument` takes them.
        before: What is trained before, if anything. It returns fields of the config.
    """

    config: Callable
    lr: float
    options: dict[str, dict] = field(default_factory=dict)
    before: Callable = lambda *_: {}


def choice(*values: str) -> dict:
    return {"choices": values, "default": values[0], "help": "(default: %(default)s)"}


LAYER = {"type": int, "help": "the layer at which the prompt enters (default: the middle)"}
METHODS = {
    "iapt": Method(
        iapt,
        lr=1e-2,
        options={
            "--tokens": {"type": int, "default": 4, "help": "number of prompt tokens (default: %(default)s)"},
            "--bottleneck-dim": {"type": int, "default": 16, "help": "its width (default: %(default)s)"},
        },
    ),
    "idpg": Method(
        idpg,
        lr=2e-3,
        options={
            "--preset": choice("m-phm", "s-phm", "s-dnn", "m-dnn"),
            # Vectors that are stored with the data: ../stored_vectors/
            "--vectors": choice("frozen", "embeddings"),
        },
    ),
    "ipt": Method(
        ipt,
        lr=5e-2,
        options={
            "--strategy": choice("lookup", "encoder"),
            "--encoder": choice("cnn", "mlp", "lstm"),
            "--host": choice("deep", "prompt"),
            "--init-file": {"help": "a file that pretrain_ipt.py has written"},
        },
    ),
    "lpt": Method(lpt, lr=1e-3, options={"--generator": choice("npg", "appg", "mppg", "none"), "--layer": LAYER}),
    "idspam": Method(
        idspam,
        lr=1e-3,
        options={
            "--attention-dim": {"type": int, "help": "the width of queries and keys (default: the embeddings')"},
            "--layer": LAYER,
        },
    ),
    "preft": Method(
        preft,
        lr=1e-3,
        options={"--rank": {"type": int, "default": 16, "help": "the rank of the edits (default: %(default)s)"}},
    ),
    "dynamic_prompt": Method(
        dynamic_prompt,
        lr=2e-2,
        options={
            "--preset": {"default": "adap_ins_pos", "help": "a variant of the paper (default: %(default)s)"},
            "--tokens": {"type": int, "default": 20, "help": "number of prompt tokens (default: %(default)s)"},
            "--source": choice("frozen", "embeddings"),
        },
        before=place_first,
    ),
}


def read_arguments():
    which = {"choices": METHODS, "default": "iapt", "help": "(default: %(default)s)"}
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method", **which)
    name = first.parse_known_args()[0].method
    parser = make_parser(__doc__, lr=METHODS[name].lr, output=f"outputs/{name}")
    parser.add_argument("--method", **which)
    parser.add_argument("--condition", **choice("instance", "constant"))
    own = parser.add_argument_group(f"options of {name}")
    for option, words in METHODS[name].options.items():
        own.add_argument(option, **words)
    return parse(parser)


def show_choices(record):
    """What dynamic prompting has chosen for the reviews; nothing for other methods."""
    for name, what in (("positions", "prompt tokens behind the review"), ("lengths", "prompt tokens used")):
        chosen = [numbers for choices in record if (numbers := getattr(choices, name)) is not None]
        counts = Counter(number for numbers in chosen for number in numbers.tolist())
        if counts:
            print(f"{what}: " + ", ".join(f"{number} in {count}" for number, count in sorted(counts.items())))
    if record and record[0].mixture is not None:
        print(f"mixture of the first reviews:\n{record[0].mixture[:4]}")


def main(args):
    method = METHODS[args.method]
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed, args.n_test)
    labels = sorted({example["label"] for example in train_examples})
    before = accuracy(model, tokenizer, test_examples, labels)

    def fit_one(adapted):
        adapted.print_trainable_parameters()
        fit(adapted, train_examples, Collator(tokenizer), args)

    shared = {"task_type": "CAUSAL_LM", "condition": args.condition}
    fields = method.before(args, model, fit_one, shared)
    model = get_peft_model(model, method.config(args, **fields, **shared))
    fit_one(model)

    with record_choices() as record:
        after = accuracy(model, tokenizer, test_examples, labels)
    show_choices(record)
    loaded = save_and_compare(model, tokenizer, test_examples, labels, before, after, args)

    inputs = tokenizer([make_prompt(example) for example in test_examples[:3]], padding=True, return_tensors="pt")
    output = loaded.generate(**inputs, max_new_tokens=2, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for example, text in zip(test_examples, texts):
        print(f"{example['label']:<10} {text!r:<18} {example['text']}")


if __name__ == "__main__":
    main(read_arguments())
