# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Whether a stack is causal: from the flag that its attention declares, or from the mask that it makes; never from a name."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .calls import cache_argument, forward_args
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
    stack: nn.Module, layers_name: str, language_model: nn.Module | None = None, name_there: str = ""
) -> Attention:
    """Find out how a stack attends.

    Attention modules declare by `is_causal` whether their kernel is causal. Some declare nothing (Bloom, MPT, DeBERTa), and those of a
    prefix-LM's text stack declare False although the stack can fill a cache. Then the mask decides that the first layer gets: first
    in a call of the stack, and if it is not causal there, in a call of the language model around it, which may make it causal (BLIP).

    Args:
        stack (`nn.Module`): The stack.
        layers_name (`str`): The name of its list of layers, within the stack.
        language_model (`nn.Module`, *optional*): The language model around the stack, if there is one.
        name_there (`str`): The name of the list of layers within the language model.

    Raises:
        ValueError: The mask must decide, and it cannot be read.
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


class _Mask(Exception):
    """Carries the mask of the first layer out of the call, and ends it."""


class _Probe(nn.Module):
    """Takes a layer's place, and raises the mask that it gets.

    Args:
        names (`tuple[str]`): The names of the layer's arguments.
    """

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names = names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = {**dict(zip(self.names, args)), **kwargs}
        merged = call.get("merged_attention_mask")  # T5Gemma 2: behind its own keys, those of the encoder
        raise _Mask(call.get("attention_mask") if merged is None else merged)


def _read_mask(stack: PreTrainedModel, layers_name: str) -> Attention:
    """The attention of a stack, read from the mask (1, 1, 3, 3) that its first layer gets for three tokens.

    A copy of the stack runs, with probes as its layers. `stack` may be the language model around it; `layers_name` is the name there.
    """
    probe: PreTrainedModel = _without_layers(stack, layers_name.split("."))
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
    try:
        with torch.no_grad(), whole(probe.parameters()):
            probe(inputs_embeds=embeds, **shown)
    except _Mask as caught:
        mask = caught.args[0]
        if mask is None:  # eager attention always gets a causal mask
            return Attention(False)
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
        f"{layers_name!r} gets no mask (batch, heads, queries, keys). Prompts need layers of attention, which state space models lack."
    )


def _without_layers(module: nn.Module, path: list[str]) -> nn.Module:
    """A copy of a module that shares everything with it except hooks and the list of layers at `path`; `module` is not changed."""
    twin = module.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    for name in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
        twin.__dict__[name] = type(module.__dict__[name])()
    twin.__dict__.pop("forward", None)
    if "config" in module.__dict__:
        config: Any = copy.deepcopy(module.config)
        config._attn_implementation = "eager"  # other kernels get causality as a flag, without a mask
        twin.config = config
    child: Any = module._modules[path[0]]
    twin._modules[path[0]] = _without_layers(child, path[1:]) if len(path) > 1 else _probes(child)
    return twin


def _probes(layers: nn.ModuleList) -> nn.ModuleList:
    """As many probes as there are layers, since some stacks count them."""
    probe = _Probe(forward_args(next(layers.children())))
    for name, value in vars(next(layers.children())).items():
        if not name.startswith("_") and not hasattr(
            probe, name
        ):  # attributes that stacks read from their layers, such as `attention_type`
            setattr(probe, name, value)
    return nn.ModuleList(probe for _ in layers)
