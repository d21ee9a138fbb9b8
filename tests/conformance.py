# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What works with which method and which model family, found out by running it: `python tests/conformance.py --write`.

Each cell of the tables in docs/conformance.md is one small check on a tiny model with weights far from their start. LoRA, as
PEFT has it, runs through the same checks. A ValueError is a refusal, with its message; any other exception is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers as tf  # noqa: E402
from methods import KINDS, METHODS  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # noqa: E402
from tiny import (  # noqa: E402
    DECODERS,
    ENCODERS,
    PAIRS,
    VLMS,
    adapted,
    batch,
    causal_lm,
    encoder,
    pair,
    perturb,
    tokenizer,
    vlm,
)


ROOT = Path(__file__).resolve().parent.parent
PAGE, README = ROOT / "docs" / "conformance.md", ROOT / "README.md"
BEGIN, END = "<!-- conformance:begin -->", "<!-- conformance:end -->"
TITLES = {
    "lora": "LoRA",
    "iapt": "IAPT",
    "lpt": "LPT",
    "idpg": "IDPG",
    "ipt": "IPT",
    "dynamic_prompt": "DP",
    "idspam": "ID-SPAM",
}
COLUMNS = ["lora", *(kind for kind in KINDS if type(METHODS[kind]()).__module__.startswith("peft_instance_prompt."))]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
LENGTHS = (9, 6, 4)


class Cell(NamedTuple):
    """`what` is "works", "refused" or "fails"; `why` says it in a sentence."""

    what: str
    why: str = ""


def config(method: str, task_type: str = "CAUSAL_LM", base: torch.nn.Module | None = None, **fields):
    if method != "lora":
        return METHODS[method](task_type=task_type, **fields)
    # Where LoRA is most at home: PEFT's own choice for the model, else the attention's queries and values.
    model_type = "llama" if base is None else base.config.model_type
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if targets is None:
        ends = {name.rpartition(".")[2] for name, _ in base.named_modules()}
        usual = [name for name in ("q_proj", "v_proj", "query", "value", "q", "v", "Wqkv") if name in ends]
        targets = usual
    return LoraConfig(task_type=task_type, r=4, target_modules=targets, **fields)


def prompted(method: str, base: torch.nn.Module | None = None, task_type: str = "CAUSAL_LM", **fields) -> PeftModel:
    return adapted(causal_lm() if base is None else base, config(method, task_type, base, **fields))


def of_several(method: str, base: torch.nn.Module | None = None, task_type: str = "CAUSAL_LM") -> PeftModel:
    model = prompted(method, base, task_type)
    model.add_adapter("b", config(method, task_type, model.get_base_model()))
    return perturb(model, seed=1, adapter="b").eval()


def must(condition: bool, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


@torch.no_grad()
def logits(model: torch.nn.Module, side: str = "left", **kwargs) -> torch.Tensor:
    return model(**batch(*LENGTHS, side=side), **kwargs).logits


def text(model: torch.nn.Module, **kwargs) -> torch.Tensor:
    return model.generate(**batch(*LENGTHS), **{**GREEDY, **kwargs})


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {"input_ids": inputs["input_ids"][row : row + 1, inputs["attention_mask"][row].bool()]}


def with_adapter(model: PeftModel, name: str, call: Callable, **inputs):
    if name == "__base__":
        with model.disable_adapter():
            return call(**inputs)
    model.set_adapter(name)
    out = call(**inputs)
    model.set_adapter("default")
    return out


# ----------------------------------------------------------------------------------------------------------- features


def check_forward(method: str) -> None:
    out, bare = logits(prompted(method)), logits(causal_lm())
    must(out.shape == bare.shape, "the logits have another length than the input")
    must(not close(out, bare, 1e-3), "the adapter does nothing")


@torch.no_grad()
def check_padding(method: str) -> None:
    model, inputs = prompted(method), batch(*LENGTHS)
    left, right = logits(model), logits(model, side="right")
    for row, n in enumerate(LENGTHS):
        alone = model(**row_of(inputs, row)).logits[0]
        must(close(left[row, -n:], alone) and close(right[row, :n], alone), "a row depends on the padding beside it")


def check_greedy(method: str) -> None:
    model, inputs = prompted(method), batch(*LENGTHS)
    found = text(model)
    must(found.shape == (3, 14) and not torch.equal(found, text(causal_lm())), "the adapter does nothing")
    for row, n in enumerate(LENGTHS):
        alone = model.generate(**row_of(inputs, row), **GREEDY)
        must(torch.equal(found[row, 9:], alone[0, n:]), "a row's text depends on the rows beside it")


def check_same_text(method: str, how: dict, other: dict) -> None:
    model, found = prompted(method), []
    for kwargs in (how, other):
        torch.manual_seed(1)
        found.append(text(model, **kwargs))
    must(torch.equal(*found), f"{how} gives another text than {other}")


def check_assisted(method: str) -> None:
    model, inputs = prompted(method), batch(9)
    found = model.generate(**inputs, **GREEDY, assistant_model=causal_lm(seed=1))
    must(torch.equal(found, model.generate(**inputs, **GREEDY)), "assisted decoding gives another text")


def check_prompt_lookup(method: str) -> None:
    model, inputs = prompted(method), {name: value.repeat(1, 3) for name, value in batch(5).items()}
    found = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3)
    must(torch.equal(found, model.generate(**inputs, **GREEDY)), "prompt lookup gives another text")


