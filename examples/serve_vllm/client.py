# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Ask the server that `train.py` names: both adapters and the base model at once.

    python examples/serve_vllm/client.py                 # what each answers
    python examples/serve_vllm/client.py --load 64       # tokens per second for 64 requests, spread over the three

It needs no packages.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401


MODELS = ("sentiment", "source", "base")
TEXTS = (
    "Review: A warm and clever film, from the first frame to the last.\nSentiment:",
    "Text: The battery lasts a week and the case feels solid.\nSource:",
)
MOST = 1000  # requests of a load test


def complete(server: str, model: str, prompt: str, max_tokens: int, **fields) -> dict:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
    call = Request(f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(call, timeout=600) as answer:
        return json.load(answer)


def ask(server: str) -> None:
    calls = [(model, text) for text in TEXTS for model in MODELS]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = pool.map(lambda call: complete(server, *call, max_tokens=1), calls)
        for (model, text), answer in zip(calls, answers):
            print(f"{model:>10}: {text!r} -> {answer['choices'][0]['text']!r}")


def load(server: str, requests: int, at_once: int, max_tokens: int) -> None:
    calls = [(MODELS[number % len(MODELS)], TEXTS[number % len(TEXTS)]) for number in range(requests)]
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda call: complete(server, *call, max_tokens, ignore_eos=True), calls))
    seconds = time.perf_counter() - start
    tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
    print(
        f"{requests} requests, {at_once} at once: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens per second"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--load", type=int, metavar="REQUESTS", help=f"how many, up to {MOST}")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request of the load test")
    args = parser.parse_args()
    if args.load is None:
        ask(args.server)
    elif 0 < args.load <= MOST:
        load(args.server, args.load, args.at_once, args.tokens)
    else:
        parser.error(f"--load must lie in 1..{MOST}, got {args.load}")


if __name__ == "__main__":
    main()
