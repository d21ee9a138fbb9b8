# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters on SmolLM2 whose weights are far from their start, what transformers answers with them, and an engine that serves them.

`python served.py FILE '{"settings": {"enforce_eager": true}, "batches": [["base", "iapt"]]}' OUT` compares an engine with such settings;
see `test_variants.py`.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model


if __name__ == "__main__":
    tests = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(tests), str(tests.parent / "realdata")]

from tiny import perturb  # noqa: E402

from peft_instance_prompt import (  # noqa: E402
    DynamicPromptConfig,
    IAPTConfig,
    IDPGConfig,
    IPTConfig,
    LPTConfig,
    PreFTConfig,
)
from pypi_assets import asset_folder  # noqa: E402
from smollm2 import load_smollm2  # noqa: E402


TEXTS = [
    "A good way to cook an egg is to",
    "My favourite animal, without any doubt, is the",
    "Once upon a time there was a small village by the sea, in which an old fisherman lived with his three daughters. Each "
    "morning, before the sun was up, he went down to the harbour, and each evening he",  # longer than two blocks
]
NEW_TOKENS = 8
OVERLAY = Path(sys.prefix) / "overlay"  # vLLM 0.33, see the Makefile
BASE, CHAT = "base", "chat"  # the base model, on texts and on chats
LORA = "lora"
EMBEDS = {"instance_source": "embeddings"}
PHM = {"num_virtual_tokens": 3, "bottleneck_dim": 16, "phm_n": 4, "dropout": 0.0}
ENCODER = {"num_virtual_tokens": 4, "strategy": "encoder", "table_rank": 4, "bottleneck_dim": 8, "dropout": 0.0}

# What is served, and how far the weights are moved: answers must change and stay text.
CONFIGS = {
    "iapt": (IAPTConfig(prompt_position="before"), 0.15),
    "iapt_too": (IAPTConfig(prompt_position="before"), 0.15),
    "iapt_first": (IAPTConfig(prompt_position="after_first", share_layers=3), 0.15),
    "iapt_end": (IAPTConfig(), 0.05),
    "iapt_some": (IAPTConfig(layers_to_transform=[3, 7, 20], condition="constant"), 0.05),
    "iapt_template": (IAPTConfig(response_template="chat"), 0.05),
    "idpg": (IDPGConfig(**PHM, **EMBEDS), 0.1),
    "idpg_single": (IDPGConfig(multi_layer=False, **PHM, **EMBEDS), 0.1),
    "ipt": (IPTConfig(num_virtual_tokens=20, table_rank=4), 0.5),
    "ipt_deep": (IPTConfig(host="deep", **ENCODER), 0.1),
    "dynamic": (
        DynamicPromptConfig(num_virtual_tokens=6, length="instance", representation="instance", **EMBEDS),
        0.5,
    ),
    "preft": (PreFTConfig(), 0.05),
    "preft_template": (PreFTConfig(response_template="chat"), 0.05),
}
CHATS = ("iapt_template", "preft_template")  # whose prompts are chats
# What is not served by the layers; the first two are as prompt embeddings.
OTHERS = {
    "idpg_frozen": (IDPGConfig(multi_layer=False, **PHM), 0.1),
    "dynamic_frozen": (DynamicPromptConfig(num_virtual_tokens=6), 0.5),
    "idpg_frozen_deep": (IDPGConfig(**PHM), 0.1),
    "lpt": (LPTConfig(), 0.1),
    LORA: (LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), 0.1),
}