def check_second_turn(method: str) -> None:
    model, inputs = prompted(method), batch(9)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, batch(3, seed=5)["input_ids"]], dim=1)  # (1, 17)
    scope = {} if method == "lora" else {"instruction_mask": (torch.arange(17) < 9).long()[None]}
    found = model.generate(ids, past_key_values=first.past_key_values, **GREEDY)
    must(torch.equal(found, model.generate(ids, use_cache=False, **scope, **GREEDY)), "the second turn differs")


def check_inputs_embeds(method: str) -> None:
    model, inputs = prompted(method), batch(*LENGTHS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **GREEDY)
    must(torch.equal(found, text(model)[:, 9:]), "embeddings give another text than their ids")


NAMES = ["b", "__base__", "default"]


@torch.no_grad()
def check_mixed_forward(method: str) -> None:
    model, inputs = of_several(method), batch(*LENGTHS)
    mixed = logits(model, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        alone = with_adapter(model, name, model, **row_of(inputs, row)).logits[0]
        must(close(mixed[row, -len(alone) :], alone), "a row of a mixed batch differs from the row alone")


def check_mixed_generate(method: str) -> None:
    model, inputs = of_several(method), batch(*LENGTHS)
    how = {"num_beams": 2, "num_return_sequences": 2}
    mixed = text(model, adapter_names=NAMES, **how)
    for row, name in enumerate(NAMES):
        alone = with_adapter(model, name, model.generate, **row_of(inputs, row), **GREEDY, **how)
        must(torch.equal(mixed[2 * row : 2 * row + 2, 9:], alone[:, -5:]), "a row's text differs from the row alone")


def check_switching(method: str) -> None:
    model = of_several(method)
    a = logits(model)
    model.set_adapter("b")
    b = logits(model)
    must(not close(a, b, 1e-3), "both adapters give the same")
    model.delete_adapter("default")
    must(torch.equal(logits(model), b), "deleting an adapter changes the other")


def check_save_and_load(method: str) -> None:
    model = prompted(method)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(causal_lm(), folder, adapter_name="another_name").eval()
        low = PeftModel.from_pretrained(causal_lm(), folder, low_cpu_mem_usage=True).eval()
    must(torch.equal(logits(again), logits(model)), "what is loaded differs from what was saved")
    must(torch.equal(logits(low), logits(model)), "low_cpu_mem_usage=True loads something else")


def check_native(method: str) -> None:
    base, model = causal_lm(), prompted(method)
    base.add_adapter(config(method), adapter_name="own")
    perturb(base, adapter="own")
    must(not close(logits(base), logits(causal_lm()), 1e-3), "add_adapter adds nothing")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base.load_adapter(folder, adapter_name="loaded")
    base.set_adapter("loaded")
    must(torch.equal(logits(base), logits(model)), "load_adapter loads something else")
    base.disable_adapters()
    must(torch.equal(logits(base), logits(causal_lm())), "disable_adapters leaves something")


def check_disable(method: str) -> None:
    model, bare = prompted(method), causal_lm()
    logits(model)
    with model.disable_adapter():
        must(torch.equal(logits(model), logits(bare)), "logits differ from the base model's")
        must(torch.equal(text(model), text(bare)), "text differs from the base model's")


def check_unload(method: str) -> None:
    base = prompted(method).unload()
    must(torch.equal(logits(base), logits(causal_lm())), "logits differ from the base model's")
    must(base.state_dict().keys() == causal_lm().state_dict().keys(), "something is left behind")


def check_merge(method: str) -> None:
    model = prompted(method)
    expected = logits(model)
    must(close(logits(model.merge_and_unload()), expected, 1e-4), "the merged model differs")


def check_modules_to_save(method: str) -> None:
    model = prompted(method, modules_to_save=["lm_head"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(causal_lm(), folder, adapter_name="x").eval()
    must(torch.equal(logits(again), logits(model)), "the head was not saved")


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    inputs = batch(9, 6)
    labels = inputs["input_ids"].where(torch.arange(9) > 5, -100)
    model.zero_grad()
    torch.manual_seed(3)
    model.train()(**inputs, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def check_checkpointing(method: str, use_reentrant: bool) -> None:
    model = prompted(method)
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    actual = gradients(model)
    must(bool(expected) and actual.keys() == expected.keys(), "gradients are missing")
    must(all(close(actual[name], expected[name], 2e-5) for name in expected), "the gradients differ")


def check_deepcopy(method: str) -> None:
    model = prompted(method)
    before, twin = logits(model), pickle.loads(pickle.dumps(copy.deepcopy(model)))
    must(torch.equal(logits(twin), before), "the copy differs")
    perturb(twin, seed=7)
    must(torch.equal(logits(model), before) and not torch.equal(logits(twin), before), "copy and original are not two")


def check_threads(method: str) -> None:
    model = prompted(method)
    jobs = [{**batch(5 + i, 4, seed=i), **GREEDY} for i in range(4)]
    alone = [model.generate(**job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: model.generate(**job), jobs))
    must(all(map(torch.equal, alone, together)), "threads disturb each other")


def check_bf16(method: str) -> None:
    model = prompted(method, causal_lm().to(torch.bfloat16))
    out = logits(model)
    must(out.dtype == torch.bfloat16 and bool(out.isfinite().all()), "the logits are not finite bfloat16")
    must(text(model).shape == (3, 14), "generate gives another shape")


def check_compile(method: str) -> None:
    model = prompted(method)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    must(close(logits(compiled), logits(model)), "the compiled model differs")


TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
TRAINING.update(use_cpu=True, disable_tqdm=True, save_strategy="no", bf16=False)


def check_trained(model: PeftModel, trainer: tf.Trainer) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    must(bool(moved) and moved <= wanted, "training moves weights of the base model, or none")


def check_trainer(method: str) -> None:
    model = prompted(method)
    rows = [
        {"input_ids": list(range(4 + i, 13 + i)), "labels": [-100] * 5 + list(range(9 + i, 13 + i))} for i in range(8)
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = tf.TrainingArguments(output_dir=folder, **TRAINING)
        check_trained(model, tf.Trainer(model=model, args=args, train_dataset=rows))


def check_sft(method: str, **changes) -> None:
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    model = prompted(method)
    rows = [{"prompt": f"w{5 + i} w{6 + i} w{7 + i}", "completion": f" w{8 + i} w{9 + i}"} for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, gradient_checkpointing=False, **{"max_length": 32, **TRAINING, **changes})
        data = datasets.Dataset.from_list(rows)
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())
        check_trained(model, trainer)


@torch.no_grad()
def check_packed(method: str) -> None:
    model = prompted(method)
    parts = [torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    labels = [part.masked_fill(torch.arange(part.shape[1]) < 2, -100) for part in parts]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    ids, said = torch.cat(parts, dim=1), torch.cat(labels, dim=1)
    found = model(input_ids=ids, labels=said, position_ids=positions, use_cache=False).logits.split(LENGTHS, dim=1)
    alone = [model(input_ids=part, labels=own).logits for part, own in zip(parts, labels)]
    must(all(map(close, found, alone)), "a sequence of a packed row differs from the sequence alone")


NO_CACHE = {"use_cache": False}
FEATURES: dict[str, Callable[[str], None]] = {
    "forward: the logits have the input's length": check_forward,
    "padding left = right = none": check_padding,
    "packed rows: a sequence = the sequence alone": check_packed,
    "`generate`: a row in a batch = the row alone": check_greedy,
    "`generate` with cache = without": functools.partial(check_same_text, how={}, other=NO_CACHE),
    "`generate`: beams, several sequences": functools.partial(
        check_same_text,
        how={"num_beams": 3, "num_return_sequences": 2},
        other={"num_beams": 3, "num_return_sequences": 2, **NO_CACHE},
    ),
    "`generate`: sampling": functools.partial(
        check_same_text, how={"do_sample": True}, other={"do_sample": True, **NO_CACHE}
    ),
    "`generate`: static cache": functools.partial(
        check_same_text, how={"cache_implementation": "static"}, other=NO_CACHE
    ),
    "`generate`: `assistant_model`": check_assisted,
    "`generate`: `prompt_lookup_num_tokens`": check_prompt_lookup,
    "`generate`: second turn from the returned cache": check_second_turn,
    "`generate`: `inputs_embeds`": check_inputs_embeds,
    "`generate`: `prefill_chunk_size`": functools.partial(check_same_text, how={"prefill_chunk_size": 4}, other={}),
    "`adapter_names` in forward": check_mixed_forward,
    "`adapter_names` in `generate`, beams": check_mixed_generate,
    "several adapters: switch, delete": check_switching,
    "save, load under another name": check_save_and_load,
    "transformers' `add_adapter`, `load_adapter`": check_native,
    "`disable_adapter`: bit-equal to the base model": check_disable,
    "`unload`: bit-equal to the base model": check_unload,
    "`merge_and_unload`": check_merge,
    "`modules_to_save`": check_modules_to_save,
    "gradient checkpointing": functools.partial(check_checkpointing, use_reentrant=False),
    "gradient checkpointing, reentrant": functools.partial(check_checkpointing, use_reentrant=True),
    "`deepcopy`, `pickle`": check_deepcopy,
    "threads that generate on one model": check_threads,
    "bfloat16": check_bf16,
    "`torch.compile`": check_compile,
    "`Trainer`": check_trainer,
    "TRL `SFTTrainer`": check_sft,
    "TRL `SFTTrainer`, `packing=True`": functools.partial(check_sft, packing=True),
    "TRL `SFTTrainer`, `padding_free=True`": functools.partial(check_sft, padding_free=True, max_length=None),
}


# ----------------------------------------------------------------------------------------------------- model families


@torch.no_grad()
def check_decoder(method: str, family: str) -> None:
    model, bare, inputs = of_several(method, causal_lm(family)), causal_lm(family), batch(*LENGTHS)
    plain, out = logits(bare, "right"), logits(model, "right")
    must(out.shape == plain.shape and not close(out, plain, 1e-3), "forward: the adapter does nothing")
    for row, n in enumerate(LENGTHS):
        must(
            close(out[row, :n], model(**row_of(inputs, row)).logits[0]), "forward: a row depends on the rows beside it"
        )
    found = text(model)
    must(torch.equal(found, text(model, use_cache=False)), "generate: the cache changes the text")
    mixed = logits(model, "right", adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        alone = with_adapter(model, name, model, **row_of(inputs, row)).logits[0]
        must(close(mixed[row, : len(alone)], alone), "adapter_names in forward: a row differs from the row alone")
    with model.disable_adapter():
        must(torch.equal(logits(model, "right"), plain), "disable_adapter: not bit-equal")


@torch.no_grad()
def check_encoder(method: str, family: str) -> None:
    base, bare = (encoder(family, tf.AutoModelForTokenClassification) for _ in range(2))
    model, inputs = of_several(method, base, "TOKEN_CLS"), batch(*LENGTHS, side="right")
    plain, out = bare(**inputs).logits, model(**inputs).logits
    # Not the logits, which a head of the adapter's own changes too.
    states = [m(**inputs, output_hidden_states=True).hidden_states[-1] for m in (model, bare)]
    must(out.shape == plain.shape and not close(*states, 1e-3), "forward: the adapter does nothing")
    mixed = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        n = LENGTHS[row]
        must(
            close(out[row, :n], model(**row_of(inputs, row)).logits[0]), "forward: a row depends on the rows beside it"
        )
        alone = with_adapter(model, name, model, **row_of(inputs, row)).logits[0]
        must(close(mixed[row, :n], alone), "adapter_names in forward: a row differs from the row alone")
    with model.disable_adapter():
        must(torch.equal(model(**inputs).logits, plain), "disable_adapter: not bit-equal")


@torch.no_grad()
def check_pair(method: str, family: str) -> None:
    model, bare = of_several(method, pair(family), "SEQ_2_SEQ_LM"), pair(family)
    inputs, target = batch(*LENGTHS, side="right"), batch(4, 4, 4, seed=3)["input_ids"]
    plain, out = (m(**inputs, decoder_input_ids=target).logits for m in (bare, model))
    must(out.shape == plain.shape and not close(out, plain, 1e-3), "forward: the adapter does nothing")
    mixed = model(**inputs, decoder_input_ids=target, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        own = {**row_of(inputs, row), "decoder_input_ids": target[row : row + 1]}
        must(close(out[row], model(**own).logits[0]), "forward: a row depends on the rows beside it")
        alone = with_adapter(model, name, model, **own).logits[0]
        must(close(mixed[row], alone), "adapter_names in forward: a row differs from the row alone")
    found = model.generate(**inputs, **GREEDY)
    must(torch.equal(found, model.generate(**inputs, **GREEDY, **NO_CACHE)), "generate: the cache changes the text")
    with model.disable_adapter():
        must(torch.equal(model(**inputs, decoder_input_ids=target).logits, plain), "disable_adapter: not bit-equal")


@torch.no_grad()
def check_vlm(method: str, family: str) -> None:
    (base, inputs), (bare, _) = vlm(family), vlm(family)
    model = of_several(method, base)
    plain, out = bare(**inputs).logits, model(**inputs).logits
    must(out.shape == plain.shape and not close(out, plain, 1e-3), "forward: the adapter does nothing")
    found = model.generate(**inputs, **GREEDY)
    must(torch.equal(found, model.generate(**inputs, **GREEDY, **NO_CACHE)), "generate: the cache changes the text")
    mixed = model(**inputs, adapter_names=["b", "default"]).logits
    must(close(mixed[1], out[1]), "adapter_names in forward: a row differs from the row alone")
    named = with_adapter(model, "b", model, **inputs).logits
    must(close(mixed[0], named[0]), "adapter_names in forward: a row differs from the row alone")
    with model.disable_adapter():
        must(torch.equal(model(**inputs).logits, plain), "disable_adapter: not bit-equal")


GROUPS: dict[str, tuple[dict, Callable[[str, str], None]]] = {
    "decoders": (DECODERS, check_decoder),
    "encoders": (ENCODERS, check_encoder),
    "encoder-decoder models": (PAIRS, check_pair),
    "vision-language models": (VLMS, check_vlm),
}
FAMILIES: dict[str, Callable[[str], None]] = {
    f"{group}: {family}": functools.partial(check, family=family)
    for group, (families, check) in GROUPS.items()
    for family in families
}
CHECKS = {**FEATURES, **FAMILIES}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    tf.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(row: str, method: str) -> Cell:
    """The outcome of one cell."""
    torch.manual_seed(0)
    with quiet():
        try:
            CHECKS[row](method)
        except ValueError as error:
            return Cell("refused", sentence(error))
        except Exception as error:
            kind = "" if isinstance(error, AssertionError) else type(error).__name__ + ": "
            return Cell("fails", kind + sentence(error))
    return Cell("works")


def sentence(error: Exception) -> str:
    """The first sentence of a message, on one line."""
    line = " ".join(str(error).split()).replace(f"{ROOT}/", "")
    return line.split(". ")[0].rstrip(".") + "."


# ------------------------------------------------------------------------------------------------------------- the page


def table(results: dict[tuple[str, str], Cell], rows: list[str], head: str, notes: list[str]) -> list[str]:
    """A table in Markdown; reasons are added to `notes` and their numbers stand in the cells."""
    lines = [f"| {head} | {' | '.join(TITLES.get(m, m) for m in COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = []
        for method in COLUMNS:
            what, why = results[row, method]
            if why and why not in notes:
                notes.append(why)
            cells.append(f"{what} [{notes.index(why) + 1}]" if why else what)
        lines.append(f"| {row.rpartition(': ')[2] if row in FAMILIES else row} | {' | '.join(cells)} |")
    return lines


def footnotes(notes: list[str]) -> list[str]:
    return [f"{number}. {why}" for number, why in enumerate(notes, start=1)]


def page(results: dict[tuple[str, str], Cell]) -> str:
    notes: list[str] = []
    lines = ["# Conformance", ""]
    lines += [
        "Made by `python tests/conformance.py --write`, which runs each cell as a small check on a tiny model of random weights,",
        "with an adapter far from its start. PEFT's LoRA, on the layers that PEFT chooses, runs through the same checks. *works*: it",
        "holds. *refused*: a `ValueError`, with the sentence given below. *fails*: another exception, or the check does not hold.",
        "`tests/test_conformance.py` runs some of the cells again and compares.",
        "",
        "## Features",
        "",
        "On a Llama. Text and logits under a cache, in a batch, or in a copy are compared with those without.",
        "",
        *table(results, list(FEATURES), "feature", notes),
        "",
        "LoRA can do things that have no counterpart here and no row: `add_weighted_adapter`, and variants such as DoRA.",
        "Adapters of different methods in one `PeftModel` are refused by PEFT itself; transformers' `add_adapter` takes",
        "LoRA and a prompt side by side.",
        "",
        "## Model families",
        "",
        "A cell holds all of: the adapter has an effect and the output the input's length; a row of a padded batch gives what",
        "it gives alone; `generate` with cache = without; `adapter_names` with two adapters and the base model = each row alone;",
        "`disable_adapter` is bit-equal to the base model. Encoders stand under a token classifier.",
        "",
    ]
    for group, (families, _) in GROUPS.items():
        rows = [f"{group}: {family}" for family in families]
        lines += [*table(results, rows, group, notes), ""]
    return "\n".join([*lines, "## Reasons", "", *footnotes(notes), ""])


def compact(results: dict[tuple[str, str], Cell]) -> str:
    """For the README: rows in which all works are one row, families are counted."""
    notes: list[str] = []
    whole = [row for row in FEATURES if all(results[row, method].what == "works" for method in COLUMNS)]
    rest = [row for row in FEATURES if row not in whole]
    lines = table(results, rest, "feature", notes)
    works = " | ".join(["works"] * len(COLUMNS))
    lines.insert(2, f"| {len(whole)} others, from padding to `SFTTrainer` | {works} |")
    for group, (families, _) in GROUPS.items():
        counts = [sum(results[f"{group}: {f}", m].what == "works" for f in families) for m in COLUMNS]
        lines.append(f"| {group} | {' | '.join(f'{n} of {len(families)}' for n in counts)} |")
    return "\n".join([*lines, "", *footnotes(notes)])


def read(text: str) -> dict[tuple[str, str], Cell]:
    """The cells of a page."""
    notes = dict(line.split(". ", 1) for line in text.partition("## Reasons")[2].splitlines() if ". " in line)
    methods = {title: name for name, title in TITLES.items()}
    results, columns, group = {}, [], ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("| "):
            continue
        if cells[0] in ("feature", *GROUPS):
            group, columns = cells[0], [methods.get(title, title) for title in cells[1:]]
            continue
        row = cells[0] if group == "feature" else f"{group}: {cells[0]}"
        for method, cell in zip(columns, cells[1:]):
            what, _, number = cell.partition(" ")
            results[row, method] = Cell(what, notes[number.strip("[]")] if number else "")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/conformance.md and the table in README.md")
    parser.add_argument("--only", default="", help="run the rows only that contain this text, and print them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for row in (row for row in CHECKS if args.only in row):
        for method in COLUMNS:
            results[row, method] = run(row, method)
        print(f"{row:60}", *(results[row, method].what for method in COLUMNS), flush=True)
        for why in sorted({results[row, method].why for method in COLUMNS} - {""}):
            print(" " * 8 + why)
    if args.write and not args.only:
        PAGE.write_text(page(results))
        readme = README.read_text()
        if BEGIN in readme and END in readme:
            before, rest = readme.split(BEGIN, 1)
            README.write_text(f"{before}{BEGIN}\n{compact(results)}\n{END}{rest.split(END, 1)[1]}")
        else:
            print(f"{README.name} has no {BEGIN} ... {END}; the compact table:\n\n{compact(results)}", file=sys.stderr)


if __name__ == "__main__":
    main()
