# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
What an adapter costs above the bare model on as many positions: training step, first token, decoding; and 1,000 resident adapters.

    python benchmarks/overhead.py --pairs 20 --json overhead.json
    python benchmarks/overhead.py --method preft --parts train,first,decode

The limit of a method with l slots is the bare model on S + l tokens, so every ratio is to that; PreFT has no slots. Each pair runs the bare model and the
adapter one after the other, in turns which of them is first; reported are the median of the pairs' ratios and the interval of 95 %
that a bootstrap gives it. float32, CPU, batch of 8. The script starts itself anew with an allocator that keeps its blocks, see
bench.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from bench import ALLOCATOR, peak_mb, reset_peak
from many_adapters import _share_weights, add_and_switch, with_adapters
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict

from peft_instance_prompt import IAPTConfig, PreFTConfig


sys.path.append(str(Path(__file__).resolve().parent.parent / "realdata"))

from smollm2 import load_smollm2


BATCH, PROMPT = 8, 96
CONFIGS = {"iapt": IAPTConfig, "preft": PreFTConfig}
SLOTS = {"iapt": 4, "preft": 0}  # of the default config


def tenants(base: torch.nn.Module, count: int, method: str) -> PeftModel:
    """A model with `count` adapters of the default shape."""
    make = CONFIGS[method]
    model = get_peft_model(base, make(task_type="CAUSAL_LM"), adapter_name="tenant0").eval()
    for number in range(1, count):
        model.add_adapter(f"tenant{number}", make(task_type="CAUSAL_LM"))
    return model


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(10, 40_000, (rows, length), generator=torch.Generator().manual_seed(length))  # (rows, length)


def compare(bare: Callable[[], float], ours: Callable[[], float], pairs: int) -> dict[str, float]:
    """The median ratio of two timed calls and its interval."""
    bare(), ours()
    ratios = []
    for number in range(pairs):
        if number % 2:
            b = bare()
            ratios.append(ours() / b)
        else:
            o = ours()
            ratios.append(o / bare())
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"ratio": statistics.median(ratios), "low": medians[50], "high": medians[1949], "pairs": pairs}


def timed(call: Callable) -> Callable[[], float]:
    def clock() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return clock


def train_step(model: torch.nn.Module, rows: torch.Tensor, answer: int) -> Callable[[], None]:
    """Forward and backward with labels on the last `answer` tokens. The bare model has gradients from its embeddings on, as a
    model with prompts has."""
    labels = rows.clone()
    labels[:, :-answer] = -100
    embedding = model.get_input_embeddings()
    adapted = isinstance(model, PeftModel)

    def step() -> None:
        if adapted:
            loss = model(input_ids=rows, labels=labels).loss
        else:
            loss = model(inputs_embeds=embedding(rows).requires_grad_(True), labels=labels).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def first_token(model: torch.nn.Module, rows: torch.Tensor, names: dict) -> Callable[[], None]:
    @torch.no_grad()
    def step() -> None:
        model(input_ids=rows, use_cache=True, logits_to_keep=1, **names)

    return step


def decoding(model: torch.nn.Module, rows: torch.Tensor, names: dict, steps: int = 24) -> Callable[[], float]:
    """Seconds for `steps` new tokens after the first."""

    @torch.no_grad()
    def clock() -> float:
        out = model(input_ids=rows, use_cache=True, logits_to_keep=1, **names)
        start = time.perf_counter()
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(dim=-1)  # (B, 1)
            cache = out.cache if "cache" in out.keys() else out.past_key_values
            out = model(input_ids=token, past_key_values=cache, use_cache=True, **names)
        return time.perf_counter() - start

    return clock


def resident(base: torch.nn.Module, count: int, repeats: int) -> dict[str, float]:
    """Seconds to add, switch, load and save beside `count` adapters."""
    import tempfile

    model = with_adapters(_share_weights(base), count)
    found = {name.replace("_ms", "_s"): value / 1000 for name, value in add_and_switch(model, repeats).items()}
    with tempfile.TemporaryDirectory() as folder:
        saves = [timed(lambda: model.save_pretrained(folder, selected_adapters=["tenant0"]))() for _ in range(repeats)]
        loads = []
        for number in range(repeats):
            loads.append(timed(lambda n=number: model.load_adapter(f"{folder}/tenant0", adapter_name=f"loaded{n}"))())
    assert len(get_peft_model_state_dict(model, adapter_name="loaded0")) > 0
    return {**found, "save_s": statistics.median(saves), "load_s": statistics.median(loads)}


