# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The rows of features: one small check on a tiny Llama each."""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from conformance_models import (
    GREEDY,
    LENGTHS,
    NAMES,
    NO_CACHE,
    close,
    config,
    logits,
    must,
    of_several,
    prompted,
    text,
)
from conformance_training import check_checkpointing, check_sft, check_trainer
from methods import WITHOUT_SLOTS
from peft import PeftModel
from tiny import batch, causal_lm, perturb, row_of, with_adapter

from peft_instance_prompt.tools import promises
from peft_instance_prompt.tools.promises import Probe


def check_padding(method: str) -> None:
    probe = Probe(prompted(method))
    for side in ("left", "right"):
        promises.rows(probe, batch(*LENGTHS, side=side))


def check_packed(method: str) -> None:
    parts = [batch(n, seed=n)["input_ids"] for n in LENGTHS]
    row = [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(ids.shape[1]) < 2, -100)} for ids in parts]
    # With a cache, a bare model would not see that the row is packed.
    promises.packed(Probe(prompted(method), lambda model, **kw: model(**kw, use_cache=False).logits), [row])


def check_greedy(method: str) -> None:
    model = prompted(method)
    must(not torch.equal(text(model), text(causal_lm())), "the adapter does nothing")
    promises.rows(Probe(model), batch(*LENGTHS), generates=True)


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
    read = (
        torch.arange(17) < 9
    )  # prompts are those of the first turn; a method that edits states edits what the cache does not hold, too
    if method in WITHOUT_SLOTS:
        read |= torch.arange(17) >= first.past_key_values.get_seq_length()
    scope = {} if method == "lora" else {"instruction_mask": read.long()[None]}
    found = model.generate(ids, past_key_values=first.past_key_values, **GREEDY)
    must(torch.equal(found, model.generate(ids, use_cache=False, **scope, **GREEDY)), "the second turn differs")


def check_inputs_embeds(method: str) -> None:
    model, inputs = prompted(method), batch(*LENGTHS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    found = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **GREEDY)
    must(torch.equal(found, text(model)[:, 9:]), "embeddings give another text than their ids")


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
    probe = Probe(prompted(method), tolerance=0)
    for how in ({"adapter_name": "another_name"}, {"low_cpu_mem_usage": True}):
        promises.saved(probe, causal_lm(), batch(*LENGTHS), **how)


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
    promises.disabled(Probe(model), batch(*LENGTHS), logits(bare))
    with model.disable_adapter():
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


FEATURES: dict[str, Callable[[str], None]] = {
    "forward: the logits have the input's length": lambda m: promises.effect(Probe(prompted(m)), batch(*LENGTHS)),
    "padding left = right = none": check_padding,
    "packed rows: a sequence = the sequence alone": check_packed,
    "`generate`: a row in a batch = the row alone": check_greedy,
    "`generate` with cache = without": lambda m: promises.cache(Probe(prompted(m)), batch(*LENGTHS)),
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
    "`adapter_names` in forward": lambda m: promises.mixed(Probe(of_several(m)), batch(*LENGTHS), NAMES),
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
