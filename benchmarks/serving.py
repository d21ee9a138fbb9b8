# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Adapters in vLLM: decoding and the first step beside the bare engine, and what it takes to add and remove one.

    make test-vllm PYTEST_ARGS=--collect-only          # makes the environment
    .venv-vllm/bin/python benchmarks/serving.py --json serving.json

Four engines run in processes of their own: the bare one, one with IAPT's adapters, one with PreFT's, and one with vLLM's own LoRA
(r = 16, all linear layers) and without this package. A round asks each of them, one after the other, in turns which is first; each
request has an adapter of its own. Reported are the medians of the rounds' ratios to the bare engine, by the clock and in CPU time, with
the interval of 95 % that a bootstrap gives them. Where an adapter has slots, its prompts are shorter by as many. SmolLM2-135M in float32
on the CPU, prompts of 64 tokens (and, for the 95th percentile of the first token, one of 2,000 that came first), vLLM's defaults: compiled, in chunks, with the prefix cache, which none of these prompts hits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parent.parent / "realdata"))

SLOTS, PROMPT, LONG = 4, 64, 2000  # of the prompts with slots, these are among the tokens


# ---------------------------------------------------------------------------------------------------------- adapters


def make_adapters(folder: Path, tenants: int, resident: int, model: Any = None, targets: Any = "all-linear") -> None:
    """Adapters that differ, `folder/prompt/0` and so on: tenants of each kind, and small ones that are only there."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from peft_instance_prompt import IAPTConfig, PreFTConfig
    from smollm2 import load_smollm2

    model = model or load_smollm2()[0]
    configs = {
        "prompt": IAPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS, init_weights=False),
        "preft": PreFTConfig(task_type="CAUSAL_LM", init_weights=False),
        "lora": LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=targets, init_lora_weights=False),
        "resident": IAPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS, bottleneck_dim=4),
    }
    for kind, config in configs.items():
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(folder / kind / "0")
        model = adapted.unload()
        text = json.loads((folder / kind / "0" / "adapter_config.json").read_text())
        text.pop("weights_digest", None)
        weights = load_file(folder / kind / "0" / "adapter_model.safetensors")
        for number in range(resident if kind == "resident" else tenants):
            target = folder / kind / str(number)
            target.mkdir(exist_ok=True)
            (target / "adapter_config.json").write_text(json.dumps(text))
            changed = {name: tensor * (1 + 1e-3 * number) for name, tensor in weights.items()}
            save_file(changed, target / "adapter_model.safetensors", metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------------------- engines


class Engine:
    """An engine in this process.

    Args:
        kind (`str`): `"bare"`, `"prompt"` (IAPT), `"preft"` or `"lora"`.
        folder (`Path`): The adapters.
        tenants (`int`): How many requests run at once.
        eager (`bool`): Whether the model is not compiled.
        more (`dict`, *optional*): Arguments of `LLM` in place of those here.
    """

    def __init__(self, kind: str, folder: Path, tenants: int, eager: bool, more: dict | None = None):
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if kind not in ("prompt", "preft"):
            os.environ["VLLM_PLUGINS"] = "none"
        from vllm import LLM

        from pypi_assets import asset_folder

        self.kind, self.folder, self.tenants = kind, folder, tenants
        settings: dict[str, Any] = {}
        if kind in ("prompt", "preft"):
            settings["additional_config"] = {"instance_prompt": {}}
        if kind == "lora":
            settings.update(enable_lora=True, max_loras=tenants, max_lora_rank=16)
        settings.update(
            model=str(asset_folder("smollm2-135m-instruct")),
            dtype="float32",
            max_model_len=LONG + 128,
            max_num_seqs=tenants,
            enforce_eager=eager,
            seed=0,
        )
        self.llm = LLM(**{**settings, **(more or {})}).llm_engine
        self.vocabulary = min(40_000, self.llm.model_config.get_vocab_size())
        self.runs = 0

    def named(self, kind: str, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        if self.kind == "bare":
            return None
        return LoRARequest(
            f"{kind}-{number}", number + 1 + 10_000 * (kind == "resident"), str(self.folder / kind / str(number))
        )

    def add(self, lengths: list[int], tokens: int) -> list[str]:
        """Add a request for each length of a prompt, each with an adapter of its own and `tokens` new tokens; returns their names."""
        from vllm import SamplingParams

        self.runs += 1
        draw = random.Random(self.runs)
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        names = [f"{self.runs}-{number}" for number in range(len(lengths))]
        for number, (name, length) in enumerate(zip(names, lengths)):
            ids = [draw.randrange(10, self.vocabulary) for _ in range(length - SLOTS * (self.kind == "prompt"))]
            named = self.named(self.kind, number)
            self.llm.add_request(name, {"prompt_token_ids": ids}, params, lora_request=named)
        return names

    def late(self, tenants: int) -> dict[str, float]:
        """Seconds until 95 % of the short requests have their first token, if one of `LONG` tokens came before them."""
        start = time.perf_counter()
        long, *short = self.add([LONG, *[PROMPT] * (tenants - 1)], 1)
        came: dict[str, float] = {}
        while self.llm.has_unfinished_requests():
            for output in self.llm.step():
                came.setdefault(output.request_id, time.perf_counter() - start)
        return {"first, 95 %": statistics.quantiles([came[name] for name in short], n=20)[-1]}

    def run(self, tokens: int, tenants: int | None = None) -> dict[str, float]:
        """
        Seconds until all requests have their first token, from then on, and in all, by the clock and of the CPU; and what `late` says.
        By default there are `self.tenants` requests.
        """
        tenants = tenants or self.tenants
        clock, cpu = [], []

        def read() -> None:
            clock.append(time.perf_counter())
            cpu.append(time.process_time())

        read()
        self.add([PROMPT] * tenants, tokens)
        found: set[str] = set()
        while len(found) < tenants:
            found.update(output.request_id for output in self.llm.step())
        read()
        while self.llm.has_unfinished_requests():
            self.llm.step()
        read()
        taken = self.late(tenants)
        for what, start, end in (("first", 0, 1), ("decode", 1, 2), ("all", 0, 2)):
            taken[what] = clock[end] - clock[start]
            taken[f"{what}, CPU"] = cpu[end] - cpu[start]
        return taken

    def resident(self, count: int, repeats: int) -> dict[str, float]:
        """Milliseconds to add and to remove an adapter beside `count` others."""
        for number in range(count):
            self.llm.add_lora(self.named("resident", number))
        add, remove = [], []
        for number in range(count, count + repeats):
            named, start = self.named("resident", number), time.perf_counter()
            self.llm.add_lora(named)
            added = time.perf_counter()
            self.llm.remove_lora(named.lora_int_id)
            remove.append(time.perf_counter() - added)
            add.append(added - start)
        for number in range(count):
            self.llm.remove_lora(self.named("resident", number).lora_int_id)
        return {"add_ms": 1000 * statistics.median(add), "remove_ms": 1000 * statistics.median(remove)}


def serve(pipe: Any, *args: Any) -> None:
    """Run an engine in a process of its own, call by call."""
    engine = Engine(*args)
    pipe.send("ready")
    while (call := pipe.recv()) is not None:
        pipe.send(getattr(engine, call[0])(*call[1:]))


class Remote:
    def __init__(self, *args: Any):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, other = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(other, *args))
        self.process.start()
        other.close()  # so that a dead engine ends the wait for it
        self.pipe.recv()

    def __call__(self, *call: Any) -> Any:
        self.pipe.send(call)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


# ------------------------------------------------------------------------------------------------------------ timing


def summary(ratios: list[float]) -> dict[str, float]:
    """The median and its interval of 95 %."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"ratio": statistics.median(ratios), "low": medians[50], "high": medians[1949], "rounds": len(ratios)}


