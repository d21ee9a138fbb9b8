# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Does this package work with the libraries that are installed? `python -m peft_instance_prompt doctor`.

Adapters of every registered method are attached to four tiny models with random weights, and their promises are checked:

    inject  the adapter can be attached to the model
    effect  the adapter changes the logits; without an effect, all other checks would hold
    batch   a row of a padded batch has the same logits as alone, in a forward pass and for new tokens in `generate`
    cache   `generate` has the same logits with a cache and without
    save    an adapter that is loaded under a different name has the logits of the saved adapter
    leak    the logits do not depend on later tokens of the response, which the labels mark, in evaluation and training

The exit status is 0 if all checks hold, and 1 if one fails.
"""

from __future__ import annotations

import argparse
import platform
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata
from typing import Any, NamedTuple

import torch
import transformers
from packaging.requirements import Requirement
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from .. import __version__
from ..config import InstanceConfig
from . import promises
from .promises import Broken, Inputs, Probe


PACKAGE = "peft-instance-prompt"

VOCAB = 96
_common = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
_llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
# One model for each kind of positions. Its width is a multiple of 16, as the defaults of all methods need.
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("RoPE", _llama),
    "bloom": ("ALiBi", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt2": ("learned positions", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "t5": ("encoder-decoder", _t5),
}

# The rows of a batch that stands for all instances. With few rows, a method's discrete choices could be the same for all.
MANY = 64
TOLERANCE = 1e-4  # in units of the largest logit; rounding in float32 is about 1e-6, the effect of a random adapter 0.01 and more


class Result(NamedTuple):
    """The outcome of one check.

    Attributes:
        method (`str`): The method's name, as PEFT has it, e.g. `"IAPT"`.
        model (`str`): The model's type, a key of `MODELS`.
        check (`str`): The name of the check.
        error (`str`, *optional*): The largest difference or the exception, in one line; None if the check holds.
    """

    method: str
    model: str
    check: str
    error: str | None


def registered_methods() -> dict[str, type[InstanceConfig]]:
    """The config classes of all methods that were registered with `register_method`, by `peft_type`."""
    methods = PEFT_TYPE_TO_CONFIG_MAPPING.items()
    return {peft_type.value: cls for peft_type, cls in methods if issubclass(cls, InstanceConfig)}


def tiny_model(model_type: str) -> PreTrainedModel:
    """A model in evaluation mode, the same at each call, with weights so large that prompts change its logits."""
    config = AutoConfig.for_model(model_type, **_common, **MODELS[model_type][1])
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    nn.init.normal_(model.get_input_embeddings().weight)
    return model.eval()


def adapted(model_type: str, config_cls: type[InstanceConfig]) -> PeftModel:
    """The tiny model with an adapter in the method's default settings, whose weights are moved far from their start."""
    base = tiny_model(model_type)
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    fields: dict[str, Any] = {"task_type": task, **dict.fromkeys(config_cls.sized_by[:1], 4)}
    model = get_peft_model(base, config_cls(**fields))
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        # Vectors move less: they may be coefficients of an activation, which explodes far from its start.
        parameter.data.add_(torch.randn_like(parameter), alpha=1.0 if parameter.dim() > 1 else 0.05)
    return model.eval()


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids of a shape, without special tokens."""
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padded_batch(side: str) -> Inputs:
    """Ids and padding mask (3, 7) of rows of 7, 4 and 1 tokens."""
    rows = [random_tokens(n, seed=n) for n in (7, 4, 1)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0, padding_side=side)  # (3, 7)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def is_pair(model: PeftModel) -> bool:
    """Whether the base model is an encoder-decoder model."""
    return model.get_base_model().config.is_encoder_decoder


def seeded(model: PeftModel, **inputs: torch.Tensor) -> torch.Tensor:
    """The outputs, with the same dropout and random choices in each pass of training mode."""
    torch.manual_seed(0)
    return promises.outputs(model, **inputs)


def probe(model: PeftModel) -> Probe:
    # Without a cache, so that what is wrong with caches is found by one check only.
    return Probe(model, seeded, not is_pair(model), TOLERANCE, {**promises.GREEDY, "use_cache": False})


def check_effect(model: PeftModel) -> None:
    for row in range(3):
        promises.effect(probe(model), promises.row_alone(padded_batch("right"), row))


def check_batch(model: PeftModel) -> None:
    for side in ("left", "right"):
        promises.rows(probe(model), padded_batch(side))
    promises.rows(probe(model), padded_batch("left"), generates=True)


def check_cache(model: PeftModel) -> None:
    promises.cache(probe(model), padded_batch("left"))


def check_save(model: PeftModel) -> None:
    fresh = tiny_model(model.get_base_model().config.model_type)
    promises.saved(probe(model), fresh, {"input_ids": random_tokens(MANY, 5)}, adapter_name="another_name")


def check_leak(model: PeftModel) -> None:
    # Rows that agree up to the first token of the response. The instruction has fewer tokens than the prompt has vectors: a method
    # that reads a token for each vector would otherwise read the response.
    instruction, first = random_tokens(MANY, 2), random_tokens(MANY, 1, seed=1)  # (MANY, 2), (MANY, 1)
    pair, inputs = is_pair(model), []
    for seed in (2, 3):
        response = torch.cat([first, random_tokens(MANY, 6, seed=seed)], dim=1)  # (MANY, 7)
        whole = torch.cat([instruction, response], dim=1)  # (MANY, 9)
        labels = whole.masked_fill(torch.arange(9) < 2, -100)  # (MANY, 9)
        inputs.append(
            {"input_ids": instruction, "labels": response} if pair else {"input_ids": whole, "labels": labels}
        )
    early = 2 if pair else 3  # of a pair: the decoder's start token and `first`
    promises.leak(probe(model), inputs[0], inputs[1], early)


CHECKS: dict[str, Callable[[PeftModel], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (check_effect, check_batch, check_cache, check_save, check_leak)
}


def attempt(function: Callable, *args: Any) -> tuple[Any, str | None]:
    """The function's result and None, or None and its error in one line."""
    try:
        return function(*args), None
    except Exception as error:
        text = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
        return None, textwrap.shorten(text, 400, placeholder=" ...")


