# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
What a method costs, as ratios: decoding and prefill against the bare model, a training step against LoRA, the import against
`import peft`.

    python benchmarks/bench.py --methods iapt,lora --json bench.json
    python benchmarks/bench.py --methods idspam,lpt --measure train --train-reference iapt

Milliseconds depend on the machine and on what else it does; ratios hardly do, if everything is measured in one run and in
turns (A, B, A, B, ...). So each round measures every candidate once, and what is reported is the median over the rounds of a
candidate's time divided by the reference's time in the same round. Models are in float32, on the CPU.

On Linux the script starts itself anew with an allocator that keeps what it has: else glibc gives large blocks back after each
operation, and the page faults of getting them again are a tenth to a third of the time, at random.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from bench_methods import BATCH, METHODS
from transformers import StoppingCriteria, StoppingCriteriaList


# The loader of the model.
sys.path.append(str(Path(__file__).resolve().parent.parent / "realdata"))

from smollm2 import load_smollm2


# glibc's own variables; the first is as large as it can be
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
PROMPT_TOKENS = 96
TRAIN_TOKENS = 64


# --------------------------------------------------------------------------------------------------------------------
# Measurements. Each takes (model, kwargs) and returns seconds.
# --------------------------------------------------------------------------------------------------------------------
def random_batch(model, length: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(100, model.config.vocab_size, (BATCH, length), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class Clock(StoppingCriteria):
    """Notes when each token is there. It never stops anything."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.inference_mode()
def decode(model, kwargs: dict, new_tokens: int = 25) -> float:
    """Time per token of greedy `generate`, after the first token, so without prefill."""
    model.eval()
    clock = Clock()
    model.generate(
        **random_batch(model, PROMPT_TOKENS),
        **kwargs,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return statistics.median(after - before for before, after in zip(clock.times, clock.times[1:]))


@torch.inference_mode()
def prefill(model, kwargs: dict) -> float:
    """Time of a forward over the prompt that fills the cache and computes the last position's logits; median of 3."""
    model.eval()
    batch = random_batch(model, PROMPT_TOKENS)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(**batch, **kwargs, use_cache=True, logits_to_keep=1)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def train(model, kwargs: dict) -> float:
    """Time of forward, backward and AdamW step. The first three quarters of a row are the prompt."""
    model.train()
    # the state is kept between rounds, as in training, and hence on the model that it belongs to
    if not hasattr(model, "bench_optimizer"):
        model.bench_optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    batch = random_batch(model, TRAIN_TOKENS)
    labels = batch["input_ids"].clone()
    labels[:, : TRAIN_TOKENS * 3 // 4] = -100
    start = time.perf_counter()
    model(**batch, **kwargs, labels=labels, use_cache=False).loss.backward()
    model.bench_optimizer.step()
    model.bench_optimizer.zero_grad()
    return time.perf_counter() - start


def in_turns(measure: Callable, candidates: dict, reference: str, repeats: int) -> dict:
    """Measures all candidates in turns and returns for each its median time and its median ratio to the reference."""
    for model, kwargs in candidates.values():
        measure(model, kwargs)  # warm-up
    rounds = []
    for i in range(repeats):
        print(f"  {measure.__name__}: round {i + 1} of {repeats}", file=sys.stderr, flush=True)
        rounds.append({name: measure(model, kwargs) for name, (model, kwargs) in candidates.items()})
    return {
        name: {
            "ms": 1000 * statistics.median(times[name] for times in rounds),
            "ratio": statistics.median(times[name] / times[reference] for times in rounds),
            "ratios": [round(times[name] / times[reference], 4) for times in rounds],
        }
        for name in candidates
    }


def peak_mb() -> float:
    """Peak resident memory of this process, in MB: since `reset_peak` where there is /proc, else since its start."""
    try:
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    except OSError:
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def train_memory(name: str) -> dict:
    """Peak memory of two training steps. To be called in a process that does nothing else."""
    model, kwargs = METHODS[name](load_smollm2()[0])
    for parameter in model.parameters():
        parameter.sum()  # weights are mapped from the file, and resident only once they are read
    reset_peak()  # loading has a peak of its own
    loaded = peak_mb()
    for _ in range(2):
        train(model, kwargs)
    return {"peak_mb": peak_mb(), "above_loaded_mb": peak_mb() - loaded}


def import_times(repeats: int) -> dict:
    """What `import peft_instance_prompt` adds to `import peft`, each in a fresh process, in turns."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    times = {"peft": [], "peft_instance_prompt": []}
    for i in range(repeats + 1):
        for name in times:
            result = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"import {name} failed:\n{result.stderr}")
            if i > 0:  # the first round fills the disk cache
                times[name].append(float(result.stdout))
    pairs = list(zip(times["peft_instance_prompt"], times["peft"]))
    return {
        "peft_ms": 1000 * statistics.median(times["peft"]),
        "extra_ms": 1000 * statistics.median(ours - theirs for ours, theirs in pairs),
        "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="iapt,iapt-mixed,lora,lora-mixed", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--measure", default="decode,prefill,train,import", help="(default: %(default)s)")
    parser.add_argument("--train-reference", default="lora", help="what a step is compared to (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--train-memory-of", metavar="METHOD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)

    if args.train_memory_of:
        print(json.dumps(train_memory(args.train_memory_of)))
        return

    methods = args.methods.split(",")
    measures = args.measure.split(",")
    for value, known in [
        ([args.train_reference, *methods], METHODS),
        (measures, ("decode", "prefill", "train", "import")),
    ]:
        if unknown := set(value) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    # the references are always measured
    methods = list(dict.fromkeys(["bare", args.train_reference, *methods]))

    results = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    if set(measures) - {"import"}:
        base, _ = load_smollm2()
        candidates = {name: METHODS[name](copy.deepcopy(base)) for name in methods}
        results["parameters"] = {
            name: sum(p.numel() for p in model.parameters() if p.requires_grad) if name != "bare" else 0
            for name, (model, _) in candidates.items()
        }
        if "decode" in measures:
            results["decode"] = in_turns(decode, candidates, "bare", args.repeats)
        if "prefill" in measures:
            results["prefill"] = in_turns(prefill, candidates, "bare", args.repeats)
        if "train" in measures:
            # several adapters at a time are not trained
            candidates = {name: x for name, x in candidates.items() if name != "bare" and not name.endswith("-mixed")}
            results["train"] = in_turns(train, candidates, args.train_reference, args.repeats)
            for name in candidates:
                command = [sys.executable, __file__, "--train-memory-of", name]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                results["train"][name].update(json.loads(output.splitlines()[-1]))
    if "import" in measures:
        results["import"] = import_times(args.repeats)

    print(f"\nSmolLM2-135M, batch {BATCH}, {PROMPT_TOKENS} prompt tokens; training on {BATCH} x {TRAIN_TOKENS} tokens")
    print(
        f"decode: per token, against bare; prefill: against bare; train: per step, against {args.train_reference}; memory: peak, and of"
    )
    print("that above the loaded model")
    header = ("method", "trainable", "decode", "", "prefill", "", "train", "", "memory", "")
    layout = "{:<14} {:>11}  {:>9} {:>7}  {:>9} {:>7}  {:>9} {:>7}  {:>9} {:>9}"
    print(layout.format(*header))
    if set(measures) - {"import"}:
        for name in methods:
            row = [name, f"{results['parameters'][name]:,}"]
            for measure in ("decode", "prefill", "train"):
                cell = results.get(measure, {}).get(name)
                row += [f"{cell['ms']:.1f} ms", f"x {cell['ratio']:.2f}"] if cell else ["-", ""]
            cell = results.get("train", {}).get(name)
            row += [f"{cell['peak_mb']:.0f} MB", f"{cell['above_loaded_mb']:.0f} MB"] if cell else ["-", ""]
            print(layout.format(*row))
    if "import" in measures:
        cell = results["import"]
        print(
            f"import peft: {cell['peft_ms']:.0f} ms; peft_instance_prompt adds {cell['extra_ms']:.0f} ms (x {cell['ratio']:.3f})"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if platform.system() == "Linux" and not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})
    main()