def compare(
    engines: dict[str, Remote], rounds: int, tokens: int, tenants: int | None = None
) -> dict[str, dict[str, float]]:
    """The ratios of the engines' times to those of the bare one."""
    for engine in engines.values():
        engine("run", tokens, tenants)  # loads the adapters
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in engines}
    for number in range(rounds):
        order = list(engines)
        for kind in order[number % len(order) :] + order[: number % len(order)]:
            found[kind].append(engines[kind]("run", tokens, tenants))
    results = {}
    for kind in engines:
        for what in found[kind][0]:
            ratios = [own[what] / bare[what] for own, bare in zip(found[kind], found["bare"])]
            seconds = statistics.median(own[what] for own in found[kind])
            results[f"{what}, {kind}"] = {**summary(ratios), "seconds": seconds}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tenants", default="8")
    parser.add_argument(
        "--tokens", type=int, default=64, help="new tokens of each request; the first comes with the first step"
    )
    parser.add_argument("--resident", type=int, default=1000)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--without-lora", action="store_true", help="leave vLLM's own LoRA out")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    import torch
    import vllm

    results: dict[str, Any] = {
        "set_up": {
            **{"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()},
            **{"machine": platform.machine(), "compiled": not args.eager},
            **{"prompt": PROMPT, "tokens": args.tokens},
        }
    }

    def show(name: str, found: dict[str, float]) -> None:
        results[name] = found
        print(f"{name:<32}", ", ".join(f"{key} {value:.3f}" for key, value in found.items()), flush=True)

    tenants = [int(number) for number in args.tenants.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(Path(folder), max(tenants), max(tenants[0], args.resident) + 20)
        for count in tenants:
            kinds = ["bare", "prompt", "preft"] + ([] if args.without_lora else ["lora"])
            engines = {kind: Remote(kind, Path(folder), count, args.eager) for kind in kinds}
            for name, found in compare(engines, args.rounds, args.tokens).items():
                show(f"{count} tenants, {name}", found)
            if count == tenants[0]:
                for resident in (count, args.resident):
                    show(f"{resident} resident", engines["prompt"]("resident", resident, 20))
            for engine in engines.values():
                engine.close()
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