def memory_of_training(base: torch.nn.Module, kind: str, length: int, method: str) -> float:
    """MB that three training steps take above the loaded model. For a process that has done nothing else."""
    model = base if kind == "bare" else tenants(base, 1, method)
    rows = ids(BATCH, length + SLOTS[method] if kind == "bare" else length)
    step = train_step(model.train(), rows, length // 2)
    for parameter in base.parameters():
        parameter.sum()  # weights are mapped from the file, and resident only once they are read
    reset_peak()  # loading has a peak of its own
    loaded = peak_mb()
    for _ in range(3):
        step()
    return peak_mb() - loaded


def compare_memory(length: int, method: str) -> dict[str, float]:
    """Runs the bare model and the adapter in a process each."""
    found = {}
    for kind in ("bare", "adapter"):
        command = [sys.executable, __file__, "--method", method, "--memory", kind, str(length)]
        found[f"{kind}_mb"] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {**found, "ratio": found["adapter_mb"] / found["bare_mb"]}


def import_seconds(pairs: int) -> dict[str, float]:
    """Seconds that the package's import takes when peft is there: the median of fresh processes, with the least and the greatest."""
    code = "import peft, time; s = time.perf_counter(); import peft_instance_prompt; print(time.perf_counter() - s)"
    run = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(pairs)]
    return {"seconds": statistics.median(run), "low": min(run), "high": max(run)}


def begin() -> tuple[torch.nn.Module, dict, Callable[[str, dict], None]]:
    """The frozen base model, the results with their set-up, and a function that notes and prints one of them."""
    if platform.system() == "Linux" and not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base, _ = load_smollm2()
    base.requires_grad_(False)
    results: dict = {
        "set_up": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
    }

    def show(name: str, found: dict) -> None:
        results[name] = found
        numbers = ", ".join(
            f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
        )
        print(f"{name:<36} {numbers}", flush=True)

    return base, results, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--method", choices=CONFIGS, default="iapt")
    parser.add_argument("--parts", default="train,memory,first,decode,resident,import")
    parser.add_argument("--lengths", default="64,256", help="tokens of a training row (default: %(default)s)")
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "LENGTH"), help="used by the part `memory`")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    base, results, show = begin()
    if args.memory:
        print(memory_of_training(base, args.memory[0], int(args.memory[1]), args.method))
        return
    parts, slots = args.parts.split(","), SLOTS[args.method]
    lengths = [int(length) for length in args.lengths.split(",")]
    if "memory" in parts:
        for length in lengths:
            show(f"memory of training, {length} tokens", compare_memory(length, args.method))
    if "import" in parts:
        show("import above peft's", import_seconds(5))

    one = tenants(_share_weights(base), 1, args.method)
    if "train" in parts:
        trained = tenants(_share_weights(base), 1, args.method).train()
        for length in lengths:
            longer = train_step(base.train(), ids(BATCH, length + slots), length // 2)
            show(
                f"train, {length} tokens",
                compare(timed(longer), timed(train_step(trained, ids(BATCH, length), length // 2)), args.pairs),
            )
        base.eval()
    if "first" in parts:
        bare = timed(first_token(base, ids(BATCH, PROMPT + slots), {}))
        show("first token, 1 adapter", compare(bare, timed(first_token(one, ids(BATCH, PROMPT), {})), args.pairs))
        eight = tenants(_share_weights(base), 8, args.method)
        names = {"adapter_names": [f"tenant{n}" for n in range(8)]}
        show(
            "first token, 8 adapters", compare(bare, timed(first_token(eight, ids(BATCH, PROMPT), names)), args.pairs)
        )
    if "decode" in parts:
        for count, rows in ((1, 8), (8, 8), (32, 32)):
            many = one if count == 1 else tenants(_share_weights(base), count, args.method)
            names = {} if count == 1 else {"adapter_names": [f"tenant{n}" for n in range(count)]}
            bare, ours = decoding(base, ids(rows, PROMPT + slots), {}), decoding(many, ids(rows, PROMPT), names)
            show(f"decoding, {count} tenants", compare(bare, ours, args.pairs))
    if "resident" in parts:
        for count in (8, 1000):
            show(f"{count} resident", resident(base, count, 5))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
