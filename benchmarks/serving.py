# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Adapters in vLLM beside the bare engine: in CPU time and by the clock, and what it takes to add and remove one.

    make test-vllm PYTEST_ARGS=--collect-only          # makes the environment
    OMP_NUM_THREADS=1 taskset -c 1 .venv-vllm/bin/python benchmarks/serving.py

Four engines run in processes of their own: the bare one, one with IAPT's adapters, one with PreFT's, and one with vLLM's own LoRA
(r = 16, all linear layers) and without this package. A round asks each of them, one after the other, in turns which is first: 8 and
then 32 requests at once, and 7 short prompts behind a long one. The requests share 8 adapters, and where these have slots, prompts are
shorter by as many. SmolLM2-135M in float32 on the CPU, vLLM's defaults: compiled, in chunks, with the prefix cache, which none of these
prompts hits. Each round is written to the file of results; a run whose set-up is that of the file goes on from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import RESULTS, setup


sys.path.append(str(Path(__file__).resolve().parent.parent / "realdata"))

SLOTS, PROMPT, LONG = 4, 60, 2000  # tokens; the slots are among those of a prompt
ADAPTERS, ADDED = 8, 20  # of each kind; added one by one beside many
# What a round measures, by name: a method of `Engine` and its arguments.
CALLS = {"8 requests": ("run", 64, 8), "32 requests": ("run", 64, 32), "beside a long prompt": ("late", 8)}


# ---------------------------------------------------------------------------------------------------------- adapters


