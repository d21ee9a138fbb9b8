# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
IPT on film reviews: the prompt is looked up, token by token, or made by a small network from what is looked up.

    python examples/ipt.py
    python examples/ipt.py --strategy encoder --encoder cnn

takes a few minutes on two CPU cores; base model and sentences are those of finetune_iapt.py, and come from PyPI packages. With

    python examples/pretrain_ipt.py --encoder cnn
    python examples/ipt.py --strategy encoder --encoder cnn --init-file outputs/ipt-pretrained/cnn.safetensors

the table and the network start from what they have learned about the domains of texts.
"""

from peft import get_peft_model
from transformers import set_seed

from finetune_iapt import Collator, accuracy, fit, load_base, load_examples, make_parser, save_and_compare
from peft_instance_prompt import IPTConfig


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed)
    labels = sorted({example["label"] for example in train_examples})
    before = accuracy(model, tokenizer, test_examples, labels)

    config = IPTConfig(
        task_type="CAUSAL_LM",
        strategy=args.strategy,
        encoder=args.encoder,
        host=args.host,
        init="random" if args.init_file is None else "pretrained",
        init_file=args.init_file,
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    fit(model, train_examples, Collator(tokenizer), args)
    save_and_compare(model, tokenizer, test_examples, labels, before, args)


if __name__ == "__main__":
    parser = make_parser(__doc__, lr=5e-2, output="outputs/ipt")
    parser.add_argument("--strategy", default="lookup", help="lookup or encoder (default: %(default)s)")
    parser.add_argument("--encoder", default="cnn", help="cnn, mlp or lstm (default: %(default)s)")
    parser.add_argument("--host", default="deep", help="prompt or deep (default: %(default)s)")
    parser.add_argument("--init-file", help="a file that pretrain_ipt.py has written")
    main(parser.parse_args())
