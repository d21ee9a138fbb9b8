# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the invariants draw: configs, models, what tells the response, damaged folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from folders import CONFIG, WEIGHTS, change_config, change_weights
from hypothesis import reject
from hypothesis import strategies as st
from methods import METHODS, WITHOUT_SLOTS
from peft import PeftConfig, PeftModel
from tiny import DECODERS, ENCODERS, PAIRS, adapted, batch, causal_lm, encoder, pair, perturb

from peft_instance_prompt.tools.promises import Probe, outputs


DECODER_NAMES = list(DECODERS)
# The others compute norms, softmax or biases in float32 (or bfloat16) whatever their weights are.
FLOAT64 = (
    "gpt2 opt gpt_neox stablelm bert roberta deberta-v2 modernbert electra albert bart mbart pegasus marian".split()
)
# Experts' kernels know no float64; the softmax of the rest takes the lowest float64 of a mask for -inf, and gives NaN.
FLOAT32 = "mixtral qwen3_moe gemma2 bloom mpt".split()
FIELDS = {
    "num_virtual_tokens": st.integers(1, 5),
    "prompt_position": st.sampled_from(["before", "after_first", "end"]),
    "init_weights": st.sampled_from([True, False, "paper"]),
    "condition": st.sampled_from(["instance", "constant"]),
    "layers_to_transform": st.sampled_from([0, 1, [0, 2], [1, 2]]),
}


def make_config(data: st.DataObject, task: str = "CAUSAL_LM", cls: type | None = None, **fixed: Any) -> PeftConfig:
    """A valid config of any method, or of the methods of a class."""
    names = [name for name in METHODS if cls is None or type(METHODS[name]()) is cls]
    method = data.draw(st.sampled_from(names), "method")
    drawn = data.draw(st.fixed_dictionaries({}, optional=FIELDS), "config")
    if method in WITHOUT_SLOTS:
        drawn = {name: value for name, value in drawn.items() if name not in ("prompt_position", "condition")}
    try:
        return METHODS[method](task_type=task, **{**drawn, **fixed})
    except ValueError as error:
        assert refusal_names(error, [*drawn]), error
        reject()


def refusal_names(error: Exception, names: list[str]) -> bool:
    return any(f"`{name}" in str(error) for name in names)


@contextmanager
def unless_refused() -> Iterator[None]:
    """Give up a case whose config and model do not go together, which the message must say by the field's name."""
    try:
        yield
    except ValueError as error:
        assert refusal_names(error, [*FIELDS]), error
        reject()


def attach(base: torch.nn.Module, config: PeftConfig, name: str = "default") -> PeftModel:
    """The model with an adapter whose weights are far from their start, in eval mode."""
    with unless_refused():
        return adapted(base, config, name)


def attach_second(model: PeftModel, config: PeftConfig) -> PeftModel:
    """The model with another adapter, "b", in eval mode."""
    with unless_refused():
        model.add_adapter("b", config)
    return perturb(model, seed=5, adapter="b").eval()


def any_model(data: st.DataObject) -> tuple[torch.nn.Module, str]:
    """A tiny model of any family, and its task type."""
    kind = data.draw(st.sampled_from(["CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"]), "task")
    build, families = {
        "CAUSAL_LM": (causal_lm, DECODERS),
        "FEATURE_EXTRACTION": (encoder, ENCODERS),
        "SEQ_2_SEQ_LM": (pair, PAIRS),
    }[kind]
    return build(data.draw(st.sampled_from(list(families)), "family")), kind


def probe(model: torch.nn.Module, task: str = "CAUSAL_LM") -> Probe:
    """A probe that knows no other differences than rounding, of a model in float64 if it can run so."""
    kind = model.config.model_type
    model = model if kind in FLOAT32 else model.double()
    return Probe(model, seeded, task != "SEQ_2_SEQ_LM", tolerance=1e-8 if kind in FLOAT64 else 1e-5)


def seeded(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The outputs, with the same dropout and random choices in each pass."""
    torch.manual_seed(0)
    return outputs(model, **inputs)


def said(how: str, ids: torch.Tensor, instruction: int) -> dict[str, torch.Tensor]:
    """The arguments that tell which of the tokens (B, S) are the instruction: its first ones, as many as `instruction`."""
    if how == "labels":
        labels = ids.clone()
        labels[:, :instruction] = -100
        return {"labels": labels}
    if how == "instruction_mask":
        return {"instruction_mask": (torch.arange(ids.shape[1]) < instruction).expand_as(ids)}
    return {}


def texts(length: int, how: str, seed: int) -> dict[str, torch.Tensor]:
    """A text (1, n), whose instruction are its first three tokens, with what says so."""
    ids = batch(length, seed=seed)["input_ids"]
    ids[:, 1:3] = torch.tensor([7, 8])
    return {"input_ids": ids, **said(how, ids, 3)}


def damage(data: st.DataObject, folder: Path) -> str | None:
    """Damage a saved folder in one way, and name the field if it is one of its config."""
    how = data.draw(
        st.sampled_from(["drop", "rename", "reshape", "NaN", "surplus", "values", "bytes", "config"]), "damage"
    )
    if how == "bytes":
        whole = bytearray((folder / WEIGHTS).read_bytes())
        at = data.draw(st.integers(0, len(whole) - 1), "byte")
        if data.draw(st.booleans(), "cut off"):
            whole = whole[:at]
        else:
            whole[at] ^= data.draw(st.integers(1, 255), "by")
        (folder / WEIGHTS).write_bytes(whole)
        return None
    if how == "config":
        config = json.loads((folder / CONFIG).read_text())
        name = data.draw(st.sampled_from(sorted(config)), "field")
        value = data.draw(st.sampled_from([None, True, -1, 2, 7, 1e300, "x", [], [1], ["x"], {}]), "value")
        change_config(folder, **{name: value})
        return name
    number = data.draw(st.integers(0, 50), "tensor")

    def edit(weights: dict[str, torch.Tensor]) -> None:
        name = sorted(weights)[number % len(weights)]
        if how == "values":
            weights[name] = weights[name] + 1
        elif how == "drop":
            del weights[name]
        elif how == "rename":
            weights[name + "s"] = weights.pop(name)
        elif how == "reshape":
            weights[name] = weights[name].unsqueeze(0) if number % 2 else weights[name].flatten()[:-1]
        elif how == "surplus":
            weights["base_model.model.lm_head.weight"] = torch.ones(96, 32)
        elif weights[name].is_floating_point():
            weights[name].view(-1)[0] = torch.nan

    old = json.loads((folder / CONFIG).read_text())["weights_digest"]
    change_weights(folder, edit)
    if how == "values" or data.draw(st.booleans(), "old digest"):
        change_config(folder, weights_digest=old)
    return None
