# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
An encoder-decoder model whose prompt decides, word by word, what is to be done: T5, transformers' `Seq2SeqTrainer`, `generate`.

    python examples/seq2seq/train.py                          # IAPT
    python examples/seq2seq/train.py --condition constant     # the control, whose prompt is the same for all words
    python examples/seq2seq/train.py --short                  # does it run?

No pretrained T5 of this size is to be had from PyPI, so the script makes one first, in a minute: a random T5 of two layers learns to copy
and to reverse words of letters, as a token before the word commands. It is a toy, and says nothing about real text. Then it is
frozen, the commands are gone, and an adapter learns a rule: words with an "a" are to be reversed, others copied. A prompt that is the same
for all words can command one of the two only.
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
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from peft_instance_prompt import IAPTConfig


LETTERS = "abcdefghij"
SPECIAL = ("<pad>", "</s>", "copy", "reverse", "word:")
BATCH, N_TEST = 64, 200


def make_tokenizer():
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<pad>")


def words(number, rng):
    """Words of 3 to 6 letters, half of them with an "a"."""
    made = []
    for row in range(number):
        word = rng.choices(LETTERS[1:], k=rng.randint(3, 6))
        if row % 2:
            word[rng.randrange(len(word))] = "a"
        made.append(word)
    rng.shuffle(made)
    return made


def commanded(number, rng):
    """What the base model learns: the command says what is to be done."""
    pairs = ((rng.choice(["copy", "reverse"]), word) for word in words(number, rng))
    return [
        {"input": " ".join([command, "word:", *word]), "target": " ".join(word if command == "copy" else word[::-1])}
        for command, word in pairs
    ]


def ruled(number, rng):
    """What the adapter learns: the word itself says it."""
    return [
        {"input": " ".join(["word:", *word]), "target": " ".join(word[::-1] if "a" in word else word)}
        for word in words(number, rng)
    ]


def fit(model, tokenizer, examples, lr, steps, args):
    data = Dataset.from_list(examples).map(
        lambda rows: tokenizer(rows["input"], text_target=rows["target"]),
        batched=True,
        remove_columns=["input", "target"],
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=args.output,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=lr,
            warmup_steps=steps // 20,
            logging_steps=max(1, steps // 5),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),  # warns on a CPU
            label_names=["labels"],
            seed=args.seed,
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    trainer.train()


@torch.inference_mode()
def write(model, tokenizer, examples):
    """What the model writes for each example."""
    model.eval()
    texts = []
    for start in tqdm(range(0, len(examples), BATCH), desc="writing", leave=False):
        rows = [example["input"] for example in examples[start : start + BATCH]]
        inputs = tokenizer(rows, padding=True, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        texts += tokenizer.batch_decode(output, skip_special_tokens=True)
    return texts


def exact(texts, examples):
    return sum(text == example["target"] for text, example in zip(texts, examples)) / len(examples)


def load_base(tokenizer, args):
    """The random T5 that has learned two commands; it is kept, so that a second run has it at once."""
    folder = Path(args.base, str(args.base_steps))
    if not folder.is_dir():
        print(f"making a base model: a random T5 learns to copy and to reverse, {args.base_steps} steps", flush=True)
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        model = T5ForConditionalGeneration(config)
        rng = random.Random(args.seed)
        fit(model, tokenizer, commanded(BATCH * args.base_steps, rng), 3e-3, args.base_steps, args)
        model.save_pretrained(folder)
    return T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def main(args):
    set_seed(args.seed)
    rng = random.Random(args.seed + 1)
    tokenizer = make_tokenizer()
    base = load_base(tokenizer, args)
    asked = commanded(args.n_test, rng)
    print(
        f"the base model does what it is told in {exact(write(base, tokenizer, asked), asked):.3f} of {len(asked)} words"
    )

    test, train = ruled(args.n_test, rng), ruled(BATCH * args.steps, rng)
    before = exact(write(base, tokenizer, test), test)
    config = IAPTConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=args.tokens, condition=args.condition)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    fit(model, tokenizer, train, args.lr, args.steps, args)
    after = exact(write(model, tokenizer, test), test)
    print(f"words without a command that are as the rule wants: {before:.3f} without the adapter, {after:.3f} with it")

    model.save_pretrained(args.output)
    loaded = PeftModel.from_pretrained(load_base(tokenizer, args), args.output)
    texts = write(loaded, tokenizer, test)
    print(f"{exact(texts, test):.3f} after loading the adapter from {args.output} again")
    for example, text in zip(test[:4], texts):
        print(f"{example['input']:<20} -> {text}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--condition", choices=("instance", "constant"), default="instance", help="(default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=2, help="number of prompt tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of 64 words (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=1500, help="steps of the base model (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of the adapter (default: %(default)s)")
    parser.add_argument("--n-test", type=int, default=N_TEST, help="held-out words (default: %(default)s)")
    parser.add_argument(
        "--base", default="outputs/seq2seq-base", help="folder for the base model (default: %(default)s)"
    )
    parser.add_argument("--output", default="outputs/seq2seq", help="folder for the adapter (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="does it run? 20 steps of each, and 20 words")
    args = parser.parse_args()
    if args.short:
        args.steps, args.base_steps, args.n_test = 20, 20, 20
        one_line.short_form(args.steps)
    main(args)