@torch.no_grad()
def run_doctor(methods: Sequence[str] | None = None) -> list[Result]:
    """Run all checks of all methods on all models; a check that fails stops none of the others.

    Args:
        methods (`list[str]`, *optional*): Names of registered methods. Defaults to all.

    Returns:
        `list[Result]`: One per method, model and check; only that of `"inject"` if the adapter cannot be attached.

    Raises:
        ValueError: `methods` holds a name that is not registered.
    """
    known = registered_methods()
    if unknown := sorted(set(methods or ()) - known.keys()):
        raise ValueError(f"`methods` must be some of {sorted(known)}, got {unknown}.")
    results = []
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        # The models are so small that threads would cost more than they give.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        for method in known if methods is None else methods:
            for model_type in MODELS:
                model, error = attempt(adapted, model_type, known[method])
                results.append(Result(method, model_type, "inject", error))
                checks = {} if model is None else CHECKS
                for name, check in checks.items():
                    results.append(Result(method, model_type, name, attempt(check, model)[1]))
    return results


def versions() -> list[str]:
    """A line for Python, this package and each of its libraries: the installed version and the required range."""
    try:
        wanted = [Requirement(text) for text in metadata.requires(PACKAGE)]
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        wanted = []
    specifiers: dict[str, Any] = {wish.name: wish.specifier for wish in wanted if wish.marker is None}
    lines = [f"{'python':22}{platform.python_version()}", f"{PACKAGE:22}{__version__}"]
    for name in ("torch", "transformers", "peft", "accelerate"):
        version, specifier = metadata.version(name), specifiers.get(name, "")
        outside = specifier and not specifier.contains(version, prereleases=True)
        requires = f"requires {specifier}{', WHICH THIS IS NOT' if outside else ''}" if specifier else ""
        lines.append(f"{name:22}{version:14}{requires}".rstrip())
    return lines


def as_table(results: Sequence[Result]) -> list[str]:
    """A line per method with each check's outcome over all models, then a line per failure."""
    columns = ("inject", *CHECKS)
    rows = [("method", *columns)]
    for method in dict.fromkeys(result.method for result in results):
        cells = []
        for check in columns:
            errors = [r.error for r in results if (r.method, r.check) == (method, check)]
            cells.append("FAILED" if any(errors) else "ok" if len(errors) == len(MODELS) else "not run")
        rows.append((method, *cells))
    failed = [r for r in results if r.error is not None]
    lines = [f"FAILED {r.method} on {r.model} ({MODELS[r.model][0]}), {r.check}: {r.error}" for r in failed]
    return [f"{name:22}{''.join(f'{cell:10}' for cell in cells)}".rstrip() for name, *cells in rows] + lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: print versions, the table and the failures; return 1 if a check failed, otherwise 0."""
    parser = argparse.ArgumentParser("python -m peft_instance_prompt doctor", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args(arguments)
    print(*versions(), "", sep="\n", flush=True)
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    results = run_doctor()
    print(*as_table(results), sep="\n")
    failed = sum(result.error is not None for result in results)
    print(f"{len(results)} checks on {', '.join(MODELS)}, {failed} failed, {time.perf_counter() - start:.0f} s")
    return int(failed > 0)
