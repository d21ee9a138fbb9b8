# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""After a stack ran: take the slots out of its output, so that the caller gets the shapes of a model without slots."""

from __future__ import annotations

from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from .cache import SlotCache, length
from .calls import by_name, cache_of
from .layout import Layout, SlotTable, take
from .masks import padding_mask
from .passes import Pass, current_pass
from .request import current_request, note_encoder_slots
from .stack import StackInfo


# Outputs of a mixture of experts, a tensor for each layer that has a router.
ROUTER_OUTPUTS = ("router_logits", "router_probs")
# Outputs that are known, all of which `close_slots` strips of slots.
KNOWN_OUTPUTS = (
    "last_hidden_state", "hidden_states", "attentions", "cross_attentions", "pooler_output", *ROUTER_OUTPUTS
)  # fmt: skip
# Outputs of an encoder that tell its decoder where the slots stand.
SLOT_OUTPUTS = ("slot_order", "slot_used")


def close_slots(running: Pass, info: StackInfo, output: Any) -> Any:
    """The stack's output without slots.

    Args:
        running (`Pass`): The pass.
        info (`StackInfo`): Facts about the stack.
        output (`ModelOutput`): What the stack returned, with a state for each of N positions.

    Raises:
        ValueError: The stack returned an output in which the slots' places are not known.
    """
    cache, (name, filled) = running.cache, cache_of(output)
    if running.table is None and running.text is not None and filled is not None:  # the stack has made its cache
        running.table = running.text.table(length(filled), output.last_hidden_state.device)
    if running.table is None:  # no adapter, or none that a cache would have to know of
        return output.to_tuple() if running.as_tuple and running.groups else output
    if (layout := running.layout) is not None:
        check_outputs(output, layout)
        whole = output.last_hidden_state  # (B, N, d)
        if whole.shape[1] != layout.order.shape[1]:  # Git puts an image's states before those of the tokens
            raise ValueError(
                f"Instance prompts cannot be used in {type(running.stack).__name__}, which returns {whole.shape[1]} states for "
                f"{layout.order.shape[1]} positions: it adds tokens of its own, and where the slots stand is not known."
            )
        last = take(whole, layout.output_index)  # (B, S, d)
        if output.get("hidden_states"):
            *inner, top = output.hidden_states  # (B, N, d) each; None for one that was not asked for
            inner = [states if states is None else take(states, layout.token_index) for states in inner]
            if top is not None:
                top = last if top is whole else take(top, layout.output_index)
            output.hidden_states = (*inner, top)  # (B, S, d) each
        if output.get("pooler_output") is not None:
            output.pooler_output = pool(running.stack, whole, output.pooler_output, last)  # (B, d)
        for key in ROUTER_OUTPUTS:
            if output.get(key) is not None:
                output[key] = tree_map(partial(_strip_router, layout=layout), output[key])
        if (
            output.get("cross_attentions") is not None
        ):  # their keys belong to the encoder's text, which keeps its slots
            maps = output.cross_attentions
            output.cross_attentions = tuple(m if m is None else take(m, layout.token_index, dim=2) for m in maps)
        if info.encoder_of_pair:  # the decoder attends to the slots, so they stay
            kind: Any = type(output)  # no `type[...]`, which mypy does not take for hashable
            output.__class__ = with_slots(kind)
            output["slot_order"], output["slot_used"] = layout.order, layout.used
            note_encoder_slots(layout.order, layout.used)
        else:
            output.last_hidden_state = last
    if cache is None and filled is not None:
        cache = SlotCache(filled, running.table)
    if output.get("attentions") is not None and running.table.num_slots:
        output.attentions = tuple(_strip(maps, running) for maps in output.attentions)
    if filled is not None:
        output[name] = cache
    return output.to_tuple() if running.as_tuple else output


def _strip(attention: torch.Tensor | None, running: Pass) -> torch.Tensor | None:
    """Attention maps (B, heads, queries, keys) without the slots among queries and keys."""
    if attention is None:
        return None
    if running.layout is not None:
        attention = take(attention, running.layout.token_index, dim=2)  # (B, heads, S, keys)
    table = running.table
    assert table is not None  # a pass without slots is not changed
    keys = table.token_positions(max(attention.shape[-1], table.order.shape[1]))  # (B, keys - L)
    if attention.shape[-1] < table.order.shape[1]:
        raise ValueError(
            "`output_attentions` cannot be given for a sliding-window cache that has dropped prompt slots: which of its keys are "
            "slots is not known any more. Use a cache without a window, or generate without `output_attentions`."
        )
    return take(attention, keys, dim=3)  # (B, heads, S, keys - L)


