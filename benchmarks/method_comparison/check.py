# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Does an experiment folder load, train and generate as PEFT's MetaMathQA runner would have it? On any model, also a tiny one on a CPU.

    python benchmarks/method_comparison/check.py --model FOLDER_OR_NAME [EXPERIMENT ...]

The steps are those of the runner, in its order; the code is our own. What it cannot show is the score.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from experiments import FOLDER
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, get_cosine_schedule_with_warmup

import peft_instance_prompt  # noqa: F401, registers the methods


# The runner's defaults, as far as they are not the sizes of a long run.
DEFAULTS = {
    "dtype": "bfloat16",
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "autocast_adapter_dtype": True,
    "query_template": "Question: {query} Think step by step.\nAnswer:",
}
# Of our own making, in the form of the data.
QUESTIONS = [
    ("Ann has 3 apples and buys 4 more. How many does she have?", "She has 3 + 4 = 7 apples.\nThe answer is: 7"),
    ("A pen costs 2 dollars. What do 5 pens cost, and 6?", "5 pens cost 5 * 2 = 10 dollars.\nThe answer is: 10"),
    ("What is half of 18?", "Half of 18 is 18 / 2 = 9.\nThe answer is: 9"),
]
PLAIN = [
    "A river is a natural stream of fresh water that flows towards an ocean, a lake or another river.",
    "Rain falls.",
]


def check(experiment: Path, model_id: str, steps: int = 2) -> dict:
    """
    Load, score plain text, train, generate, score again, save, and load what was saved.

    Returns:
        `dict`: The losses of the steps, the losses on plain text before and after, what was generated, trainable parameters, and
        the bytes of the saved weights.
    """
    config = PeftConfig.from_pretrained(str(experiment))
    params = {**DEFAULTS, **json.loads((experiment / "training_params.json").read_text())}
    torch.manual_seed(params["seed"])
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    if not tokenizer.pad_token:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(model_id, dtype=getattr(torch, params["dtype"]))
    model = get_peft_model(base, config, autocast_adapter_dtype=params["autocast_adapter_dtype"])
    optimizer = getattr(torch.optim, params["optimizer_type"])(model.parameters(), **params["optimizer_kwargs"])
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)
    template = params["query_template"]
    parameters = model.get_nb_trainable_parameters()[0]

    model.eval()
    before = plain_loss(model, tokenizer)
    model.train()
    losses = []
    for _ in range(steps):
        rows = [tokenizer(template.format(query=query) + answer) for query, answer in QUESTIONS]
        rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
        batch = dict(tokenizer.pad(rows, return_tensors="pt", padding_side="right"))
        labels = batch["input_ids"].clone()  # question and answer, and the first token of padding, which is the end
        for label, row in zip(labels, rows):
            label[len(row["input_ids"]) + 1 :] = -100
        optimizer.zero_grad()
        loss = model(**batch, labels=labels, num_items_in_batch=batch["attention_mask"].sum().item()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), params["grad_norm_clip"])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    model.eval()
    rows = [tokenizer(template.format(query=query)) for query, _ in QUESTIONS]
    rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
    batch = tokenizer.pad(rows, return_tensors="pt", padding_side="left")
    width = batch["input_ids"].shape[1]
    settings = GenerationConfig(cache_implementation="static", max_length=width + 8)
    with torch.inference_mode():
        written = model.generate(**batch, generation_config=settings, pad_token_id=tokenizer.eos_token_id)
    after = plain_loss(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        again = PeftModel.from_pretrained(
            model.unload(), folder, autocast_adapter_dtype=params["autocast_adapter_dtype"]
        )
        same = plain_loss(again.eval(), tokenizer)
    return {
        "losses": losses,
        "plain": (before, after, same),
        "written": tokenizer.batch_decode(written[:, width:]),
        "parameters": parameters,
        "bytes": size,
    }


@torch.inference_mode()
def plain_loss(model: torch.nn.Module, tokenizer) -> float:
    """Per token of text that is no question; the runner's measure of what was forgotten."""
    rows = [{key: tokenizer(text)[key] for key in ("input_ids", "attention_mask")} for text in PLAIN]
    batch = tokenizer.pad(rows, return_tensors="pt", padding_side="left")
    logits = model(**batch, pad_token_id=tokenizer.eos_token_id).logits
    losses = []
    for row, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"]):
        n = int(mask.sum())
        losses.append(torch.nn.functional.cross_entropy(row[-n:-1].float(), ids[-n + 1 :], reduction="none"))
    return torch.cat(losses).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", type=Path, help="folders (default: all)")
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    args = parser.parse_args()
    for folder in args.experiments or sorted(path.parent for path in FOLDER.glob("*/*/adapter_config.json")):
        found = check(folder, args.model)
        print(f"{folder.parent.name}/{folder.name}: {found}")


if __name__ == "__main__":
    main()
