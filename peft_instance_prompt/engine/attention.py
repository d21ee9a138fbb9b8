# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Whether a stack is causal. That is read off what its attention declares, or off the mask that it makes; never off a name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from .calls import cache_argument, forward_args
from .positions import Reached, without_layers
from .sharded import whole


class Attention(NamedTuple):
    """Facts about a stack's attention.

    Attributes:
        causal (`bool`): Whether a token sees only what stands before it.
        true_hides (`bool`): Whether True in a mask of bools hides a key, as in MPT; elsewhere it shows the key.
        prefix (`bool`): Whether only its mask makes it causal and a caller may let a prefix see all of itself, as PaliGemma does.
    """

    causal: bool
    true_hides: bool = False
    prefix: bool = False


def read_attention(
    stack: nn.Module, layers_name: str, language_model: nn.Module | None = None, name_there: str = ""
) -> Attention:
    """Find out how a stack attends.

    Attention modules declare whether their kernel is causal. Where none does (Bloom, MPT, DeBERTa), or none is in a stack that can
    fill a cache (the text stack of a prefix-LM), the stack is asked for the mask that it makes for its first layer, and if that is not
    causal, so is the language model around it, which may tell it to be (BLIP).

    Args:
        stack (`nn.Module`): The stack.
        layers_name (`str`): The name of its list of layers, within the stack.
        language_model (`nn.Module`, *optional*): The language model around the stack, if there is one.
        name_there (`str`): The name of the list of layers within the language model.

    Raises:
        ValueError: The stack declares nothing, or not to be causal within a language model, and its mask cannot be read.
    """
    layers = stack.get_submodule(layers_name)
    flags = [module.is_causal for module in layers.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if any(flags) or (flags and cache_argument(type(stack).forward) is None):
        return Attention(any(flags))
    try:
        read = _read_mask(stack, layers_name)
    except ValueError:
        if not flags or language_model is not None:
            raise
        return Attention(causal=False)
    if not read.causal and language_model is not None:
        read = _read_mask(language_model, name_there)
    return read._replace(prefix=bool(flags) and read.causal)


def _read_mask(stack: PreTrainedModel, layers_name: str) -> Attention:
    """Call a copy of the stack, whose first layer is a probe, with three tokens, and read the mask (1, 1, 3, 3).

    In place of the stack it may be the language model around it, with the name that the list of layers has there.
    """
    layer = next(stack.get_submodule(layers_name).children())
    if not {"attention_mask", "merged_attention_mask"}.intersection(forward_args(layer)):
        raise ValueError(
            f"Whether {type(stack).__name__} is causal cannot be told: its attention declares no `is_causal`, and the modules of "
            f"{layers_name!r} take no `attention_mask`. Instance prompts need layers of attention that do."
        )
    probe: PreTrainedModel = without_layers(stack, layers_name.split("."))
    embedding = stack.get_input_embeddings()
    weight = embedding.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    embeds = torch.zeros(1, 3, embedding.embedding_dim, device=device, dtype=dtype)  # (1, 3, e)
    shown: dict[str, Any] = {"attention_mask": torch.ones(1, 3, dtype=torch.long, device=device), "use_cache": False}
    if "encoder_hidden_states" in forward_args(stack):  # a decoder may insist on them
        shown["encoder_hidden_states"] = torch.zeros(
            1, 3, stack.config.get_text_config().hidden_size, device=device, dtype=dtype
        )
    mask, call = torch.empty(0), {}  # if no layer is called
    try:
        with torch.no_grad(), whole([*probe.parameters(), *layer.parameters()]):
            try:
                probe(inputs_embeds=embeds, **shown)
            except Reached as reached:
                call = reached.args[0]
                merged = call.get("merged_attention_mask")  # T5Gemma 2: behind its own keys, those of the encoder
                mask = call.get("attention_mask") if merged is None else merged
            # None, or one of padding: the layer may hold another.
            if mask is None or (mask.dim() == 4 and mask.shape[2] == 1):
                return Attention(_hides_later(layer, call))
        if mask.dim() == 4:
            mask = mask[..., :3].expand(1, -1, 3, 3)  # (1, heads or 1, 3, 3)
            later, earlier = mask[0, 0, 0, 2], mask[0, 0, 2, 0]
            return Attention(bool(later != earlier), true_hides=mask.dtype == torch.bool and bool(later & ~earlier))
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"Whether {type(stack).__name__} is causal cannot be told: its attention declares no `is_causal`, and its mask "
            f"could not be read ({type(error).__name__}: {error})."
        ) from error
    raise ValueError(
        f"Whether {type(stack).__name__} is causal cannot be told: its attention declares no `is_causal`, and the first of "
        f"{layers_name!r} gets no mask (batch, heads, queries, keys). Prompts need layers that get one: sparse attention and state "
        "spaces do not."
    )


def _hides_later(layer: nn.Module, call: dict[str, Any]) -> bool:
    """Whether what a layer makes of the first of three states is the same whatever the last is.

    Args:
        layer (`nn.Module`): The layer.
        call (`dict`): Its arguments, by name. The first are the states.
    """
    name, states = next(iter(call.items()))  # (1, 3, d); SqueezeBERT's are (1, d, 3)
    axis = 1 if states.shape[1] == 3 else states.dim() - 1
    made = []
    for last in (1.0, 2.0):
        changed = torch.linspace(-1, 1, states.numel(), device=states.device).reshape(states.shape).to(states.dtype)
        changed.select(axis, 2).mul_(last)
        with torch.random.fork_rng():  # the same dropout
            torch.manual_seed(0)
            out = layer(**{**call, name: changed})
        made.append(next(x for x in tree_leaves(out) if x.shape == states.shape).select(axis, 0))  # (1, d)
    return torch.equal(*made)
