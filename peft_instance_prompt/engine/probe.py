# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""How a stack attends and how it numbers its tokens: from what its first layer gets for a few tokens; never from a name.

The weights may be sharded: DeepSpeed's ZeRO-3 does so while transformers loads a model, before an adapter is attached.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from .calls import cache_argument, forward_args


def num_elements(parameter: nn.Parameter) -> int:
    """The number of elements of a whole parameter. A sharded one is empty until its module runs."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather sharded parameters while the block runs, in all processes at once."""
    apart = [parameter for parameter in parameters if hasattr(parameter, "ds_numel")]
    if not apart:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart):
        yield


S = 6  # tokens per probe call


class Positions(NamedTuple):
    """How a stack numbers its tokens, as far as the input of its first layer shows.

    Attributes:
        offset (`int`): The position id of the first token.
        reads_ids (`bool`): Whether `position_ids` change what the layers get.
        absolute_column_positions (`bool`): Whether the states have the position of their column, whatever `position_ids` say.
        positions_from_mask (`bool`): Whether positions without `position_ids` are those of tokens and not of columns.
        padding_by_id (`bool`): Whether only the ids of padding, which embeddings do not show, keep it from counting: M2M100.
    """

    offset: int
    reads_ids: bool
    absolute_column_positions: bool
    positions_from_mask: bool
    padding_by_id: bool = False


_known: weakref.WeakKeyDictionary[nn.Module, Positions] = weakref.WeakKeyDictionary()  # a model may get many adapters


def read_positions(
    stack: PreTrainedModel, layers_name: str, offset: int, embed: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> Positions | None:
    """Find out how a stack numbers its tokens. This leaves the stack unchanged and draws no random number.

    Args:
        stack (`PreTrainedModel`): The stack.
        layers_name (`str`): The name of its list of layers, within the stack.
        offset (`int`): The likely position id of the first token.
        embed (`Callable`): From token ids (1, S) to the arguments that the stack takes in their place: embeddings (1, S, e).

    Returns:
        `Positions`, *optional*: None if the stack cannot be called with a few tokens alone, or its weights are not in place.

    Raises:
        ValueError: Its layers get different states for embeddings than for the token ids of these, or no `position_ids` give its layers
            what they get without.
    """
    if (known := _known.get(stack)) is None:
        try:
            known = _read(stack, layers_name, offset, embed)
        except _Unknown as unknown:
            raise ValueError(
                f"Instance prompts cannot be used with {type(stack).__name__}: {unknown}. Choose a different base model."
            ) from None
        except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, LookupError):
            return None
        _known[stack] = known
    return known


def _read(stack: PreTrainedModel, layers_name: str, offset: int, embed: Callable) -> Positions:
    weight = stack.get_input_embeddings().weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    probe, args = without_layers(stack, layers_name.split(".")), forward_args(stack)
    column = torch.arange(S, device=device)[None]  # (1, S)
    pad = _padding_id(stack)
    ids = torch.full_like(column, 1 if pad != 1 else 0)  # (1, S), one token over and over
    with torch.no_grad(), whole([*probe.parameters()]):
        text = embed(ids)
        by_id = _first_call(probe, input_ids=ids)
        try:
            plain = _first_call(probe, **text)
        except (TypeError, AttributeError, RuntimeError) as error:
            raise _Unknown("its forward needs `input_ids`, and a prompt comes with `inputs_embeds`") from error
        if not _same(plain, by_id):
            raise _Unknown(
                "its layers get different states for `inputs_embeds` than for the `input_ids` of the same tokens"
            )
        mask = (column > 1).long()  # (1, S), two columns of padding
        padded = (
            _first_call(probe, **text, attention_mask=mask),
            _first_call(probe, input_ids=torch.where(mask.bool(), ids, pad), attention_mask=mask),
        )
        real, first_ones = slice(2, S), slice(0, S - 2)
        counts = [not _same(x, plain, real, real) and _same(x, plain, real, first_ones) for x in padded]
        positions_from_mask = any(counts)
        if "position_ids" not in args:
            return Positions(offset, False, _differ_by_column(plain), positions_from_mask, counts == [False, True])
        for first in (offset, 0, 1, 2):
            told = _first_call(probe, **text, position_ids=column + first)
            if _same(told, plain):
                break
        else:
            raise _Unknown("no `position_ids` that count on from 0, 1 or 2 give its layers what they get without")
        turned = _first_call(probe, **text, position_ids=(column + first).flip(1))
        level = _first_call(probe, **text, position_ids=torch.full_like(column, first))
    reads_ids = not _same(turned, told) or "position_ids" in told
    return Positions(first, reads_ids, _differ_by_column(level), positions_from_mask)


def _padding_id(stack: PreTrainedModel) -> int:
    known = (stack.get_input_embeddings().padding_idx, getattr(stack.config.get_text_config(), "pad_token_id", None))
    return next((one for one in known if isinstance(one, int) and one >= 0), 0)


# ------------------------------------------------------------------------------------------------- what a layer gets


class _Unknown(Exception):
    """Carries the reason why a stack is not understood."""


class Reached(Exception):
    """Carries the arguments of the first layer, and ends the pass."""