@dataclass
class Served:
    """Adapters and their answers.

    Attributes:
        base (`Path`): The base model's folder.
        folders (`dict[str, Path]`): The adapters' folders, by name.
        prompts (`dict[str, list[list[int]]]`): Each adapter's prompts.
        answers (`dict[str, list[list[int]]]`): The greedy continuation of each, by transformers.
        firsts (`dict[str, list[float]]`): The log-probability of each answer's first token.
        embeds (`dict[str, list[torch.Tensor]]`): The prompts as embeddings, of adapters that enter at the input.
    """

    base: Path
    folders: dict[str, Path] = field(default_factory=dict)
    prompts: dict[str, list[list[int]]] = field(default_factory=dict)
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    firsts: dict[str, list[float]] = field(default_factory=dict)
    embeds: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path) -> Served:
        from peft_instance_prompt import to_prompt_embeds

        model, tokenizer = load_smollm2()
        made = cls(asset_folder("smollm2-135m-instruct"))
        texts = [tokenizer(text)["input_ids"] for text in TEXTS]
        chats = [chat_ids(tokenizer, text) for text in TEXTS]
        for name, prompts in ((BASE, texts), (CHAT, chats)):
            made.prompts[name] = prompts
            made.answers[name], made.firsts[name] = scored(model, prompts)
        for seed, (name, (config, scale)) in enumerate({**CONFIGS, **OTHERS}.items()):
            torch.manual_seed(seed)
            config.task_type = "CAUSAL_LM"
            adapted = perturb(get_peft_model(model, config), seed, scale=scale).eval()
            made.prompts[name] = chats if getattr(config, "response_template", None) else texts
            made.answers[name], made.firsts[name] = scored(adapted, made.prompts[name])
            if name in list(OTHERS)[:2]:
                made.embeds[name] = [to_prompt_embeds(adapted, torch.tensor([ids]))[0] for ids in texts]
            adapted.save_pretrained(folder / name)
            made.folders[name] = folder / name
            model = adapted.unload()
        return made

    def of_beginnings(self, names: list[str]) -> tuple[Served, dict[str, list[float]]]:
        """Some of the adapters with more prompts, the beginnings of the texts, and a first token each; and, by adapter, what the
        log-probabilities of these tokens are in bfloat16. The adapters' weights stay in float32."""
        prompts = [ids[:end] for ids in self.prompts[BASE] for end in range(4, len(ids) + 1, 3)]
        made, half = replace(self, prompts=dict.fromkeys(names, prompts), answers={}, firsts={}), {}
        models = {dtype: load_smollm2()[0].to(dtype) for dtype in (torch.float32, torch.bfloat16)}
        for name in names:
            logs = {}  # each (B, V)
            for dtype, model in models.items():
                folder = self.folders.get(name)
                adapted = PeftModel.from_pretrained(model, folder).eval() if folder else model
                logs[dtype] = generated(adapted, prompts, 1)[1]
                models[dtype] = adapted.unload() if folder else model
            tokens = logs[torch.float32].argmax(-1, keepdim=True)  # (B, 1)
            made.answers[name] = tokens.tolist()
            made.firsts[name], half[name] = (each.gather(1, tokens)[:, 0].tolist() for each in logs.values())  # (B,)
        return made, half

    def answers_of(self, names: list[str]) -> dict[str, list[list[int]]]:
        return {name: self.answers[name] for name in names}


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]


def continuations(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy continuation of each prompt."""
    return scored(model, prompts)[0]


def scored(model: torch.nn.Module, prompts: list[list[int]]) -> tuple[list[list[int]], list[float]]:
    """The greedy continuation of each prompt, and the log-probability of its first token."""
    answers, logs = generated(model, prompts, NEW_TOKENS)
    return answers.tolist(), logs.gather(1, answers[:, :1])[:, 0].tolist()  # (B,)


@torch.no_grad()
def generated(model: torch.nn.Module, prompts: list[list[int]], new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`new` greedy tokens behind each prompt (B, new), and the log-probabilities of the first (B, V)."""
    S = max(map(len, prompts))
    ids = torch.tensor([[0] * (S - len(p)) + p for p in prompts])  # (B, S)
    mask = torch.tensor([[0] * (S - len(p)) + [1] * len(p) for p in prompts])  # (B, S)
    kept = {"return_dict_in_generate": True, "output_logits": True}
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **lengths, **kept)
    return out.sequences[:, S:], out.logits[0].float().log_softmax(-1)  # (B, new), (B, V)


