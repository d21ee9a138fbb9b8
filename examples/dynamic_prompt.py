# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Dynamic prompting on film reviews: learn where the prompt stands, and see what is chosen for each review.

    python examples/dynamic_prompt.py --preset adap_ins_pos

takes a few minutes on two CPU cores (`adap_pos_ins_vec` trains twice); base model and sentences are those of finetune_iapt.py, and come from PyPI packages.
"""

from collections import Counter

from peft import PeftModel, get_peft_model
from transformers import set_seed

from finetune_iapt import Collator, accuracy, fit, load_base, load_examples, make_parser, make_prompt
from peft_instance_prompt import DynamicPromptConfig, learned_position, record_choices


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed)
    labels = sorted({example["label"] for example in train_examples})
    before = accuracy(model, tokenizer, test_examples, labels)

    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": args.tokens, "instance_source": args.source}
    fields["anneal_steps"] = args.steps
    if args.preset == "adap_pos_ins_vec":  # the paper's two stages: first where the prompt stands, then what it is
        model = get_peft_model(model, DynamicPromptConfig.preset("adap_pos", **fields))
        fit(model, train_examples, Collator(tokenizer), args)
        fields["position"] = learned_position(model)
        model = model.unload()
        print(
            f"the first stage puts {fields['position']} of {args.tokens} prompt tokens behind the review", flush=True
        )
    model = get_peft_model(model, DynamicPromptConfig.preset(args.preset, **fields))
    model.print_trainable_parameters()
    fit(model, train_examples, Collator(tokenizer), args)
    with record_choices() as record:
        after = accuracy(model, tokenizer, test_examples, labels)
    print(
        f"accuracy on {len(test_examples)} held-out sentences: {before:.3f} without the adapter, {after:.3f} with it"
    )
    for name, what in (("positions", "prompt tokens behind the review"), ("lengths", "prompt tokens used")):
        chosen = [getattr(choices, name) for choices in record]
        if chosen[0] is not None:
            counts = Counter(number for numbers in chosen for number in numbers.tolist())
            print(f"{what}: " + ", ".join(f"{number} in {count}" for number, count in sorted(counts.items())))
    if record[0].mixture is not None:
        print(f"mixture of the first reviews:\n{record[0].mixture[:4]}")

    model.save_pretrained(args.output)
    loaded = PeftModel.from_pretrained(load_base(args.model)[0], args.output).eval()
    with record_choices() as record:
        inputs = tokenizer([make_prompt(example) for example in test_examples[:3]], padding=True, return_tensors="pt")
        loaded.generate(**inputs, max_new_tokens=2, do_sample=False)
    print(f"loaded from {args.output}, for three reviews: {record[0]}", flush=True)


if __name__ == "__main__":
    parser = make_parser(__doc__, lr=2e-2, output="outputs/dynamic_prompt")
    parser.add_argument("--preset", default="adap_ins_pos", help="a variant of the paper (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=20, help="number of prompt tokens (default: %(default)s)")
    parser.add_argument("--source", default="frozen", help="frozen or embeddings (default: %(default)s)")
    main(parser.parse_args())
