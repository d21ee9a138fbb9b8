# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""One pass of a stack: its forward state, what is done before each layer, and what is done when the stack has run.

Before a layer runs, this depth's prompt vectors are written into the slots, the instruction's tokens are edited, and what the layer must
not see is hidden from it: late slots and, in a packed row, other sequences. When the stack has run, the slots are taken out of its output.
A plain pass only collects the layers' inputs, if it is asked to.
"""

from __future__ import annotations

from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from .adapters import Group
from .cache import SlotCache, length
from .calls import LayerCall, by_name, cache_of
from .request import current_request, note_encoder_slots
from .slots import CachedText, Layout, SlotTable, take, write
from .stack import StackInfo, tree_of
from .widen import hide, padding_mask


@dataclass
class Pass:
    """One forward pass of a stack.

    Attributes:
        stack (`nn.Module`): The stack.
        info (`StackInfo`, *optional*): Facts about the stack, by which the hooks of its layers know their pass. None: no hook works.
        plain (`bool`): Whether this is a plain pass, without prompts.
        attention (`str`): The name of the stack's attention implementation.
        cache (`SlotCache`, *optional*): The cache with slots of an earlier pass, if this pass continues from it.
        layout (`Layout`, *optional*): Where the slots stand, if this pass opened any.
        table (`SlotTable`, *optional*): Which positions are slots, opened by this pass or an earlier one.
        text (`CachedText`, *optional*): What the cache that this pass fills is to keep of the text.
        groups (`list[Group]`): The adapter groups.
        segment_ids (`torch.LongTensor`, *optional*): Shape (B, N). The segment id of each position, if rows are packed: positions of
            different segments do not see each other.
        as_tuple (`bool`): Whether the caller wants a tuple.
        runs (`dict`): By the id of a layer: how many times it has run, less 1. ALBERT runs its layers several times.
        ran (`set[int]`): The depths whose hooks have run.
        states (`dict[int, torch.Tensor]`, *optional*): If it is a dict, it collects the input (B, N, d) of each layer, by depth.
        masks (`dict`): The masks made for layers that do not see all positions, with the masks that they replace.
    """

    stack: nn.Module
    info: StackInfo | None = None
    plain: bool = False
    attention: str = "eager"
    cache: SlotCache | None = None
    layout: Layout | None = None
    table: SlotTable | None = None
    text: CachedText | None = None
    groups: list[Group] = field(default_factory=list)
    segment_ids: torch.Tensor | None = None
    as_tuple: bool = False
    runs: dict[int, int] = field(default_factory=dict)
    ran: set[int] = field(default_factory=set)
    states: dict[int, torch.Tensor] | None = None
    masks: dict[tuple, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def late_layers(self) -> tuple[int, ...]:
        """The layers, except the stack's first, from which on some slots are seen."""
        return () if self.table is None else self.table.late_layers

    @property
    def concerns_layers(self) -> bool:
        """Whether the layers' hooks have work: slots to fill, tokens to edit, positions to hide, or states to collect."""
        return bool(self.groups) or self.segment_ids is not None or self.states is not None or bool(self.late_layers)


current_pass: ContextVar[Pass | None] = ContextVar("instance_prompt_pass", default=None)


class InContext:
    """A checkpoint function whose recomputation sees the context variables of the forward pass.

    For releases of transformers whose checkpoints hold a layer's hooks: these run again when backward recomputes the layer, long after
    the pass is over and perhaps in a different thread.
    """

    def __init__(self, checkpoint: Any):
        self.checkpoint = checkpoint

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(partial(copy_context().run, function), *args, **kwargs)


def keep_context(stack: nn.Module) -> None:
    """Wrap the checkpoint functions of a stack's layers.

    That is done in a call, and stays: checkpointing is switched on after an adapter is attached, at whatever module around the layers,
    and a wrapper that one call took away would be missing in another thread's.
    """
    for module in tree_of(stack).values():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None and not isinstance(checkpoint, InContext):
            setattr(module, "_gradient_checkpointing_func", InContext(checkpoint))


def release_context(stack: nn.Module) -> None:
    """Restore the checkpoint functions of a stack and its layers."""
    for module in stack.modules():
        if isinstance(checkpoint := getattr(module, "_gradient_checkpointing_func", None), InContext):
            module._gradient_checkpointing_func = checkpoint.checkpoint


