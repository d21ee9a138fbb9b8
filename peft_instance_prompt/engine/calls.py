# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""How transformers calls a stack and its layers, and what they return. No other file knows the names that it uses there.

A new release of transformers is understood here, and the range of tested releases is raised here, in `pyproject.toml` and in
`constraints/`. What changed so far:

- 5.24 calls the cache `cache`, in every forward, layer and output; before, it was `past_key_values`.
"""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import Cache, PreTrainedModel

from .sharded import whole


# The first and the last minor release that the test suite passes on.
TESTED = ((5, 18), (5, 24))
SWITCH = "PEFT_INSTANCE_PROMPT_UNTESTED"

# The argument of a stack or a layer that takes the cache, by release.
CACHE_ARGUMENTS = ("cache", "past_key_values")
# Arguments of a stack with a row and a column for each token, all of which the engine widens.
PER_TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
# Arguments of the same form that belong to another text or to the loss: they stay as they are.
FOREIGN_ARGUMENTS = ("encoder_hidden_states", "encoder_attention_mask", "labels", "shift_labels")


# --------------------------------------------------------------------------------------------------------- releases


def release() -> tuple[int, int]:
    """The minor release of transformers that is installed."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def untested_release() -> str | None:
    """A complaint about the installed transformers; None if it is one of the tested releases."""
    oldest, newest = TESTED
    if oldest <= release() <= newest:
        return None
    tested = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
    return f"peft_instance_prompt is tested with transformers {tested}; transformers {transformers.__version__} is installed."


def warn_of_untested_release() -> None:
    """Warn, once, when the package is imported beside a transformers that it was not tested with."""
    if (complaint := untested_release()) is not None:
        warnings.warn(f"{complaint} Adapters are refused there unless the environment has {SWITCH}=1.", stacklevel=3)


def check_release() -> None:
    """Raise a RuntimeError beside a transformers that the package was not tested with, unless the user wants to try it."""
    if (complaint := untested_release()) is not None and os.environ.get(SWITCH) != "1":
        raise RuntimeError(
            f"{complaint} A release can change how it calls a model, and then prompts would be wrong without any error. "
            f"Install a tested release, or set {SWITCH}=1 to try it and run `python -m peft_instance_prompt doctor`."
        )


# ------------------------------------------------------------------------------------------------------------ calls


def forward_args(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(module.forward).parameters)


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of a module, by the names that its forward declares.

    Raises:
        TypeError: The cache is given twice.
    """
    return declared({**dict(zip(forward_args(module), args)), **kwargs} if args else kwargs, module)


def declared(call: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A copy of a call of a module, of its `forward` or its `generate`, in which the cache has the name that forward declares.

    Raises:
        TypeError: The cache is given twice.
    """
    named = [name for name in CACHE_ARGUMENTS if name in call]
    given = [name for name in named if call[name] is not None]
    if len(given) > 1:
        raise TypeError(f"{type(module).__name__} got its cache twice, as {' and as '.join(given)}.")
    name = cache_argument(module.forward) if named else None
    if name is None or named == [name]:
        return dict(call)
    rest = {key: value for key, value in call.items() if key not in CACHE_ARGUMENTS}
    return {**rest, name: call[given[0]]} if given else rest


def cache_of(call: Mapping[str, Any]) -> tuple[str | None, Cache | None]:
    """The cache among the arguments of a stack or layer, or in its output, and the name that it has there."""
    return next(((name, value) for name, value in call.items() if isinstance(value, Cache)), (None, None))


def layer_cache(args: tuple, kwargs: dict[str, Any]) -> Cache | None:
    """The cache that a layer is called with."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def cache_argument(function: Any) -> str | None:
    """The name of a function's argument that takes the cache; None if it has none."""
    names = inspect.signature(function).parameters
    return next((name for name in CACHE_ARGUMENTS if name in names), None)


# ------------------------------------------------------------------------------------------- what a stack understands


def check_understood(stack: nn.Module, name: str, causal: bool) -> None:
    """Refuse a stack whose call this file does not know.

    Args:
        stack (`nn.Module`): The stack.
        name (`str`): Its name in the base model.
        causal (`bool`): Whether it is causal.

    Raises:
        ValueError: Its forward takes no `inputs_embeds` or no `attention_mask`, or it is causal and takes no cache that is known.
    """
    args = forward_args(stack)
    missing = [wanted for wanted in ("inputs_embeds", "attention_mask") if wanted not in args]
    if causal and not any(argument in args for argument in CACHE_ARGUMENTS):
        missing.append(" or ".join(CACHE_ARGUMENTS))
    if missing:
        raise ValueError(
            f"The forward of {type(stack).__name__} ({name or 'the base model itself'!r}) is not understood: it takes no "
            f"{', no '.join(f'`{argument}`' for argument in missing)}, but {list(args)}. Instance prompts need a stack of "
            "attention layers that is called as transformers calls its own."
        )


