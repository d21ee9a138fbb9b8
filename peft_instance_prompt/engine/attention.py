# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Whether a stack is causal: from the flag that its attention declares, or from the mask that it makes; never from a name."""

from __future__ import annotations

from collections.abc import Sequence
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
        true_hides (`bool`): Whether True in a bool mask hides a key (MPT). Defaults to False: True shows the key.
        prefix (`bool`): Whether the stack is a prefix-LM (PaliGemma): only its mask makes it causal, and a caller may let the prefix of
            each row see all of itself. Defaults to False.
    """

    causal: bool
    true_hides: bool = False
    prefix: bool = False


def read_attention(
    stack: nn.Module,
    layers_name: str,
    flags: Sequence[bool],
    language_model: nn.Module | None = None,
    name_there: str = "",
) -> Attention:
    """Find out how a stack attends.

    Attention modules declare by `is_causal` whether their kernel is causal. Some declare nothing (Bloom, MPT, DeBERTa), and those of a
    prefix-LM's text stack declare False although the stack can fill a cache. Then the mask decides that the first layer gets: first
    in a call of the stack, and if it is not causal there, in a call of the language model around it, which may make it causal (BLIP).

    Args:
        stack (`nn.Module`): The stack.
        layers_name (`str`): The name of its list of layers, within the stack.
        flags (`Sequence[bool]`): What the modules in its layers declare by `is_causal`.
        language_model (`nn.Module`, *optional*): The language model around the stack, if there is one.
        name_there (`str`): The name of the list of layers within the language model.

    Raises:
        ValueError: The mask must decide, and it cannot be read.
    """
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
    """The attention of a stack, read from the mask (1, 1, 3, 3) that its first layer gets for three tokens.

    A copy of the stack runs, with probes as its layers. `stack` may be the language model around it; `layers_name` is the name there.
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
