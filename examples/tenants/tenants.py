# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Many tenants in one process: each has an adapter of its own, and a batch has rows of all of them, the bare model's among them.

    python examples/tenants/tenants.py
    python examples/tenants/tenants.py --tenants 200     # after the first run, which trains the adapters
    python examples/tenants/tenants.py --short           # does it run?

Three tenants want different words for the same film reviews. Their adapters are trained and saved, then loaded beside each other into one
copy of SmolLM2, over and over, until there are as many tenants as were asked for. One call of `generate` answers one review for several of
them, while another thread loads one more tenant and deletes it again. Model and reviews come from PyPI packages.
"""

import sys
import threading
import time
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401, first: the other imports may fail

from peft import PeftModel, get_peft_model
from tqdm import tqdm
from transformers import set_seed

from peft_instance_prompt import IAPTConfig
from reviews import Collator, fit, load_base, load_examples, make_parser, make_prompt, parse


WORDS = {
    "mood": {"positive": "positive", "negative": "negative"},
    "thumbs": {"positive": "up", "negative": "down"},
    "stars": {"positive": "five", "negative": "one"},
}


def folder_of(name, args):
    return Path(args.output, f"{args.steps}-steps", name)


def train_all(model, tokenizer, examples, args):
    """An adapter in a folder for each wish, if it is not there yet."""
    for name, words in WORDS.items():
        folder = folder_of(name, args)
        if folder.is_dir():
            print(f"{name}: {folder} is there already", flush=True)
            continue
        print(f"{name}: {args.steps} steps", flush=True)
        set_seed(args.seed)
        adapted = get_peft_model(model, IAPTConfig(task_type="CAUSAL_LM"))
        wanted = [{"text": example["text"], "label": words[example["label"]]} for example in examples]
        fit(adapted, wanted, Collator(tokenizer), args)
        adapted.save_pretrained(folder)
        model = adapted.unload()
    return model.eval()


def load_all(model, args):
    """One model with many adapters, by name."""
    wishes = list(WORDS)
    names = {
        f"{wishes[number % len(wishes)]}-{number}": wishes[number % len(wishes)] for number in range(args.tenants)
    }
    adapted = None
    for name, wish in tqdm(names.items(), desc="loading"):
        folder = folder_of(wish, args)
        if adapted is None:
            adapted = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            adapted.load_adapter(folder, adapter_name=name)
    return adapted.eval(), list(names)


def answers(model, tokenizer, texts, adapters):
    """The first three tokens that are answered to each text under its adapter."""
    inputs = tokenizer([make_prompt({"text": text}) for text in texts], padding=True, return_tensors="pt")
    output = model.generate(
        **inputs.to(model.device), adapter_names=adapters, max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])


def main(args):
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed, args.n_test)
    model = train_all(model, tokenizer, train_examples, args)

    start = time.perf_counter()
    model, names = load_all(model, args)
    size = Path(folder_of("mood", args), "adapter_model.safetensors").stat().st_size
    print(
        f"{len(names)} tenants of {size / 2**20:.1f} MB beside one base model, loaded in {time.perf_counter() - start:.1f} s"
    )

    adapters = [*names[: args.rows - 1], "__base__"]
    text = test_examples[0]["text"]
    together = answers(model, tokenizer, [text] * len(adapters), adapters)
    print(f"\none call of generate, one review, {len(adapters)} rows: {text}")
    for name, answer in zip(adapters, together):
        print(f"    {name:<12} {answer.split()[:1]}")  # the adapters have learned to say one word, and not to stop

    alone = [answers(model, tokenizer, [text], [name])[0] for name in adapters]
    print(f"each row says what it says alone: {together == alone}")

    def come_and_go():
        model.load_adapter(folder_of("thumbs", args), adapter_name="guest")
        model.delete_adapter("guest")

    guest = threading.Thread(target=come_and_go)
    guest.start()
    beside = answers(model, tokenizer, [text] * len(adapters), adapters)
    guest.join()
    print(f"the same while another thread loads a tenant and deletes it: {together == beside}")


if __name__ == "__main__":
    parser = make_parser(__doc__, lr=1e-2, output="outputs/tenants", steps=40)
    parser.add_argument("--tenants", type=int, default=30, help="how many, at least 3 (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=7, help="rows of the batch (default: %(default)s)")
    args = parse(parser)
    if args.short:
        args.tenants, args.rows = min(args.tenants, 6), min(args.rows, 4)
    main(args)
