# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
What packed rows cost with IAPT, and what packing gains: training steps on SmolLM2-135M.

    python benchmarks/packing.py --pairs 20 --json packing.json

1. A packed step of IAPT, whose sequences have l slots each, against the bare model's packed step on as many positions: its sequences
   are l tokens longer.
2. What packing rows of many lengths gains, a padded batch's time over that of the same rows in one packed row: IAPT's gain over LoRA's.

All of a pair runs one after the other, in an order that turns; reported are the median of the pairs' ratios and the interval of 95 % that
a bootstrap gives it. float32, CPU, sdpa. The script starts itself anew with an allocator that keeps its blocks, see bench.py.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from many_adapters import _share_weights
from overhead import begin, compare, ids, tenants, timed
from peft import LoraConfig, PeftModel, get_peft_model


SLOTS = 4


def packed(rows: list[torch.Tensor], instruction: int) -> dict[str, torch.Tensor]:
    """One row of all sequences (n,), as TRL's padding-free collator makes it: labels behind the first `instruction` tokens."""
    labels = [torch.cat([torch.full_like(row[:instruction], -100), row[instruction:]]) for row in rows]
    positions = [torch.arange(len(row)) for row in rows]
    named = {"input_ids": rows, "labels": labels, "position_ids": positions}
    return {name: torch.cat(values)[None] for name, values in named.items()}  # (1, S) each


def padded(rows: list[torch.Tensor], instruction: int) -> dict[str, torch.Tensor]:
    """A row per sequence, with padding on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    columns = torch.arange(max(map(len, rows)))
    mask = (columns < torch.tensor([len(row) for row in rows])[:, None]).long()  # (B, S)
    whole = pad(rows, batch_first=True)  # (B, S)
    labels = whole.masked_fill((mask == 0) | (columns < instruction), -100)  # (B, S)
    return {"input_ids": whole, "labels": labels, "attention_mask": mask}


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward and backward. The bare model has gradients from its embeddings on, as a model with prompts has."""
    embedding, adapted = model.get_input_embeddings(), isinstance(model, PeftModel)

    def run() -> None:
        inputs = dict(batch)
        if not adapted:
            inputs["inputs_embeds"] = embedding(inputs.pop("input_ids")).requires_grad_(True)
        model(**inputs, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def gains(clocks: dict[str, Callable[[], float]], pairs: int) -> dict[str, float]:
    """The gain of packing with IAPT over that with LoRA, its interval, and the two gains."""
    for clock in clocks.values():
        clock()
    names, found = list(clocks), []
    for number in range(pairs):
        turn = names[number % len(names) :] + names[: number % len(names)]
        taken = {name: clocks[name]() for name in turn}
        ours, lora = (taken[f"{kind} padded"] / taken[f"{kind} packed"] for kind in ("iapt", "lora"))
        found.append((ours / lora, ours, lora))
    ratios = [ratio for ratio, _, _ in found]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=pairs)) for _ in range(2000))
    middle = [statistics.median(column) for column in zip(*found)]
    return dict(zip(("ratio", "iapt gain", "lora gain"), middle)) | {
        "low": medians[50],
        "high": medians[1949],
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--parts", default="step,gain")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    base, results, show = begin()
    base.train()
    ours = tenants(_share_weights(base), 1).train()
    if "step" in args.parts:
        for count, length in ((8, 64), (16, 64), (4, 256)):
            rows, longer = list(ids(count, length)), list(ids(count, length + SLOTS))
            bare, prompted = step(base, packed(longer, length // 2)), step(ours, packed(rows, length // 2))
            show(f"packed step, {count} x {length} tokens", compare(timed(bare), timed(prompted), args.pairs))
    if "gain" in args.parts:
        targets = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"])
        models = {"iapt": ours, "lora": get_peft_model(_share_weights(base), targets).train()}
        generator = torch.Generator().manual_seed(0)
        for low, high in ((16, 128), (16, 256)):
            rows = [ids(1, int(n))[0] for n in torch.randint(low, high + 1, (8,), generator=generator)]
            made = {"padded": padded(rows, 8), "packed": packed(rows, 8)}
            clocks = {
                f"{kind} {form}": timed(step(model, batch))
                for kind, model in models.items()
                for form, batch in made.items()
            }
            tokens = sum(map(len, rows))
            show(f"packing 8 rows of {low} to {high} ({tokens})", gains(clocks, args.pairs))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
