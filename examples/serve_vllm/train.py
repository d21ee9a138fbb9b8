# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Train two adapters of different methods on SmolLM2, on the CPU, for one server.

    python examples/serve_vllm/train.py outputs/serve_vllm
    python examples/serve_vllm/train.py outputs/serve_vllm --short     # does it run?

`sentiment` (IAPT) tells whether a film review is positive, `source` (IDPG) where a sentence comes from. Base model and sentences come
from PyPI packages. The last lines are the command that serves them.
"""

import argparse
import random
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # first: the other imports may fail

import torch
from peft import get_peft_model
from tqdm import trange

from peft_instance_prompt import IAPTConfig, IDPGConfig


sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "realdata"))

from pypi_assets import asset_folder
from smollm2 import load_smollm2
from vader import FILES, load_sentences, sentiment_splits


STEPS, ROWS = 40, 8
SENTIMENT, SOURCE = "Review: {}\nSentiment:", "Text: {}\nSource:"


def examples() -> dict[str, list[tuple[str, str]]]:
    """Prompts and answers, by adapter."""
    reviews = [(SENTIMENT.format(x["text"]), f" {x['label']}") for x in sentiment_splits("movie")[0]]
    texts = [(SOURCE.format(text), f" {name}") for name in FILES for text, _ in load_sentences(name)]
    random.Random(0).shuffle(texts)
    return {"sentiment": reviews, "source": texts}


CONFIGS = {
    "sentiment": IAPTConfig(task_type="CAUSAL_LM"),
    # A server runs the model once, so the vector of the instance comes from its embeddings.
    "source": IDPGConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, bottleneck_dim=64, instance_source="embeddings"),
}


def batch(tokenizer, rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Padded rows, whose labels are their answers."""
    encoded = tokenizer([prompt + answer for prompt, answer in rows], padding=True, return_tensors="pt")
    labels = torch.full_like(encoded["input_ids"], -100)
    for row, (_, answer) in enumerate(rows):
        n = len(tokenizer(answer)["input_ids"])
        labels[row, -n:] = encoded["input_ids"][row, -n:]  # padding is on the left
    return {**encoded, "labels": labels}


def main(folder: str, steps: int) -> None:
    model, tokenizer = load_smollm2()
    for name, rows in examples().items():
        torch.manual_seed(0)
        adapted = get_peft_model(model, CONFIGS[name]).train()
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        bar = trange(steps, desc=name)
        for step in bar:
            loss = adapted(**batch(tokenizer, rows[step * ROWS : (step + 1) * ROWS])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0 or step == steps - 1:
                bar.write(f"{name}, step {step}: loss {loss.item():.3f}")
        adapted.save_pretrained(f"{folder}/{name}")
        model = adapted.unload()
    modules = " ".join(f"{name}={Path(folder, name).resolve()}" for name in CONFIGS)
    print(
        "\nServe them with\n\n"
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 python -m vllm.entrypoints.openai.api_server \\\n"
        f"    --model {asset_folder('smollm2-135m-instruct')} --served-model-name base --host 127.0.0.1 \\\n"
        f"    --dtype float32 --max-model-len 1024 --enable-lora --lora-modules {modules}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="outputs/serve_vllm", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of {ROWS} sentences (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="does it run? 3 steps")
    args = parser.parse_args()
    if args.short:
        args.steps = min(args.steps, 3)
        one_line.short_form(args.steps)
    main(args.folder, args.steps)
