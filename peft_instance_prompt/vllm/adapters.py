# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Read a generator from an adapter's folder, without a base model of transformers around it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, PreTrainedModel

from .package import (
    INPUT,
    PREFIX,
    InstanceConfig,
    InstanceGenerator,
    Source,
    StackInfo,
    check_fits,
    check_task,
    check_tensors,
    describe,
    digest,
    expected_tensors,
    generator_path,
    make_generator,
    read_kind,
    read_weights,
)


@dataclass(frozen=True)
class Adapter:
    """An adapter that can be served.

    Attributes:
        key (`str`): The digest of its config and weights. Adapters with the same key are the same.
        folder (`Path`): Where it was read from.
        config (`InstanceConfig`): Its config.
        generator (`InstanceGenerator`): On the CPU, in evaluation mode, without gradients.
    """

    key: str
    folder: Path
    config: InstanceConfig
    generator: InstanceGenerator


def is_own(kind: str | None) -> bool:
    """Whether a `peft_type` is that of a method of this package, or of one that `register_method` registered."""
    return kind is not None and issubclass(PEFT_TYPE_TO_CONFIG_MAPPING.get(kind, object), InstanceConfig)


def make_base(hf_config: Any) -> PreTrainedModel:
    """The base model on the meta device, without weights.

    Raises:
        ValueError: transformers cannot make a causal language model from the config.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise ValueError(
            f"Prompts cannot be put into this base model: transformers cannot make it ({error})."
        ) from error


def describe_base(hf_config: Any) -> StackInfo:
    """The facts about the base model's stack.

    Raises:
        ValueError: transformers cannot make the model, or it has several stacks.
    """
    model = make_base(hf_config)
    infos = describe(model)
    if len(infos) != 1:
        names = [info.name for info in infos]
        raise ValueError(f"Prompts cannot be put into {type(model).__name__}: it has {len(names)} stacks, {names}.")
    return infos[0]


def read_adapter(folder: Path, info: StackInfo) -> Adapter:
    """Read an adapter as PEFT saved it.

    Args:
        folder (`Path`): The folder.
        info (`StackInfo`): The base model's stack.

    Raises:
        ValueError: The folder holds no adapter of this package, is corrupt, or its adapter belongs to a different base model or
            cannot be served.
    """
    if not folder.is_dir():
        raise ValueError(
            f"There is no adapter folder {folder}: give a folder that `save_pretrained` wrote, or a name on the Hub."
        )
    kind = read_kind(folder)
    if not is_own(kind):
        raise ValueError(f"{folder} holds no instance-prompt adapter, but {kind or 'no adapter_config.json'}.")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
    weights = read_weights(folder)
    saved = config.modules_to_save or config.saved_embedding_layers
    if saved:
        raise ValueError(
            f"{folder} brings modules of the base model, {saved}, but vLLM has one base model for all requests. Train without "
            "`modules_to_save` and without new tokens, or serve the adapter with transformers."
        )
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    check_fits(config, info)
    check_task(config, [info])
    generator = make_generator(config, info)
    generator = check_servable(generator)
    expected = expected_tensors(config, {info.name: [generator]})
    check_tensors(str(folder), expected, weights, config.weights_digest, needs_prefix=False)
    path = generator_path(config, info.name) + "."
    found = {name.removeprefix(PREFIX).removeprefix(path): tensor for name, tensor in weights.items()}
    # As PEFT does by default: an adapter that was saved in half precision runs in float32.
    half = (torch.float16, torch.bfloat16)
    state = {name: t.float() if t.dtype in half else t for name, t in found.items()}
    generator.load_state_dict(state, assign=True)
    generator.eval().requires_grad_(False)
    check_encoding(generator, info)
    # The digest is that of the weights, as was checked. Without it, adapters of one shape have one signature and run together.
    written, config.weights_digest = config.weights_digest or digest(weights), None
    fields = sorted((name, repr(value)) for name, value in config.to_dict().items())
    key = hashlib.sha256(f"{fields} {written}".encode()).hexdigest()
    return Adapter(key, folder, config, generator)


def check_servable(generator: InstanceGenerator) -> InstanceGenerator:
    """The generator. A ValueError if it hides slots from some layers: vLLM's attention has one mask for all of them."""
    if (first := generator.first_visible_layer) > 0:
        raise ValueError(
            f"{type(generator).__name__} shows its slots from layer {first} on, but vLLM cannot hide them from the layers below. Train "
            "with `insertion_layer=0` or a method whose slots are there from the first layer, or serve the adapter with transformers."
        )
    return generator


class NeedsPass(Exception):
    """Raised when a generator asks for a plain pass."""


def no_pass() -> torch.Tensor:
    """The `frozen_states` of a [`Source`] in vLLM, which runs the stack once."""
    raise NeedsPass


def check_encoding(generator: InstanceGenerator, info: StackInfo) -> None:
    """Raise a ValueError if `encode` reads more than the tokens: vLLM runs the stack once, and requests carry no vectors.

    `encode` runs on an instance of one token. Of a method that edits it must return None: steps have parts of the instruction.
    """
    ids, embeds = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, info.embedding_size)  # (1, 1), (1, 1, e)
    try:
        vector = generator.encode(Source(ids, embeds, torch.ones_like(ids, dtype=torch.bool), None, no_pass))
    except NeedsPass:
        reads = "a pass of the base model without prompts"
    except ValueError as error:
        reads = f"a vector or task that the caller gives ({error})"
    else:
        if vector is None or not generator.edits:
            return
        raise ValueError(
            f"{type(generator).__name__} edits tokens by a vector of the whole instruction, but a step of vLLM may have a part of it only: "
            "serve the adapter with transformers."
        )
    cure = (
        "Make the prompt on the client with `to_prompt_embeds` and send `prompt_embeds` to the base model"
        if generator.depths == (INPUT,)
        else "Train it with `instance_source='embeddings'`"
    )
    raise ValueError(f"{type(generator).__name__} reads {reads}, which a request to vLLM cannot have. {cure}.")


# ------------------------------------------------------------------------------------------------- from the server to a worker


def pack(adapter: Adapter) -> tuple[str, bytes]:
    """An adapter's config as JSON and its weights as safetensors, so that workers need not read the folder."""
    fields = {
        name: sorted(value) if isinstance(value, set) else value for name, value in adapter.config.to_dict().items()
    }
    # Copies: safetensors takes no two tensors of one storage.
    return json.dumps(fields), save({name: t.clone() for name, t in adapter.generator.state_dict().items()})


def unpack(fields: str, weights: bytes, info: StackInfo) -> InstanceGenerator:
    """The generator that [`pack`] packed, on the CPU, in evaluation mode."""
    config = PeftConfig.from_peft_type(**json.loads(fields))
    generator = check_servable(make_generator(config, info))
    generator.load_state_dict(load(weights), assign=True)
    return generator.eval().requires_grad_(False)
