# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Many adapters on one backbone: does decoding slow down with the number that are resident, and what do adding and switching
cost?

    python benchmarks/many_adapters.py --json many.json

Decoding is measured with 8 adapters in the batch, in turns on a model that holds 8 and on one that holds more. Adding and
switching are timed on the same models, with the share of the time that is spent in PEFT's own code.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from bench import decode
from bench_methods import BATCH
from peft import get_peft_model

from peft_instance_prompt import IAPTConfig


# The loader of the model.
sys.path.append(str(Path(__file__).resolve().parent.parent / "realdata"))

from smollm2 import load_smollm2


def config() -> IAPTConfig:
    return IAPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, bottleneck_dim=4)


def with_adapters(base: torch.nn.Module, count: int) -> torch.nn.Module:
    """A model that holds `count` adapters. All but the first are put in place directly: to add them one by one takes PEFT
    a time that grows with the square of their number."""
    model = get_peft_model(base, config(), adapter_name="tenant0").eval()
    (layer,) = (layer for _, layer in model.base_model._layers())
    for number in range(1, count):
        generator = copy.deepcopy(layer.generators["tenant0"])
        generator.requires_grad_(False)
        layer.generators[f"tenant{number}"] = generator
        model.peft_config[f"tenant{number}"] = generator.config
    return model


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _clocked(times: list, call):
    start = time.perf_counter()
    try:
        return call()
    finally:
        times.append(time.perf_counter() - start)


def add_and_switch(model: torch.nn.Module, repeats: int) -> dict:
    """Milliseconds to add one adapter, to switch to another, and what of the former is this package's own."""
    tuner, own = model.base_model, []

    def clock(method):
        return lambda *args, **kwargs: _clocked(own, lambda: method(*args, **kwargs))

    tuner._create_and_replace = clock(tuner._create_and_replace)
    tuner._prepare_adapter_config = clock(tuner._prepare_adapter_config)
    add, add_own, switch = [], [], []
    for number in range(repeats):
        own.clear()
        add.append(timed(lambda: model.add_adapter(f"new{number}", config())))
        add_own.append(sum(own))
        switch.append(timed(lambda: model.set_adapter(f"new{number}")))
        model.set_adapter("tenant0")
        model.delete_adapter(f"new{number}")
    del tuner._create_and_replace, tuner._prepare_adapter_config
    return {
        "add_ms": 1000 * statistics.median(add),
        "add_own_ms": 1000 * statistics.median(add_own),
        "switch_ms": 1000 * statistics.median(switch),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--counts", default="8,64,256,1000", help="numbers of resident adapters (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    base, _ = load_smollm2()
    counts = [int(count) for count in args.counts.split(",")]
    # The backbone is shared between the models: a shallow copy of its modules, with the same weights.
    models = {count: with_adapters(_share_weights(base), count) for count in counts}
    names = {"adapter_names": [f"tenant{number}" for number in range(BATCH)]}
    for model in models.values():
        decode(model, names)
    rounds = [{count: decode(model, names) for count, model in models.items()} for _ in range(args.repeats)]
    results = {}
    for count, model in models.items():
        ratio = statistics.median(times[count] / times[counts[0]] for times in rounds)
        results[count] = {"decode_ratio": ratio, **add_and_switch(model, args.repeats)}
        print(
            f"{count:>5} resident: decoding x {ratio:.3f} of {counts[0]}; add {results[count]['add_ms']:.0f} ms (own "
            f"{results[count]['add_own_ms']:.0f} ms); switch {results[count]['switch_ms']:.1f} ms",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


def _share_weights(model: torch.nn.Module) -> torch.nn.Module:
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


if __name__ == "__main__":
    main()
