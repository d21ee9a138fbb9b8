# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Experiment folders for MetaMathQA, the suite of PEFT's `method_comparison` in which adapters of Llama-3.2-3B learn to answer maths questions.

    python benchmarks/method_comparison/experiments.py    # writes MetaMathQA/experiments/METHOD/NAME

See the README beside this file for how to run them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path


FOLDER = Path(__file__).resolve().parent / "MetaMathQA" / "experiments"
# The runner takes the loss over question and answer, and scores plain text too. So each adapter has to find the end of the
# question by itself: it is the word before the colon in the runner's "...\nAnswer:". (With the colon or the line break it would depend on
# what the tokenizer joins them with.)
COMMON = {"task_type": "CAUSAL_LM", "response_template": "Answer", "missing_template": "all"}
IAPT = {"peft_type": "IAPT", **COMMON}
WIDE = {
    **IAPT,
    "bottleneck_dim": 64,
    "num_virtual_tokens": 8,
}  # 11 M parameters, about those of LoRA of rank 32 on q and v
IDPG = {"peft_type": "IDPG", **COMMON}
# folder: (adapter_config.json, training_params.json, which holds only what differs from the runner's defaults)
EXPERIMENTS: dict[str, tuple[dict, dict]] = {
    "iapt/llama-3.2-3B-lr_0.001": (IAPT, {"optimizer_kwargs": {"lr": 1e-3}}),
    "iapt/llama-3.2-3B-bottleneck64-tokens8-lr_0.001": (WIDE, {"optimizer_kwargs": {"lr": 1e-3}}),
    "iapt/llama-3.2-3B-bottleneck64-tokens8-lr_0.0003": (WIDE, {"optimizer_kwargs": {"lr": 3e-4}}),
    "iapt/llama-3.2-3B-bottleneck64-tokens8-constant-lr_0.001": (
        {**WIDE, "condition": "constant"},
        {"optimizer_kwargs": {"lr": 1e-3}},
    ),
    "idpg/llama-3.2-3B-multi_layer-lr_0.001": (IDPG, {"optimizer_kwargs": {"lr": 1e-3}}),
    "idpg/llama-3.2-3B-single_layer-lr_0.001": (
        {**IDPG, "multi_layer": False},
        {"optimizer_kwargs": {"lr": 1e-3}},
    ),
    "ipt/llama-3.2-3B-lookup-lr_0.001": (
        {"peft_type": "IPT", **COMMON},
        {"optimizer_kwargs": {"lr": 1e-3}},
    ),
    "dynamic_prompt/llama-3.2-3B-lr_0.001": (
        {"peft_type": "DYNAMIC_PROMPT", **COMMON, "anneal_steps": 5000},
        {"optimizer_kwargs": {"lr": 1e-3}},
    ),
    "lpt/llama-3.2-3B-npg-lr_0.001": ({"peft_type": "LPT", **COMMON}, {"optimizer_kwargs": {"lr": 1e-3}}),
    "idspam/llama-3.2-3B-lr_0.001": ({"peft_type": "IDSPAM", **COMMON}, {"optimizer_kwargs": {"lr": 1e-3}}),
    "preft/llama-3.2-3B-rank16-lr_0.001": (
        {"peft_type": "PREFT", **COMMON, "r": 16},
        {"optimizer_kwargs": {"lr": 1e-3}},
    ),
}


def write(folder: Path = FOLDER) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, files in EXPERIMENTS.items():
        (folder / name).mkdir(parents=True)
        for file, content in zip(("adapter_config.json", "training_params.json"), files):
            (folder / name / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
    print(f"{len(EXPERIMENTS)} experiments in {FOLDER}")
