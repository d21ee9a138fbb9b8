# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Classify sentences with an encoder, all-MiniLM-L6-v2, and a prompt from each sentence: transformers' `Trainer` as it is.

    python examples/encoder/train.py                   # IDPG: where does a sentence come from?
    python examples/encoder/train.py --method lora     # the same with LoRA, or iapt, lpt, idspam
    python examples/encoder/train.py --task question_type
    python examples/encoder/train.py --short           # does it run?

Model and sentences come from PyPI packages. The tasks `source` (one of four domains) and `sentiment` are VADER's; `question_type` and
`intent` are BIG-bench's, a download of 358 MB.
"""

import argparse
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # first: the other imports may fail

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_instance_prompt import IAPTConfig, IDPGConfig, IDSPAMConfig, LPTConfig


# The loaders of model and sentences.
sys.path.append(str(Path(__file__).resolve().parents[2] / "realdata"))

import bigbench
from minilm import minilm_folder
from splits import three_splits
from vader import FILES, load_sentences, sentiment_splits


N_TEST = 400
CONFIGS = {
    "idpg": lambda: IDPGConfig.preset("m-phm", task_type="SEQ_CLS"),
    "iapt": lambda: IAPTConfig(task_type="SEQ_CLS"),
    "lpt": lambda: LPTConfig(task_type="SEQ_CLS"),
    "idspam": lambda: IDSPAMConfig(task_type="SEQ_CLS"),
    "lora": lambda: LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]),
}
TASKS = ("source", "sentiment", "question_type", "intent")


def load_task(name, seed):
    """Train and held-out lists of {"text", "label"}."""
    if name == "sentiment":
        return sentiment_splits("movie", n_test=N_TEST, seed=seed)
    if name == "source":
        examples = [{"text": text, "label": domain} for domain in FILES for text, _ in load_sentences(domain)]
        parts = three_splits(examples, seed=seed)
    else:
        parts = bigbench.splits(name)
    return parts["train"], parts["test"]


def main(args):
    set_seed(args.seed)
    folder = args.model or minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = load_task(args.task, args.seed)
    labels = sorted({example["label"] for example in train})

    def encoded(examples):
        data = Dataset.from_list([{"text": e["text"], "labels": labels.index(e["label"])} for e in examples])
        return data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)

    def base():
        names = dict(enumerate(labels))
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(names), id2label=names, dtype=torch.float32
        )

    model = get_peft_model(base(), CONFIGS[args.method]())  # the head is trained along, and saved with the adapter
    model.print_trainable_parameters()

    def trainer(model):
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=args.output,
                max_steps=args.steps,
                per_device_train_batch_size=16,
                per_device_eval_batch_size=50,
                learning_rate=args.lr,
                warmup_steps=args.steps // 10,
                logging_steps=max(1, args.steps // 5),
                save_strategy="no",
                report_to="none",
                dataloader_pin_memory=torch.cuda.is_available(),  # warns on a CPU
                label_names=["labels"],
                seed=args.seed,
            ),
            train_dataset=encoded(train[: 16 * args.steps]),
            eval_dataset=encoded(test[: args.n_test]),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: {
                "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
            },
        )

    fitting = trainer(model)
    before = fitting.evaluate()["eval_accuracy"]
    fitting.train()
    after = fitting.evaluate()["eval_accuracy"]
    print(
        f"accuracy on {args.n_test} held-out sentences, {len(labels)} classes: {before:.3f} before, {after:.3f} after"
    )

    model.save_pretrained(args.output)
    loaded = PeftModel.from_pretrained(base(), args.output)
    again = trainer(loaded).evaluate()["eval_accuracy"]
    print(f"{again:.3f} after loading adapter and head from {args.output} again")
    inputs = tokenizer([example["text"] for example in test[:4]], padding=True, return_tensors="pt").to(loaded.device)
    with torch.inference_mode():
        choices = loaded(**inputs).logits.argmax(-1)  # (B,)
    for example, choice in zip(test, choices):
        print(f"{labels[choice]:<12} (humans: {example['label']})  {example['text'][:90]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=CONFIGS, default="idpg", help="(default: %(default)s)")
    parser.add_argument("--task", choices=TASKS, default="source", help="(default: %(default)s)")
    parser.add_argument("--model", help="hub name or folder of an encoder (default: all-MiniLM-L6-v2 from PyPI)")
    parser.add_argument("--steps", type=int, default=200, help="steps of 16 sentences (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument(
        "--n-test", type=int, default=N_TEST, help="held-out sentences, at most that many (default: %(default)s)"
    )
    parser.add_argument("--output", default="outputs/encoder", help="folder for the adapter (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="does it run? 10 steps and 50 held-out sentences")
    args = parser.parse_args()
    if args.short:
        args.steps, args.n_test = min(args.steps, 10), min(args.n_test, 50)
        one_line.short_form(args.steps)
    main(args)
