# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
ID-SPAM on film reviews: self-attention over the token embeddings makes a prompt that enters in the middle of the model.

    python examples/idspam.py

Base model and sentences are those of finetune_iapt.py, and come from PyPI packages.
"""

from peft import get_peft_model
from transformers import set_seed

from finetune_iapt import Collator, accuracy, fit, load_base, load_examples, make_parser, save_and_compare
from peft_instance_prompt import IDSPAMConfig


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed)
    labels = sorted({example["label"] for example in train_examples})
    before = accuracy(model, tokenizer, test_examples, labels)

    config = IDSPAMConfig(task_type="CAUSAL_LM", attention_dim=args.attention_dim, insertion_layer=args.layer)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    fit(model, train_examples, Collator(tokenizer), args)
    save_and_compare(model, tokenizer, test_examples, labels, before, args)


if __name__ == "__main__":
    parser = make_parser(__doc__, lr=1e-3, output="outputs/idspam")
    parser.add_argument("--attention-dim", type=int, help="the width of queries and keys (default: the embeddings')")
    parser.add_argument("--layer", type=int, help="the layer at which the prompt enters (default: the middle)")
    main(parser.parse_args())
