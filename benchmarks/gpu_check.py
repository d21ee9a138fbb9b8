# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
The first check on a GPU: what serving and training cost on a model of Llama-3.1-8B's shape, with random weights in bfloat16.

    python benchmarks/gpu_check.py           # one card of 80 GB; meant to take ten minutes
    python benchmarks/gpu_check.py --tiny    # does it run? A tiny model in float32 on the CPU

Decoding and the first token with 1, 8 and 64 tenants, a different adapter in each row, and a training step of one adapter: of the bare
model, LoRA (r = 16 on queries and values; PEFT's mixed batch), IAPT and PreFT with their defaults. Where vLLM is installed, its engine is
measured, too: bare, with its own LoRA, and with IAPT. All of a row is measured in turns within one run. A figure is the median of the
rounds' ratios to the bare model, with the interval of 95 % that a bootstrap gives it. Printed is a table in Markdown, row by row.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from machine import setup
from serving import PROMPT, SLOTS, Remote, compare, make_adapters, one_round, summary
from serving_cost import in_turns, serve, step
from serving_models import adapted, load
from tqdm import tqdm


# By their names in serving_models: the columns.
METHODS = {"bare": "bare", "lora-r16-qv": "LoRA", "iapt": "IAPT", "preft": "PreFT"}
QUERIES_AND_VALUES = ["q_proj", "v_proj"]  # of that LoRA
# The engines of vLLM that stand beside each other, by the methods that they serve, with their shares of the card's memory. LoRA's
# buffers are allocated for all of its tenants and for all linear layers.
ENGINES = {"bare": ("bare", 0.25), "lora-r16-qv": ("lora", 0.36), "iapt": ("prompt", 0.28)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="does it run? A tiny model in float32 on the CPU")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--without-vllm", action="store_true", help="leave vLLM out where it is installed")
    args = parser.parse_args()
    large = {
        **{"model": None, "shape": "llama-3.1-8b", "dtype": "bfloat16", "device": "cuda"},
        **{"tenants": (1, 8, 64), "tokens": PROMPT, "new_tokens": 33, "train_rows": 4, "train_tokens": 512},
    }
    tiny = {
        **{"shape": "tiny", "dtype": "float32", "device": "cpu", "rounds": 2},
        **{"tenants": (1, 3), "tokens": 8, "new_tokens": 4, "train_rows": 2, "train_tokens": 16},
    }
    for name, value in {**large, **(tiny if args.tiny else {})}.items():
        setattr(args, name, value)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --tiny runs without one")
    return args


def people(tenants: int) -> str:
    return f"{tenants} tenant{'s' * (tenants > 1)}"


def cells(milliseconds: float, ratios: dict[str, dict | None]) -> list[str]:
    """The bare model's time, and each method's ratio to it, `None` where there is none."""
    others = [ratios[name] for name in METHODS if name != "bare"]
    return [
        f"{milliseconds:.1f} ms",
        *(f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "not measured" for r in others),
    ]


def show(row: list[str]) -> None:
    tqdm.write("| " + " | ".join(row) + " |")


# ------------------------------------------------------------------------------------------------------ transformers


def measured(
    base: torch.nn.Module, tenants: int, measure: Callable[..., dict], rounds: int, bar: tqdm, training: bool = False
) -> dict[str, list[str]]:
    """By what was measured: the cells of its row."""
    candidates = {name: adapted(base, name, tenants, rows=tenants) for name in METHODS}
    if not training:  # adapters in the base model's type, as a server keeps them; trained ones are in float32
        candidates = {name: (model.to(base.dtype), kwargs) for name, (model, kwargs) in candidates.items()}

    def counted(model: torch.nn.Module, kwargs: dict) -> dict:
        found = measure(model, kwargs)
        bar.update()
        return found

    found = in_turns(candidates, counted, rounds)
    return {
        what: cells(bare["median"], {name: summary(found[name][what]["ratios"]) for name in METHODS})
        for what, bare in found["bare"].items()
        if what != "memory_mb"  # a ratio of what is little, which may be zero
    }


def transformers_rows(base: torch.nn.Module, args: argparse.Namespace) -> Iterator[list[str]]:
    total = len(METHODS) * (args.rounds + 1) * (len(args.tenants) + 1)
    with tqdm(total=total, desc="transformers") as bar:
        for tenants in args.tenants:

            def serving(model: torch.nn.Module, kwargs: dict, rows: int = tenants) -> dict:
                return serve(model, kwargs, rows, args.tokens, args.new_tokens, args.device)

            found = measured(base, tenants, serving, args.rounds, bar)
            yield [f"decoding, a step, {people(tenants)}", *found["per_token"]]
            yield [f"first token, {people(tenants)}", *found["first_token"]]
            free()

        def training(model: torch.nn.Module, kwargs: dict) -> dict:
            return step(model, kwargs, args.train_rows, args.train_tokens, args.device)

        found = measured(base, 1, training, args.rounds, bar, training=True)
        yield [f"training step, {args.train_rows} rows of {args.train_tokens} tokens", *found["step"]]


def free() -> None:
    gc.collect()  # a tuner and its model know each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------------------------------- vLLM


def write_folders(base: torch.nn.Module, folder: Path, args: argparse.Namespace) -> None:
    """What vLLM reads: the adapters, and a model that has a config and no weights."""
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder / "model")
    make_adapters(folder, max(args.tenants), 0, base, QUERIES_AND_VALUES)


def vllm_rows(folder: Path, args: argparse.Namespace) -> Iterator[list[str]]:
    """All engines serve as many tenants as there are at most, so that each starts once."""
    model = {"model": str(folder / "model"), "load_format": "dummy", "skip_tokenizer_init": True, "dtype": args.dtype}
    model["max_model_len"] = 512
    engines: dict[str, Remote] = {}
    try:
        for kind, share in tqdm(ENGINES.values(), desc="engines of vLLM start"):
            more = {**model, "gpu_memory_utilization": share}
            engines[kind] = Remote(kind, folder, max(args.tenants), args.tiny, more)
        for tenants in tqdm(args.tenants, desc="vLLM"):
            one_round(engines, 0, "run", args.new_tokens, tenants)  # loads the adapters
            found = compare([one_round(engines, n, "run", args.new_tokens, tenants) for n in range(args.rounds)])
            for what, title, steps in (
                ("decode", "decoding, a step", args.new_tokens - 1),
                ("first", "first step", 1),
            ):
                ratios = {
                    name: found.get(f"{what}, {ENGINES[name][0]}") if name in ENGINES else None for name in METHODS
                }
                row = cells(1000 * found[f"{what}, bare"]["seconds"] / steps, ratios)
                yield [f"vLLM: {title}, {people(tenants)}", *row]
    finally:
        for engine in engines.values():
            engine.close()


def main() -> None:
    args = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    base = load(args)
    show(["", *METHODS.values()])
    show(["---"] * (1 + len(METHODS)))
    for row in transformers_rows(base, args):
        show(row)
    about = {"shape": args.shape, "dtype": args.dtype, "prompt": f"{args.tokens} tokens", "rounds": args.rounds}
    if find_spec("vllm") and not args.without_vllm:
        with tempfile.TemporaryDirectory() as folder:
            write_folders(base, Path(folder), args)
            del base
            free()
            for row in vllm_rows(Path(folder), args):
                show(row)
        import vllm

        about |= {"vllm": vllm.__version__, "prompt of vLLM": f"{PROMPT} tokens, {SLOTS} of them slots"}
    tqdm.write("\n" + ", ".join(f"{name} {value}" for name, value in {**about, **setup(args.device)}.items()))


if __name__ == "__main__":
    main()
