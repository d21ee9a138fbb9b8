# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Before a stack runs: read the text, find each adapter's scope, encode, and open the slots.

Methods that read the bare model's states get them from a plain pass, which runs the stack without prompts.

Shapes: B rows, S tokens, L slots, N = S + L positions in the stack, G instances of up to n tokens, e the width of the embeddings, d that
of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..generator import INPUT, Source
from .adapters import Group, Places, in_place, pick, place_slots, put
from .cache import length
from .calls import PACKED_ARGUMENTS, cache_of, inputs_of
from .edits import edit_groups
from .forward import Pass, current_pass
from .intercept import intercepted
from .request import Request
from .scope import Rules, find_scope
from .slots import Layout, SlotRows, insert, take, write
from .stack import StackInfo, embed, embed_ids, tree_of
from .tokens import InstanceTokens, Packing, Text, check_packable, find_packing
from .widen import beyond_causal, full_mask, lengths_of, no_padding, padding_mask, prefix_of, widen


def read_text(
    stack: PreTrainedModel, info: StackInfo, groups: list[Group], call: Mapping[str, Any], request: Request
) -> Text:
    """Find the tokens in a call of a stack.

    Raises:
        ValueError: The batch is empty, its mask has an unknown form, its cache was filled without an adapter, or its rows are packed
            and get slots, and the stack does not keep their sequences apart; or they are padded on the left and get slots, and the stack
            tells padding by its id.
    """
    given = inputs_of(call)  # (B, S, ...)
    B, S = given.shape[:2]
    if B == 0 or S == 0:
        raise ValueError(f"The batch is empty: {B} row(s) of {S} token(s).")
    name, cache = cache_of(call)
    if cache is not None and length(cache) > 0:
        raise ValueError(
            f"`{name}` holds {length(cache)} tokens and was filled without an adapter. "
            "Start from an empty cache, or fill it with the adapter active."
        )
    told = {**request.packed, **{name: value for name, value in call.items() if value is not None}}
    slots = any(group.model.num_slots for group in groups)
    # All tokens of an encoder are edited, whatever sequences they belong to.
    packing = find_packing(told, B, S, given.device, info.position_offset) if slots or info.causal else None
    if packing is not None and slots:
        check_packable(stack, info, late=any(group.model.first_visible_layer > 0 for group in groups))
        if request.prompt_length is not None or cache is not None:
            raise ValueError(
                "Packed rows, which hold several sequences, cannot be continued: call the model without a cache, and `generate` with one "
                "sequence per row."
            )
    ids = request.input_ids if call.get("input_ids") is None else call["input_ids"]
    ids = ids if ids is not None and ids.shape == (B, S) else None
    embeds = embed(stack, given) if slots and call.get("inputs_embeds") is None else given  # (B, S, e)
    static = cache is not None and cache.is_compileable
    given_mask = None if packing is not None else call.get("attention_mask")
    mask = padding_mask(given_mask, B, S, static)  # (B, S)
    mask = None if mask is None else mask.to(embeds.device)
    tokens = torch.ones(B, S, dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()  # (B, S)
    tokens = tokens if packing is None else packing.sequence >= 0  # (B, S)
    if slots and info.padding_by_id and bool((tokens.any(dim=1) & ~tokens[:, 0]).any()):
        raise ValueError(
            f"{info.name!r} counts its positions from the first id that is no padding, and a prompt comes with embeddings, which show "
            "none: pad on the right (`tokenizer.padding_side = 'right'`), not on the left."
        )
    prefix = prefix_of(given_mask, tokens) if info.prefix_lm else None  # (B, S)
    return Text(ids, embeds, mask, tokens, packing, prefix)


def count_positions(text: Text, groups: list[Group], info: StackInfo) -> torch.Tensor:
    """Position ids (B, S) for a call that has none.

    Rows with an adapter count tokens, not columns, so that left padding moves nothing. Rows without one count as the bare model does: by
    columns, unless its positions come from the mask.
    """
    B, S = text.tokens.shape
    counted = (text.tokens.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
    rows = [group.rows for group in groups if group.rows is not None]
    if not info.positions_from_mask and len(rows) == len(groups):
        bare = torch.ones(B, dtype=torch.bool, device=counted.device)  # (B,)
        bare[torch.cat(rows).to(counted.device)] = False
        counted = torch.where(bare[:, None], torch.arange(S, device=counted.device), counted)  # (B, S)
    return counted + info.position_offset


def find_scopes(groups: list[Group], text: Text, request: Request, info: StackInfo, training: bool) -> torch.Tensor:
    """The instruction tokens (B, S) of each row, or of each sequence of packed rows, by the rules of its adapter.

    Raises:
        ValueError: A scope cannot be told, or mask, template or labels do not fit.
        TypeError: `instruction_mask` is not a tensor of bools or whole numbers.
    """
    packing, tokens, ids = text.packing, text.tokens, text.ids
    if packing is not None:
        ids = None if ids is None else packing.unpack(ids, -1)  # (G, n)
        tokens, request = packing.mask, unpack(request, packing)  # (G, n)
    scope = tokens  # (B, S) or (G, n)
    for group in groups:
        for generator, rows in group:
            try:
                own = find_scope(
                    pick(tokens, rows),
                    request.of_rows(len(tokens), rows),
                    Rules.of(generator.config, info, generator.edits),
                    input_ids=pick(ids, rows),
                    prefix=pick(text.prefix, rows),
                    training=training,
                    packed=packing is not None,
                )  # (rows, S)
            except ValueError as error:
                if packing is None or "row(s)" not in str(error):
                    raise
                raise ValueError(f"{error} Rows: the sequences of a packed batch.") from error
            scope = put(scope, rows, own)  # (B, S) or (G, n)
    return scope if packing is None else packing.pack(scope)  # (B, S)


def shown_response(
    stack: PreTrainedModel,
    info: StackInfo,
    call: Mapping[str, Any],
    text: Text,
    scope: torch.Tensor,
    request: Request,
) -> torch.Tensor | None:
    """The tokens (B, S) behind each row's last instruction token, where the model may show them to the instruction; None where it
    hides all later tokens, or where there are none.

    Args:
        scope (`torch.BoolTensor`): Shape (B, S). The instruction tokens.

    Raises:
        ValueError: A prefix-LM is called with a response and nothing that hides it.
    """
    mask = call.get("attention_mask")
    if text.packing is not None or not info.causal or not (info.prefix_lm or beyond_causal(mask) is not None):
        return None
    response = text.tokens & (scope.flip(1).cumsum(dim=1).flip(1) == 0)  # (B, S)
    if not response.any():
        return None
    kernel = str(stack.config._attn_implementation)
    bare = full_mask(mask)
    if info.prefix_lm and kernel not in ("eager", "flex_attention") and request.prompt_length is None:
        if bare is None or (bare.dim() == 2 and bool(bare.all())):
            raise ValueError(
                f"Without a prefix, {type(stack).__name__} shows its instruction the response under {kernel!r} attention, with an adapter "
                "as without. Pass `token_type_ids`, 0 for the prefix and 1 for the response."
            )
    return response


def unpack(request: Request, packing: Packing) -> Request:
    """The request for a batch with a row per sequence.

    `instance_embeds` and `task_ids` stay as they are: the caller gives one entry per sequence.
    """
    shape, labels, mask = tuple(packing.segment_ids.shape), request.labels, request.instruction_mask
    if labels is not None and tuple(labels.shape) == shape:
        labels = packing.unpack(labels, -100)  # (G, n)
        if request.shifted:  # the label at the last token belongs to the next sequence's first token
            last = packing.mask.sum(dim=1, keepdim=True).to(labels.device) - 1  # (G, 1)
            labels = labels.scatter(1, last, -100)
    if isinstance(mask, torch.Tensor) and not mask.is_floating_point():  # else `find_scope` complains
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"`instruction_mask` must have the shape of the tokens, {shape}, got {tuple(mask.shape)}."
            )
        mask = packing.unpack(mask, 0)  # (G, n)
    return replace(request, labels=labels, instruction_mask=mask)


def run_plain(
    stack: PreTrainedModel, call: dict[str, Any], segment_ids: torch.Tensor | None = None, running: Pass | None = None
) -> torch.Tensor:
    """The last hidden states (B, S, d) of the stack without prompts, gradient and dropout.

    Args:
        stack (`PreTrainedModel`): The stack.
        call (`dict`): Its arguments.
        segment_ids (`torch.LongTensor`, *optional*): Shape (B, S). As in [`Pass`].
        running (`Pass`, *optional*): The pass. Defaults to a plain pass with the `info` of the current one.
    """
    if running is None:
        outer = current_pass.get()
        running = plain_pass(stack, None if outer is None else outer.info)
        running.segment_ids = segment_ids
    token = current_pass.set(running)
    # Linear layers stay in training mode, since they have no dropout, and bitsandbytes repacks its own when they run in evaluation mode
    # on a CPU: no gradient passes through them afterwards.
    training = [module for module in tree_of(stack).values() if module.training and not isinstance(module, nn.Linear)]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            return stack(**{**call, "return_dict": True}).last_hidden_state
    finally:
        current_pass.reset(token)
        for module in training:
            module.training = True


def plain_pass(stack: PreTrainedModel, info: StackInfo | None) -> Pass:
    """A plain pass. The hooks of the stack that `info` describes work in it."""
    return Pass(stack, info, plain=True, attention=str(stack.config._attn_implementation))


def states_of_text(stack: PreTrainedModel, info: StackInfo, ids: Sequence[int]) -> dict[int, torch.Tensor]:
    """The states (n, w) of a text of n tokens, by depth: the input embeddings, and the input of each layer that runs.

    Args:
        stack (`PreTrainedModel`): The stack.
        info (`StackInfo`): Facts about it, those of the attached layer. Its hooks collect in this context's pass only, so that other
            threads may run the stack meanwhile.
        ids (`Sequence[int]`): The text's token ids.
    """
    tokens = torch.tensor([list(ids)], device=stack.get_input_embeddings().weight.device)  # (1, n)
    running = plain_pass(stack, info)
    running.states = {}
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    run_plain(stack, call, running=running)
    return {
        INPUT: embed_ids(stack, tokens[0]),
        **{depth: state[0] for depth, state in running.states.items()},
    }  # (n, w) each


def in_plain_pass(stack: nn.Module) -> bool:
    """True inside a plain pass of this stack. A different model that one of its hooks calls still gets its prompts."""
    running = current_pass.get()
    return running is not None and running.plain and running.stack is stack


def open_slots(
    stack: PreTrainedModel, info: StackInfo, groups: list[Group], text: Text, request: Request, call: dict[str, Any]
) -> tuple[dict[str, Any], list[Group], Layout | None]:
    """Change the arguments of a stack from S tokens to N = S + L positions, if an adapter has slots.

    Args:
        stack (`PreTrainedModel`): The stack.
        info (`StackInfo`): Facts about it.
        groups (`list[Group]`): The rows that have an adapter.
        text (`Text`): The tokens.
        request (`Request`): The request.
        call (`dict`): The arguments of the stack.

    Returns:
        The new call; the groups with their instances, or the positions that they edit, among the stack's positions; and the layout, None if
        there are no slots.

    Raises:
        ValueError: The call cannot get prompts, as `find_scope`, `place_slots` and `widen` say.
    """
    packing, by_row = text.packing, groups
    if packing is not None:
        groups = [own for group in groups if (own := group.of_sequences(packing))]
        if not groups:
            raise ValueError("No packed row with an adapter holds a sequence of two or more tokens.")
    scope = find_scopes(groups, text, request, info, stack.training)  # (B, S)
    groups = [group for group in groups if group.model.num_slots]
    if not groups:
        if packing is not None:  # with a cache, transformers would not keep their sequences apart
            call = {**call, "use_cache": False}
        elif text.mask is not None and "position_ids" in info.forward_args and call.get("position_ids") is None:
            call = {**call, "position_ids": count_positions(text, by_row, info)}  # (B, S)
        return call, edit_groups(by_row, scope, None), None
    name, cache = cache_of(call)
    call = prepare(call, text, groups, info)
    plain = {key: value for key, value in call.items() if key != name}
    if cache is not None and cache.is_compileable:
        plain["attention_mask"] = without_room(plain.get("attention_mask"), *text.tokens.shape)
    plain["use_cache"] = False

    response = shown_response(stack, info, call, text, scope, request)  # (B, S)
    frozen_states = once(partial(last_states, stack, plain, text, response))
    if packing is None:
        selection = InstanceTokens.of_rows(scope, text.tokens)
    else:
        selection = InstanceTokens.of_sequences(scope, packing.sequence)
    groups = [encode(group, text, selection, request, frozen_states) for group in groups]
    layout, places = place_slots(groups, text, selection, info)

    row = selection.each_row[:, 0]  # (G,)
    slots = (SlotRows.of(place.slot_index, pick(row, group.rows), layout) for group, place in zip(groups, places))
    groups = [replace(group, slots=own) for group, own in zip(groups, slots)]
    embeds = embed_slots(groups, places, text, selection, layout)  # (B, N, e)
    call = {**call, "input_ids": None, "inputs_embeds": embeds}
    call = widen(stack, info, call, text, layout, max(group.model.num_slots for group in groups))
    selection = selection.within(layout)
    groups = [replace(group, selection=selection.pick(group.rows)) for group in groups]
    return call, groups + edit_groups(by_row, scope, layout), layout


def prepare(call: dict[str, Any], text: Text, groups: list[Group], info: StackInfo) -> dict[str, Any]:
    """Add `position_ids`; drop packing arguments if no row is packed."""
    packing = text.packing
    # Only layers without attention read `seq_idx`, and packed rows are refused there.
    dropped = PACKED_ARGUMENTS if packing is None else ("seq_idx",)
    call = {key: value for key, value in call.items() if key not in dropped}
    if packing is not None:
        call["use_cache"] = False
    if "position_ids" in info.forward_args and call.get("position_ids") is None:
        positions = None if packing is None else packing.place_in_segment + info.position_offset  # (B, S)
        call["position_ids"] = count_positions(text, groups, info) if positions is None else positions
    return call


def last_states(
    stack: PreTrainedModel, call: dict[str, Any], text: Text, response: torch.Tensor | None = None
) -> torch.Tensor:
    """The last hidden states (B, S, d) of the stack without prompts, in which no instruction token sees the `response` (B, S)."""
    if call.get("inputs_embeds") is not None:  # some stacks add positions where the embeddings lie
        call = {**call, "inputs_embeds": call["inputs_embeds"].clone()}  # (B, S, e)
    if text.packing is None:
        return run_plain(stack, call, None if response is None else response.long())
    segment_ids = text.packing.segment_ids  # (B, S)
    call = {**call, "attention_mask": no_padding(stack, segment_ids), **lengths_of(stack, segment_ids, call)}
    return run_plain(stack, call, segment_ids)


def without_room(mask: Any, num_rows: int, num_tokens: int) -> Any:
    """A mask for an empty static cache, in any form, cut to the S tokens."""
    if isinstance(mask, dict):
        return {kind: without_room(one, num_rows, num_tokens) for kind, one in mask.items()}
    if isinstance(mask, torch.Tensor):
        return mask[..., :num_tokens]  # (B, S) or (B, 1, S, S)
    if mask is None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    size = (num_rows, None, num_tokens, num_tokens)
    return create_block_mask(mask.mask_mod, *size, device=mask.kv_indices.device)


def encode(
    group: Group, text: Text, selection: InstanceTokens, request: Request, frozen_states: Callable[[], torch.Tensor]
) -> Group:
    """The group with the outputs of its adapters' `encode`."""
    vectors: list[Any] = []  # a tensor each, or None each: the generators are of one class
    for generator, rows in group:
        own, said = selection.pick(rows), request.of_rows(len(selection), rows)
        source = Source(
            token_ids=None if text.ids is None else own.take(text.ids),  # (G, n)
            embeds=own.take(text.embeds),  # (G, n, e)
            mask=own.mask,
            instance_embeds=said.instance_embeds,
            task_ids=said.task_ids,
            frozen_states=partial(_take_states, own, frozen_states),  # (G, n, d)
        )
        with in_place(generator):
            vector = generator.encode(source)
        vectors.append(intercepted(vector, depth=None, generators=[generator], rows=rows))
    if vectors[0] is None:
        return group
    vector = torch.cat(vectors)  # (G, ...)
    return replace(group, vector=vector if group.by_row is None else vector[group.by_row.to(vector.device)])


def _take_states(selection: InstanceTokens, states: Callable[[], torch.Tensor]) -> torch.Tensor:
    return selection.take(states())  # (G, n, d)


def embed_slots(
    groups: list[Group], places: list[Places], text: Text, selection: InstanceTokens, layout: Layout
) -> torch.Tensor:
    """The input embeddings (B, N, e) with the slots in their places, and with prompt vectors in them if a method writes there."""
    # Slots that no generator writes to begin as copies of the first token, which disturbs the model least.
    vectors = take(text.embeds.detach(), layout.first)  # (B, L, e)
    embeds, own = insert(text.embeds, vectors, layout), None  # (B, N, e)
    for group in groups:
        if INPUT in group.model.depths:
            assert group.slots is not None  # they are placed
            own = group.run(text.embeds, INPUT, selection.pick(group.rows), layout)  # (G, l, e)
            embeds = write(embeds, group.slots.rows, group.slots.pick(own))  # (B, N, e)
    if groups[0].rows_of is not None or own is None:
        return embeds
    (group,), (place,) = groups, places  # one adapter has all rows
    if text.packing is not None:
        return attach_in_rows_apart(group, place, embeds, own, text, layout)
    return group.model.attach_choice_gradient(
        embeds, own, text.embeds, group.vector, layout, place.start, place.stop
    )  # (B, N, e)


def attach_in_rows_apart(
    group: Group, places: Places, embeds: torch.Tensor, prompts: torch.Tensor, text: Text, layout: Layout
) -> torch.Tensor:
    """Attach position gradients to the input embeddings (B, N, e) of packed rows, one sequence at a time."""
    packing = text.packing
    assert packing is not None  # the rows are packed
    alone, index = packing.apart(layout, places.slot_index, places.before_token)  # index (G, n + l)
    rows = packing.rows[:, None].expand_as(index)  # (G, n + l)
    spare = torch.cat([embeds, torch.zeros_like(embeds[:, :1])], dim=1)  # (B, N + 1, e)
    tokens = packing.unpack(text.embeds, 0.0)  # (G, n, e)
    first = packing.columns[:, 0]  # (G,)
    attached = group.model.attach_choice_gradient(
        spare[rows, index], prompts, tokens, group.vector, alone, places.start - first, places.stop - first
    )  # (G, n + l, e)
    return spare.index_put((rows, index), attached)[:, :-1]  # (B, N, e)