class Engine:
    """vLLM with the adapters.

    Args:
        served (`Served`): The adapters.
        settings: Of `vllm.LLM`.
    """

    def __init__(self, served: Served, **settings: Any):
        from vllm import LLM

        plain = {
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 64,
            "additional_config": {"instance_prompt": {}},
        }
        self.served = served
        self.llm = LLM(model=str(served.base), **{**plain, **settings})

    def named(self, name: str) -> Any:
        """The `LoRARequest` that names an adapter; None for the base model."""
        from vllm.lora.request import LoRARequest

        folders = self.served.folders
        return LoRARequest(name, list(folders).index(name) + 1, str(folders[name])) if name in folders else None

    def ask(self, prompts: list[list[int]], named: list[Any], **params: Any) -> list[Any]:
        """The outputs of requests that run together."""
        from vllm import SamplingParams

        wanted = SamplingParams(**{"temperature": 0, "max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS, **params})
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(inputs, wanted, lora_request=named, use_tqdm=False)

    def answers(self, names: list[str]) -> dict[str, list[list[int]]]:
        """The answers of several adapters to their prompts, all in one batch."""
        each = [(name, ids) for name in names for ids in self.served.prompts[name]]
        outputs = self.ask([ids for _, ids in each], [self.named(name) for name, _ in each])
        found: dict[str, list[list[int]]] = {}
        for (name, _), output in zip(each, outputs):
            found.setdefault(name, []).append(list(output.outputs[0].token_ids))
        return found

    def firsts(self, names: list[str]) -> dict[str, list[float]]:
        """By adapter: the log-probability of each answer's first token; it is among the 20 likeliest, or -inf."""
        found = {}
        for name in names:
            prompts = self.served.prompts[name]
            outputs = self.ask(prompts, [self.named(name)] * len(prompts), max_tokens=1, min_tokens=1, logprobs=20)
            pairs = zip(outputs, self.served.answers[name])
            own = [output.outputs[0].logprobs[0].get(answer[0]) for output, answer in pairs]
            found[name] = [one.logprob if one else -math.inf for one in own]
        return found

    def first_differences(self, names: list[str]) -> dict[str, float]:
        """By adapter: the largest difference between the engine's log-probability of an answer's first token and transformers'."""
        pairs = {name: zip(own, self.served.firsts[name]) for name, own in self.firsts(names).items()}
        return {name: max(abs(own - first) for own, first in each) for name, each in pairs.items()}


def compare(file: str, given: str, out: str) -> None:
    """Write, as JSON, what an engine with `settings` is, and whether its answers for `names` are those of transformers."""
    import vllm

    served, given = pickle.loads(Path(file).read_bytes()), json.loads(given)
    engine = Engine(served, **given["settings"])
    config = engine.llm.llm_engine.vllm_config
    # Of an engine in this process only: with several workers it has processes of its own.
    inside = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and config.parallel_config.tensor_parallel_size == 1
    chunks, steps = (watch_chunks(engine), watch_steps(engine)) if inside else ({}, {})
    found = {"same": {}}
    for names in given["batches"]:
        found["same"].update({n: answers == served.answers[n] for n, answers in engine.answers(names).items()})
    if given.get("differences"):
        found["differences"] = engine.first_differences(given["differences"])
    found["firsts"] = engine.firsts(given.get("firsts", []))
    found.update(
        release=list(vllm.__version_tuple__[:2]),
        mode=int(config.compilation_config.mode),
        steps=steps,
        v2=config.use_v2_model_runner,
        dtype=str(config.model_config.dtype),
        chunks=chunks,
    )
    Path(out).write_text(json.dumps(found))


def watch_steps(engine: Engine) -> dict[str, int]:
    """Counts the steps that run compiled code, and those that do not."""
    from vllm.forward_context import get_forward_context

    worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model, counts = worker.model_runner.get_model(), {"compiled": 0, "eager": 0}
    stack = getattr(model, "model", model)
    ready = any(getattr(stack, name, None) is not None for name in ("_compiled_bytecode", "aot_compiled_fn"))

    def count(*_):
        runs_compiled = ready and not stack.do_not_compile and not get_forward_context().skip_compiled
        counts["compiled" if runs_compiled else "eager"] += 1

    model.register_forward_hook(count)
    return counts


def watch_chunks(engine: Engine) -> dict[str, int]:
    """Counts how often the scheduler holds an instruction back, and how many prompts it cuts into chunks."""
    scheduler, counts = engine.llm.llm_engine.engine_core.engine_core.scheduler, {"held": 0, "cut": 0}
    reserve = scheduler._reserve_prefill_lookahead

    def counted(request, computed, new):
        number = reserve(request, computed, new)
        counts["held"] += number == 0
        counts["cut"] += 0 < computed + number < request.num_prompt_tokens
        return number

    scheduler._reserve_prefill_lookahead = counted
    return counts


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    compare(*sys.argv[1:])