def make_adapters(folder: Path, tenants: int, resident: int, model: Any = None, targets: Any = "all-linear") -> None:
    """Adapters that differ, `folder/prompt/0` and so on: tenants of each kind, small ones that are only there, and `ADDED` to add."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from peft_instance_prompt import IAPTConfig, PreFTConfig
    from smollm2 import load_smollm2

    model = model or load_smollm2()[0]
    configs = {
        "prompt": IAPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS, init_weights=False),
        "preft": PreFTConfig(task_type="CAUSAL_LM", init_weights=False),
        "lora": LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=targets, init_lora_weights=False),
    }
    if resident:
        configs["resident"] = IAPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=SLOTS, bottleneck_dim=4)
        configs["added"] = configs["prompt"]
    counts = {"resident": resident, "added": ADDED}
    for kind, config in configs.items():
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(folder / kind / "0")
        model = adapted.unload()
        text = json.loads((folder / kind / "0" / "adapter_config.json").read_text())
        text.pop("weights_digest", None)
        weights = load_file(folder / kind / "0" / "adapter_model.safetensors")
        for number in range(counts.get(kind, tenants)):
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
        tenants (`int`): How many requests run at once at most.
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

        self.kind, self.folder = kind, folder
        self.adapters = len([*(folder / kind).glob("*")])
        settings: dict[str, Any] = {}
        if kind in ("prompt", "preft"):
            settings["additional_config"] = {"instance_prompt": {}}
        if kind == "lora":
            settings.update(enable_lora=True, max_loras=self.adapters, max_lora_rank=16)
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

        first = {"resident": 10_000, "added": 20_000}.get(kind, 1)
        return LoRARequest(f"{kind}-{number}", first + number, str(self.folder / kind / str(number)))

    def tokens_of_a_step(self) -> int:
        return self.llm.vllm_config.scheduler_config.max_num_batched_tokens

    def add(self, lengths: list[int], tokens: int) -> list[str]:
        """Add a request for each length of a prompt, with the adapters in turn and `tokens` new tokens; returns their names."""
        from vllm import SamplingParams

        self.runs += 1
        draw = random.Random(self.runs)
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        names = [f"{self.runs}-{number}" for number in range(len(lengths))]
        for number, (name, length) in enumerate(zip(names, lengths)):
            ids = [draw.randrange(10, self.vocabulary) for _ in range(length - SLOTS * (self.kind == "prompt"))]
            named = self.named(self.kind, number % self.adapters) if self.adapters else None
            self.llm.add_request(name, {"prompt_token_ids": ids}, params, lora_request=named)
        return names

    def late(self, requests: int) -> dict[str, float]:
        """Seconds until 95 % of the short requests have their first token, if one of `LONG` tokens came before them."""
        start = time.perf_counter()
        _, *short = self.add([LONG, *[PROMPT] * (requests - 1)], 1)
        came: dict[str, float] = {}
        while self.llm.has_unfinished_requests():
            for output in self.llm.step():
                came.setdefault(output.request_id, time.perf_counter() - start)
        return {"first, 95 %": statistics.quantiles([came[name] for name in short], n=20, method="inclusive")[-1]}

    def run(self, tokens: int, requests: int) -> dict[str, float]:
        """Seconds until all requests have their first token, from then on, and in all, by the clock and of the CPU."""
        clock, cpu = [], []

        def read() -> None:
            clock.append(time.perf_counter())
            cpu.append(time.process_time())

        read()
        self.add([PROMPT] * requests, tokens)
        found: set[str] = set()
        while len(found) < requests:
            found.update(output.request_id for output in self.llm.step())
        read()
        while self.llm.has_unfinished_requests():
            self.llm.step()
        read()
        taken = {}
        for what, start, end in (("first", 0, 1), ("decode", 1, 2), ("all", 0, 2)):
            taken[what] = clock[end] - clock[start]
            taken[f"{what}, CPU"] = cpu[end] - cpu[start]
        return taken

    def resident(self, count: int) -> dict[str, list[float]]:
        """Milliseconds to add and to remove each of the adapters `added` beside `count` others."""
        for number in range(count):
            self.llm.add_lora(self.named("resident", number))
        taken: dict[str, list[float]] = {"add_ms": [], "remove_ms": []}
        for number in range(ADDED):
            named, start = self.named("added", number), time.perf_counter()
            self.llm.add_lora(named)
            added = time.perf_counter()
            self.llm.remove_lora(named.lora_int_id)
            taken["add_ms"].append(1000 * (added - start))
            taken["remove_ms"].append(1000 * (time.perf_counter() - added))
        for number in range(count):
            self.llm.remove_lora(self.named("resident", number).lora_int_id)
        return taken


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


def one_round(engines: dict[str, Remote], number: int, *call: Any) -> dict[str, dict[str, float]]:
    """What each engine measures in a round; from round to round, a different one is first."""
    order = list(engines)
    first = number % len(order)
    return {kind: engines[kind](*call) for kind in order[first:] + order[:first]}


def compare(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The ratios of the engines' times to those of the bare one, and their median seconds, by `"MEASURE, ENGINE"`."""
    results = {}
    for kind, taken in rounds[0].items():
        for what in taken:
            ratios = [found[kind][what] / found["bare"][what] for found in rounds]
            seconds = statistics.median(found[kind][what] for found in rounds)
            results[f"{what}, {kind}"] = {**summary(ratios), "seconds": seconds}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--resident", type=int, default=1000)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", default=RESULTS / "serving" / "smollm2-135m-instruct.json"
    )
    args = parser.parse_args()
    import vllm

    about = {"model": "smollm2-135m-instruct", "dtype": "float32", **setup("cpu")}
    about |= {"vllm": vllm.__version__, "compiled": not args.eager}
    results: dict[str, Any] = {"setup": about, "adding": {}, "rounds": []}
    if args.results.exists():
        results = json.loads(args.results.read_text())
        if results["setup"] != about:
            parser.error(f"{args.results} has another set-up, {results['setup']}, not {about}: name another file")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(Path(folder), ADAPTERS, args.resident)
        requests = max(call[-1] for call in CALLS.values())
        kinds = ("bare", "preft", "prompt", "lora")
        engines = {kind: Remote(kind, Path(folder), requests, args.eager) for kind in kinds}
        results["tokens_of_a_step"] = engines["bare"]("tokens_of_a_step")
        for count in (0, args.resident):
            if str(count) not in results["adding"]:
                results["adding"][str(count)] = engines["prompt"]("resident", count)
        one_round(engines, 0, "run", 2, requests)  # loads the adapters
        while (number := len(results["rounds"])) < args.rounds:
            results["rounds"].append({name: one_round(engines, number, *call) for name, call in CALLS.items()})
            args.results.write_text(json.dumps(results, indent=1) + "\n")
            print(f"round {number}", flush=True)
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    main()
