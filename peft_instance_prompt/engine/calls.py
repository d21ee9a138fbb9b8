# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""How transformers calls a stack and its layers, by release.

Adapt this file to a new release of transformers, and raise the range of tested releases here, in `pyproject.toml` and in
`constraints/`. Other files read a call of a stack only after [`by_name`] has named its arguments. They use the names that all public
models of transformers have had since 4.0: `input_ids`, `inputs_embeds`, `attention_mask`, `position_ids`. If a release renames one of
these, translate it in `by_name`, as the cache is. The arguments of a layer are read in [`LayerCall`]. What changed so far:

- 5.23 checkpoints a layer's forward without its hooks.
- 5.24 calls the cache `cache`, in every forward, layer and output; it was `past_key_values` before.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import Cache


# The first and the last minor release on which the test suite passes.
TESTED = ((5, 18), (5, 24))
SWITCH = "PEFT_INSTANCE_PROMPT_UNTESTED"
# The argument of a stack or a layer that takes the cache, by release.
CACHE_ARGUMENTS = ("cache", "past_key_values")
# Arguments of a stack with a column for each token. The engine widens all of them.
PER_TOKEN_ARGUMENTS = (
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "per_layer_inputs"
)  # fmt: skip
# Arguments (B, 1, S, keys) that say what each token sees of a different input: the images of Llama 3.2 Vision.
PER_QUERY_ARGUMENTS = ("cross_attention_mask", "full_text_row_masked_out_mask")
# Arguments of such shapes that belong to a different text or to the loss: they stay as they are.
FOREIGN_ARGUMENTS = (
    "encoder_hidden_states", "encoder_attention_mask", "cross_attention_states", "labels", "shift_labels"
)  # fmt: skip
# Where the sequences of packed rows begin, and how long they are. Only mamba-like layers read `seq_idx`.
LENGTH_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
PACKED_ARGUMENTS = (*LENGTH_ARGUMENTS, "seq_idx")


# --------------------------------------------------------------------------------------------------------- releases


def release() -> tuple[int, int]:
    """The minor release of transformers that is installed."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


# Whether a checkpoint of a layer holds its hooks, which then run again when backward recomputes the layer.
CHECKPOINTS_HOOKS = release() < (5, 23)


def untested_release() -> str | None:
    """A complaint about the installed transformers; None if it is one of the tested releases."""
    oldest, newest = TESTED
    if oldest <= release() <= newest:
        return None
    tested = " to ".join(f"{major}.{minor}" for major, minor in TESTED)
    return f"peft_instance_prompt is tested with transformers {tested}; transformers {transformers.__version__} is installed."


def warn_of_untested_release() -> None:
    """Warn if the installed transformers is untested. Called once, when the package is imported."""
    if (complaint := untested_release()) is not None:
        warnings.warn(f"{complaint} Adapters are refused there unless the environment has {SWITCH}=1.", stacklevel=3)


def check_release() -> None:
    """Raise a RuntimeError if the installed transformers is untested and the environment does not allow it."""
    if (complaint := untested_release()) is not None and os.environ.get(SWITCH) != "1":
        raise RuntimeError(
            f"{complaint} It may call models differently, and prompts would be silently wrong. Install a tested "
            f"release, or set {SWITCH}=1 and run `python -m peft_instance_prompt doctor`."
        )


# ------------------------------------------------------------------------------------------------------------ calls


def forward_args(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, in order."""
    return _arguments(type(module).forward)[1:]  # without `self`


@functools.cache  # each decoding step asks, and to read a signature costs more than all our other work in that step
def _arguments(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


@functools.cache
def _positional(function: Callable) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, one in inspect.signature(function).parameters.items() if one.kind in kinds)