def pool(stack: PreTrainedModel, whole: torch.Tensor, pooled: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Run the stack's pooler again, without slots.

    Args:
        stack (`PreTrainedModel`): The stack.
        whole (`torch.Tensor`): Shape (B, N, d). The states that its pooler saw.
        pooled (`torch.Tensor`): Shape (B, d). What it made of them.
        states (`torch.Tensor`): Shape (B, S, d). The states of the tokens.

    Returns:
        `torch.Tensor`: Shape (B, d).

    Raises:
        ValueError: How the stack uses its pooler is not known.
    """
    if (made := stack.pooler(states)).shape == pooled.shape:
        return made
    # The pooler of ALBERT and BigBird is a linear layer: they pick the first state before it and apply an activation behind it.
    activations = [child for child in stack.children() if not has_weights(child)]
    for activation in (*activations, nn.Identity()):
        made = activation(stack.pooler(whole[:, 0]))  # (B, d)
        if made.shape == pooled.shape and torch.allclose(made, pooled):
            return activation(stack.pooler(states[:, 0]))  # (B, d)
    raise ValueError(
        f"The slots cannot be taken out of `pooler_output`: how {type(stack).__name__} makes it with its `pooler` is not known. "
        "Load the model with `add_pooling_layer=False`."
    )


def has_weights(module: nn.Module) -> bool:
    """Whether a module or one inside it has parameters. Those of a replica of `DataParallel` are plain attributes."""
    return any(own._parameters or getattr(own, "_former_parameters", None) for own in module.modules())


def check_outputs(output: ModelOutput, layout: Layout) -> None:
    """Refuse an unknown output with a row per position: the caller would get rows of slots.

    Raises:
        ValueError: There is such an output.
    """
    B, N = layout.order.shape
    for name, value in output.items():
        if name in KNOWN_OUTPUTS or isinstance(value, Cache):
            continue
        for one in tree_leaves(value):
            shape = tuple(one.shape) if isinstance(one, torch.Tensor) else ()
            several = (
                len(shape) > 2 and shape[0] == B and shape[1] % N == 0
            )  # ProphetNet predicts several tokens at each position
            if shape[:1] == (B * N,) or (shape[:1] == (B,) and N in shape[1:]) or shape[:2] == (N, B) or several:
                raise ValueError(
                    f"Instance prompts do not know how to take their slots out of the output `{name}` {shape}, which has a row for "
                    f"each of {N} positions. Call the model without it, or choose another base model."
                )


def _strip_router(logits: Any, layout: Layout) -> Any:
    """A router's output per position, (B * N, experts) or (B, N, ...), without the rows of slots; anything else as it is."""
    B, N = layout.order.shape
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else ()
    if shape[:2] == (B, N):
        return take(logits, layout.token_index)  # (B, S, ...)
    if shape[:1] == (B * N,):
        return take(logits.unflatten(0, (B, N)), layout.token_index).flatten(0, 1)  # (B * S, experts)
    return logits


@once
def with_slots(kind: type[ModelOutput]) -> type[ModelOutput]:
    """A subclass of an output class, for outputs that also hold where slots stand.

    Its tuple leaves that out, since models count the entries of a tuple from the end.
    """

    class OutputWithSlots(kind):  # type: ignore[valid-type, misc]
        def to_tuple(self) -> tuple:
            return tuple(self[name] for name in self if name not in SLOT_OUTPUTS)

        def __len__(self) -> int:
            return len(self.to_tuple())

        def __reduce__(self) -> tuple:
            return _output_with_slots, (kind, dict(self))

    OutputWithSlots.__name__ = OutputWithSlots.__qualname__ = kind.__name__
    return OutputWithSlots


def _output_with_slots(kind: Any, values: dict[str, Any]) -> ModelOutput:
    output = with_slots(kind)()
    for name, value in values.items():
        output[name] = value
    return output


@torch.compiler.disable
def attend_to_slots(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Before the decoder of a pair runs: widen its padding mask over the encoder's output, which keeps its slots."""
    running = current_pass.get()
    if running is not None and running.plain:  # a plain pass gets the widened mask
        return None
    if (found := current_request().encoder_slots) is None:
        return None
    kwargs = by_name(decoder, args, kwargs)
    states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    if states is not None:
        num_tokens = states.shape[1] - found[1].shape[1]
        mask = padding_mask(mask, states.shape[0], num_tokens, from_static_cache=False)  # (B, S)
        kwargs["encoder_attention_mask"] = SlotTable(*found).widen_mask(mask, num_tokens)  # (B, N)
    return (), kwargs