class Attention(NamedTuple):
    """Facts about a stack's attention.

    Attributes:
        causal (`bool`): Whether a token sees only what stands before it.
        true_hides (`bool`): Whether True in a mask of bools hides a key, as in MPT; elsewhere it shows the key.
    """

    causal: bool
    true_hides: bool = False


def read_attention(stack: nn.Module, layers_name: str) -> Attention:
    """Find out how a decoder-only or encoder-only stack attends.

    Attention modules declare whether they are causal. Where none does (Bloom, MPT, DeBERTa), the stack is asked for the mask that
    it makes for its first layer.

    Args:
        stack (`nn.Module`): The stack.
        layers_name (`str`): The name of its list of layers, within the stack.

    Raises:
        ValueError: The stack declares nothing, and its mask cannot be read.
    """
    layers = stack.get_submodule(layers_name)
    flags = [module.is_causal for module in layers.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return Attention(any(flags)) if flags else _read_mask(stack, layers_name)


class _Mask(Exception):
    """Carries the mask that the first layer gets, and ends the pass."""


class _Probe(nn.Module):
    """Stands for a layer.

    Args:
        names (`tuple[str]`): The names of the layer's arguments.
    """

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names = names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Mask({**dict(zip(self.names, args)), **kwargs}.get("attention_mask"))


def _read_mask(stack: PreTrainedModel, layers_name: str) -> Attention:
    """Call a copy of the stack, whose first layer is a probe, with three tokens, and read the mask (1, 1, 3, 3)."""
    probe: PreTrainedModel = _without_layers(stack, layers_name.split("."))
    probe.config = copy.deepcopy(stack.config)
    probe.config._attn_implementation = "eager"  # other kernels get causality as a flag, without a mask
    embedding = stack.get_input_embeddings()
    weight = embedding.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    embeds = torch.zeros(1, 3, embedding.embedding_dim, device=device, dtype=dtype)  # (1, 3, e)
    try:
        with torch.no_grad(), whole(probe.parameters()):
            probe(
                inputs_embeds=embeds, attention_mask=torch.ones(1, 3, dtype=torch.long, device=device), use_cache=False
            )
    except _Mask as caught:
        mask = caught.args[0]
        if mask is None:  # a causal mask is never left out here
            return Attention(False)
        if mask.dim() == 4:
            mask = mask.expand(1, -1, 3, 3)  # (1, heads or 1, 3, 3)
            later, earlier = mask[0, 0, 0, 2], mask[0, 0, 2, 0]
            return Attention(bool(later != earlier), true_hides=mask.dtype == torch.bool and bool(later & ~earlier))
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"Whether {type(stack).__name__} is causal cannot be told: its attention declares no `is_causal`, and its mask "
            f"could not be read ({type(error).__name__}: {error})."
        ) from error
    raise ValueError(
        f"Whether {type(stack).__name__} is causal cannot be told: its attention declares no `is_causal`, and the first of "
        f"{layers_name!r} gets no mask of the form (batch, heads, queries, keys)."
    )


def _without_layers(module: nn.Module, path: list[str]) -> nn.Module:
    """A copy of a module that shares all of it but the list of layers at `path`, and has no hooks; `module` is not changed."""
    twin = module.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    for name in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
        twin.__dict__[name] = type(module.__dict__[name])()
    twin.__dict__.pop("forward", None)
    child: Any = module._modules[path[0]]
    twin._modules[path[0]] = _without_layers(child, path[1:]) if len(path) > 1 else _probes(child)
    return twin


def _probes(layers: nn.ModuleList) -> nn.ModuleList:
    """As many layers as there are, since some stacks count them."""
    probe = _Probe(forward_args(next(layers.children())))
    for name, value in vars(next(layers.children())).items():
        if not name.startswith("_") and not hasattr(
            probe, name
        ):  # attributes that stacks read from their layers, such as `attention_type`
            setattr(probe, name, value)
    return nn.ModuleList(probe for _ in layers)