def named(module: nn.Module, method: str, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module's method, by name as far as the class names them. Python itself refuses the others."""
    return {**dict(zip(_positional(getattr(type(module), method))[1:], args)), **kwargs}  # without `self`


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module, by the names that its forward declares.

    Raises:
        TypeError: An argument is given twice, or a positional argument has no name.
    """
    if args:
        names, who = _positional(type(module).forward)[1:], f"{type(module).__name__}.forward()"
        if len(args) > len(names):
            raise TypeError(f"{who} takes {len(names)} positional arguments that have names, got {len(args)}.")
        if twice := [name for name in names[: len(args)] if name in kwargs]:
            raise TypeError(f"{who} got multiple values for argument {twice[0]!r}: give it once.")
        kwargs = named(module, "forward", args, kwargs)
    return declared(kwargs, module)


def declared(call: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """A copy of the arguments of `forward` or `generate`, with the cache under the name that the module's forward declares.

    Raises:
        TypeError: The cache is given twice.
    """
    named = [name for name in CACHE_ARGUMENTS if name in call]
    given = [name for name in named if call[name] is not None]
    if len(given) > 1:
        raise TypeError(f"{type(module).__name__} got its cache twice, as {' and as '.join(given)}.")
    name = cache_argument(type(module).forward) if named else None
    if name is None or named == [name]:
        return dict(call)
    rest = {key: value for key, value in call.items() if key not in CACHE_ARGUMENTS}
    return {**rest, name: call[given[0]]} if given else rest


def inputs_of(call: Mapping[str, Any]) -> torch.Tensor:
    """What a stack is called with: embeddings (B, S, e), or token ids (B, S) if there are none."""
    return call["input_ids"] if call.get("inputs_embeds") is None else call["inputs_embeds"]


def cache_of(call: Mapping[str, Any]) -> tuple[str | None, Cache | None]:
    """The name of the cache among a call's arguments or in an output, and the cache; (None, None) if there is none."""
    return next(((name, value) for name, value in call.items() if isinstance(value, Cache)), (None, None))


def cache_argument(function: Callable) -> str | None:
    """The name of a function's argument that takes the cache; None if it has none."""
    names = _arguments(function)
    return next((name for name in CACHE_ARGUMENTS if name in names), None)


class LayerCall(NamedTuple):
    """A call of a layer.

    Attributes:
        layer (`nn.Module`): The layer.
        args (`tuple`): Its positional arguments. The first, if there is any, is the states.
        kwargs (`dict`): Its other arguments.
    """

    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    @property
    def states(self) -> torch.Tensor:
        """The states (B, N, d) that the layer gets."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def with_states(self, states: torch.Tensor) -> LayerCall:
        """The call with other states."""
        if self.args:
            return self._replace(args=(states, *self.args[1:]))
        return self._replace(kwargs={**self.kwargs, "hidden_states": states})

    @property
    def cache(self) -> Cache | None:
        """The cache that the layer gets."""
        return next((value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Cache)), None)

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask that the layer gets.

        Raises:
            ValueError: The layer takes none.
        """
        place = self._mask_place()
        return self.args[place] if place < len(self.args) else self.kwargs.get("attention_mask")

    def with_mask(self, mask: torch.Tensor | None) -> LayerCall:
        """The call with a different mask."""
        place = self._mask_place()
        if place < len(self.args):
            return self._replace(args=(*self.args[:place], mask, *self.args[place + 1 :]))
        return self._replace(kwargs={**self.kwargs, "attention_mask": mask})

    def _mask_place(self) -> int:
        names = forward_args(self.layer)
        if "attention_mask" not in names:
            raise ValueError(
                f"Positions cannot be hidden from {type(self.layer).__name__}, which takes no `attention_mask`."
            )
        return names.index("attention_mask")


# ------------------------------------------------------------------------------------------- what a stack understands


def check_understood(stack: nn.Module, name: str, causal: bool, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a stack whose call this file does not know.

    Args:
        stack (`nn.Module`): The stack.
        name (`str`): Its name in the base model.
        causal (`bool`): Whether it is causal.
        layers (`Mapping[str, nn.Module]`): The modules in its list of layers, by name.

    Raises:
        ValueError: Its forward takes no `inputs_embeds` or no `attention_mask`, or it is causal and takes no cache that is known; or it
            holds its own head, or a module of its layers needs token ids.
    """
    args = forward_args(stack)
    missing = [wanted for wanted in ("inputs_embeds", "attention_mask") if wanted not in args]
    if causal and not any(argument in args for argument in CACHE_ARGUMENTS):
        missing.append(" or ".join(CACHE_ARGUMENTS))
    if missing:
        raise ValueError(
            f"The forward of {type(stack).__name__} ({name or 'the base model itself'!r}) is not understood: it takes no "
            f"{', no '.join(f'`{argument}`' for argument in missing)}. Instance prompts need a stack of attention layers that is "
            "called as transformers calls its own."
        )
    head: Any = getattr(stack, "get_output_embeddings", None)
    if head is not None and head() is not None:
        raise ValueError(
            f"{type(stack).__name__} ({name or 'the base model itself'!r}) has its head within the stack and returns logits, not states, "
            "so slots cannot be taken out of its loss. Instance prompts need a stack apart from its head."
        )
    if hasattr(stack, "_setup_cache") and release() < (5, 24):  # RecurrentGemma: right with 5.24, wrong with 5.18
        raise ValueError(
            f"{type(stack).__name__} keeps states of the text on its modules, which get out of step with slots under transformers "
            f"{transformers.__version__}: use transformers 5.24."
        )
    for part, module in layers.items():
        if _needs_ids(type(module).forward):
            raise ValueError(
                f"Instance prompts cannot be used with {type(stack).__name__}: a {type(module).__name__} in its layers ({part!r}) "
                "needs the `input_ids` of each position, and slots have none."
            )


@functools.cache
def _needs_ids(function: Callable) -> bool:
    ids = inspect.signature(function).parameters.get("input_ids")
    return ids is not None and ids.default is ids.empty