def before_layer(running: Pass, info: StackInfo, depths: range, call: LayerCall) -> LayerCall:
    """The call of a layer with slots hidden and filled, and with edits added.

    Args:
        running (`Pass`): The pass.
        info (`StackInfo`): Facts about the stack.
        depths (`range`): The depths of the layer: more than one if the stack runs it several times.
        call (`LayerCall`): The call of the layer.

    Raises:
        ValueError: The layer's input does not have the shape (B, N, d), or its mask has an unknown form.
    """
    layout, key = running.layout, id(call.layer)
    late = running.late_layers
    run = running.runs[key] = running.runs.get(key, -1) + 1
    depth = depths[run % len(depths)] if len(depths) > 1 else depths[0]  # a counter would recompile the graph
    running.ran.add(depth)
    states = call.states  # (B, N, d)
    if running.states is not None:
        running.states[depth] = states
    groups = [group for group in running.groups if depth in group.model.depths]
    if groups or late:
        check_states(states, info, layout, groups)
    flash = running.attention.startswith("flash_attention")
    hides = (late and (depth < late[-1] or flash)) or (running.segment_ids is not None and not flash)
    if hides and depth not in info.image_layers:
        call = hide_positions(running, info, depth, call)
    in_place = may_overwrite(running, info, depth)
    for group in groups:
        if group.model.edits:
            states = group.add_edits(states, depth)  # (B, N, d)
            continue
        assert group.slots is not None and group.selection is not None  # the pass has opened its groups' slots
        prompts = group.run(states, depth, group.selection, layout)  # (G, l, d)
        states = write(
            states, group.slots.rows, group.slots.pick(prompts), group.model.adds_at(depth), in_place
        )  # (B, N, d)
    return call.with_states(states)


def check_states(states: torch.Tensor, info: StackInfo, layout: Layout | None, groups: list[Group]) -> None:
    """Raise a ValueError if a layer's input has not one state (B, N, d) for each position of the stack."""
    shapes = [group.edited.shape for group in groups if group.edited is not None and group.rows is None]
    shapes = [layout.order.shape] if layout is not None else shapes
    if states.dim() == 3 and all(states.shape[:2] == shape for shape in shapes):
        return
    adds_tokens = states.dim() == 3 and all(len(states) == shape[0] for shape in shapes)
    cure = (
        "It adds tokens of its own; choose another base model."
        if adds_tokens
        else "Use a method that writes to the input only, such as IPT or S-IDPG."
    )
    wanted = f", where its input has {tuple(shapes[0])} positions" if shapes else ""
    raise ValueError(
        f"The layers of {info.name!r} take states of shape {tuple(states.shape)}{wanted}: prompts cannot be written between them. {cure}"
    )


def may_overwrite(running: Pass, info: StackInfo, depth: int) -> bool:
    """Whether to write in place: only where nobody else holds the tensor, in decoder layers after the first, without gradients.

    Some models read the first layer's input, the embeddings, again; encoders may read a layer's input again behind the layer; and
    checkpointing keeps inputs in training. A copy at each layer costs one percent of a pass over 100 tokens.
    """
    return depth > 0 and info.causal_lm and not (torch.is_grad_enabled() or running.stack.training)


def hide_positions(running: Pass, info: StackInfo, depth: int, call: LayerCall) -> LayerCall:
    """The call of a layer with a mask that hides slots it does not see yet, and the sequences of a row from each other."""
    mask, cache, states = call.mask, call.cache, call.states  # states (B, N, d)
    table, segment_ids = running.table, running.segment_ids
    # Gemma 3n's layers take several streams of states at once, (streams, B, N, d).
    num_queries, seen, start = states.shape[1] if segment_ids is None else segment_ids.shape[1], 0, 0
    num_keys = num_queries
    if cache is not None:
        seen = length(cache, depth)
        num_keys, start = cache.get_mask_sizes(num_queries, depth)
    # Layers of one kind share a mask, so the id of the given mask is the key of the changed one. The given mask is kept, too, so that
    # its id is not used again.
    stage = 0 if table is None else sum(depth < late for late in table.late_layers)
    key = (id(mask), stage, num_keys, start, states.device)
    if key not in running.masks:
        hidden = None
        if table is not None and table.late_layers:
            hidden = table.hidden_at(depth, start, num_keys).to(states.device)  # (B, num_keys)
        if segment_ids is not None:
            others = (segment_ids[:, :, None] != segment_ids[:, None]).to(states.device)  # (B, N, N)
            hidden = others if hidden is None else others | hidden[:, None]
        assert hidden is not None  # there is something to hide
        causal = info.causal and not info.prefix_lm  # the kernel of a prefix-LM hides nothing without a mask
        made = hide(mask, hidden, num_queries, seen, start, causal, running.attention, states.dtype, info.true_hides)
        running.masks[key] = mask, made
    return call.with_mask(running.masks[key][1])


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
        if output.get("cross_attentions") is not None:
            maps = output.cross_attentions  # their keys belong to the encoder's text, which keeps its slots
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
            # ProphetNet predicts several tokens at each position.
            several = len(shape) > 2 and shape[0] == B and shape[1] % N == 0
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