def _first_call(probe: PreTrainedModel, **call: Any) -> dict[str, Any]:
    """The tensors that the first layer gets, by name."""
    call = {name: value.clone() for name, value in call.items()}  # CTRL scales its embeddings in place
    if "attention_mask" not in call:
        tokens = call["inputs_embeds"] if "inputs_embeds" in call else call["input_ids"]
        call["attention_mask"] = torch.ones(1, S, dtype=torch.long, device=tokens.device)
    if "use_cache" in forward_args(probe):
        call["use_cache"] = False
    try:
        probe(**call)
    except Reached as reached:
        return dict(_tensors("", reached.args[0]))
    raise RuntimeError(f"{type(probe).__name__} did not call its first layer.")


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        items: Iterable = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors(str(key) if not name else f"{name}.{key}", item)


def _by_token(call: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors (..., S, width) with a row per token: states, and sines of rotary embeddings. Masks, of that shape too, are left out."""
    found = {
        name: x.flatten(0, -3)
        for name, x in call.items()
        if x.is_floating_point() and x.dim() > 2 and x.shape[-2] == S
    }
    return {name: x for name, x in found.items() if "mask" not in name}


def _same(one: dict[str, Any], two: dict[str, Any], own: slice = slice(None), other: slice = slice(None)) -> bool:
    first, second = _by_token(one), _by_token(two)
    return first.keys() == second.keys() and all(
        torch.allclose(x[:, own].float(), second[name][:, other].float(), rtol=1e-4, atol=1e-5)
        for name, x in first.items()
    )


def _differ_by_column(call: dict[str, Any]) -> bool:
    """Whether the states of two inner columns differ, in a call with one token over and over."""
    states = next(iter(call.values()))  # (1, S, d), or (streams, 1, S, d)
    if states.dim() < 3 or states.shape[-2] != S:
        raise ValueError(f"The states have the shape {tuple(states.shape)}.")
    return not torch.allclose(states[..., 2, :].float(), states[..., 3, :].float(), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the stack without layers


def without_layers(module: nn.Module, path: list[str]) -> Any:
    """A copy of a module in eval mode that shares its weights, but has probes in place of the list of layers at `path`.

    The copy has its own buffers and hooks, so that `module` does not change when it runs.
    """
    twin = _twin(module)
    twin.__dict__.pop("forward", None)
    if isinstance(module, PreTrainedModel):
        config = copy.deepcopy(module.config)
        config._attn_implementation = "eager"  # masks of other kinds take long to make
        twin.config = config
    for name, child in module._modules.items():
        if child is not None:
            on_path = name == path[0]
            twin._modules[name] = (
                _twin(child, deep=True)
                if not on_path
                else without_layers(child, path[1:])
                if path[1:]
                else _probes(child)
            )
    return twin


def _twin(module: nn.Module, deep: bool = False) -> nn.Module:
    twin = module.__new__(type(module))
    twin.__dict__ = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    twin.__dict__["training"] = False
    twin.__dict__["_buffers"] = {k: None if b is None else b.clone() for k, b in module._buffers.items()}
    if not deep:  # the hooks of the stack itself are ours, or move tensors between devices
        for name in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
            twin.__dict__[name] = type(module.__dict__[name])()
    else:
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _twin(child, deep=True)
    return twin


def _probes(layers: nn.Module) -> nn.Module:
    """As many probes as there are layers, with their attributes, since some stacks count layers and read attributes."""
    names = forward_args(next(layers.children()))

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise Reached({**dict(zip(names, args)), **kwargs})

    twin = _twin(layers)
    for name, layer in layers.named_children():
        probe = twin._modules[name] = _twin(layer)
        probe._modules.clear()  # some stacks change the attention inside their layers by the text's length
        probe.__dict__["forward"] = forward
    return twin


class Attention(NamedTuple):
    """Facts about a stack's attention.

    Attributes:
        causal (`bool`): Whether a token sees only what stands before it.
        true_hides (`bool`): Whether True in a bool mask hides a key (MPT). Defaults to False: True shows the key.
        prefix (`bool`): Whether the stack is a prefix-LM (PaliGemma): only its mask makes it causal, and a caller may let the prefix of
            each row see all of itself. Defaults to False.
        no_slots (`str`): Why slots cannot stand among the stack's tokens; empty, the default, if they can.
    """

    causal: bool
    true_hides: bool = False
    prefix: bool = False
    no_slots: str = ""


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
    Where there is no mask (batch, heads, queries, keys), as in state spaces, running the layer decides, and slots cannot be hidden.

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
    try:
        with torch.no_grad(), whole([*probe.parameters(), *layer.parameters()]):
            try:
                probe(inputs_embeds=embeds, **shown)
                raise RuntimeError("no layer is called")
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
                return Attention(
                    bool(later != earlier), true_hides=mask.dtype == torch.bool and bool(later & ~earlier)
                )
            no_slots = (
                f"slots need layers with a mask (batch, heads, queries, keys), and the first of {layers_name!r} in {type(stack).__name__} "
                "gets none: its attention is sparse, or it has a state"
            )
            return Attention(_hides_later(layer, call), no_slots=no_slots)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"Whether {type(stack).__name__} is causal cannot be told: its attention declares no `is_causal`, and its mask "
            f"could not be read ({type(error).__name__}: {error})."
        ) from error


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
        same = next((x for x in tree_leaves(out) if x.shape == states.shape), None)
        if same is None:
            raise RuntimeError(f"{type(layer).__name__} returns no states {tuple(states.shape)}")
        made.append(same.select(axis, 0))  # (1, d)
    return torch.equal(*made)
