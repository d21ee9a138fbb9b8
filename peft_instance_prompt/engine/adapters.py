# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapter groups: which instances of a batch have which adapter, which adapters run together, and where their slots stand.

Shapes: B rows, S tokens, L slots, G instances: rows, or the sequences of packed rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch

from ..config import PAIR_POSITIONS, PLAIN_POSITIONS, InstancePromptConfig
from ..generator import InstanceGenerator, Instances, stack_weights
from ..nn.pooling import last_index
from .intercept import intercepted
from .request import Request
from .slots import Layout, SlotRows, arrange
from .stack import StackInfo
from .tokens import InstanceTokens, Packing, Text


@dataclass
class Group:
    """An adapter group: G instances whose adapters have equal signatures and run together.

    The instances stand in the order of their rows, so that a group with all rows of a batch needs no copy of the states.

    Attributes:
        generators (`Sequence[InstanceGenerator]`): The adapters.
        rows (`torch.LongTensor`, *optional*): Shape (G,). The row of each instance; its sequence in a packed batch. None: all of them.
        rows_of (`list[torch.LongTensor]`, *optional*): Per adapter: its instances, as in `rows`. None: one adapter has all of them.
        adapter_of (`list[int]`): Per instance: the index of its adapter in `generators`. Not read if there is one adapter.
        by_row (`torch.LongTensor`, *optional*): Shape (G,). The index that sorts values made adapter by adapter into the order of the
            rows. None: they are in that order.
        selection (`InstanceTokens`, *optional*): The instances' tokens among the positions of the stack.
        slots (`SlotRows`, *optional*): Their slots among these positions.
        edited (`torch.BoolTensor`, *optional*): Shape (rows, N). The positions of the rows whose states the adapters edit.
        vector (`torch.Tensor`, *optional*): Shape (G, ...). The output of the adapters' `encode`.
        unbound (`dict`): By the index of an adapter, once per pass: whether gradients were on, and its parameters, unbound by depth.
    """

    generators: Sequence[InstanceGenerator]
    rows: torch.Tensor | None = None
    rows_of: list[torch.Tensor] | None = None
    adapter_of: list[int] = field(default_factory=list)
    by_row: torch.Tensor | None = None
    selection: InstanceTokens | None = None
    slots: SlotRows | None = None
    edited: torch.Tensor | None = None
    vector: torch.Tensor | None = None
    unbound: dict[int, tuple[bool, dict]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, generators: Sequence[InstanceGenerator], rows_of: list[list[int]], num_rows: int, device: torch.device
    ) -> Group:
        """A group from the rows of each adapter, out of `num_rows`."""
        pairs = [(row, number) for number, rows in enumerate(rows_of) for row in rows]
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        return cls(
            generators,
            None if len(pairs) == num_rows else torch.tensor(sorted(row for row, _ in pairs), device=device),
            [torch.tensor(rows, device=device) for rows in rows_of],
            [number for _, number in sorted(pairs)],
            None if order == list(range(len(pairs))) else torch.tensor(order, device=device),
        )

    @property
    def model(self) -> Any:  # a generator of prompts or of edits
        """The first adapter. Fields that the engine reads are equal in all."""
        return self.generators[0]

    def of_sequences(self, packing: Packing) -> Group | None:
        """The group with the sequences of a packed batch in place of its rows; None if these hold no sequence."""
        if self.rows_of is None:
            return self
        pairs = zip(self.generators, map(packing.of_rows, self.rows_of))
        kept = [(generator, own.tolist()) for generator, own in pairs if len(own)]
        if not kept:
            return None
        return Group.of([g for g, _ in kept], [own for _, own in kept], len(packing.rows), packing.rows.device)

    def __iter__(self) -> Iterator[tuple[InstanceGenerator, torch.Tensor | None]]:
        """Each adapter with its instances; None for all of them."""
        rows_of: Sequence[torch.Tensor | None] = self.rows_of or [None]
        return iter(zip(self.generators, rows_of))

    def run(self, states: torch.Tensor, depth: int, selection: InstanceTokens, layout: Layout | None) -> torch.Tensor:
        """The prompt vectors (G, l, w) of one depth, or the edits (G, n, w) of the instances' tokens.

        Args:
            states (`torch.Tensor`): Shape (B, N, w). The layer's input for the whole batch, or the input embeddings.
            depth (`int`): The layer, or `INPUT`.
            selection (`InstanceTokens`): The group's instances among the columns of `states`.
            layout (`Layout`, *optional*): Where slots and tokens of the batch stand; only tools look at it.
        """
        model, taken = self.model, selection.take(states)  # (G, n, w)
        if model.edits:
            base = taken[:, :0].detach()  # (G, 0, w)
        else:
            column = selection.last if model.copies_last else selection.first  # (G,)
            base = selection.state_at(states, column)  # (G, 1, w)
        instances = Instances(taken, selection.mask, base, self.vector)
        instances, prompts = self._call(instances, depth, states)  # (G, l, w)
        fields = {"instances": instances, "selection": selection, "layout": layout, "rows": self.rows}
        return intercepted(prompts, depth=depth, generators=self.generators, **fields)

    def add_edits(self, states: torch.Tensor, depth: int) -> torch.Tensor:
        """The states (B, N, d) of a layer's input with the adapters' edits at the positions that are `edited`."""
        assert self.edited is not None  # the pass has found them
        own = pick(states, self.rows)  # (rows, N, d)
        instances = Instances(own, self.edited, own[:, :0].detach(), self.vector)
        _, edits = self._call(instances, depth, states)  # (rows, N, d)
        shown = self.edited.to(states.device, states.dtype)[..., None]  # (rows, N, 1)
        if self.rows is None:
            return torch.addcmul(states, edits, shown)  # (B, N, d)
        return states.index_add(0, self.rows.to(states.device), edits * shown)  # (B, N, d)

    def _call(self, instances: Instances, depth: int, states: torch.Tensor) -> tuple[Instances, torch.Tensor]:
        """The instances on the adapters' device, which may differ from that of the states; and the adapters' output for them, as the
        states are."""
        weights = None if any(map(managed, self.generators)) else self.weights(depth)
        # A managed module loads its parameters only when it is called, and a `DataParallel` replica has none.
        known = [*(weights or {}).values(), self.vector, states]
        device = next(tensor.device for tensor in known if tensor is not None)
        instances = Instances._make(None if one is None else one.to(device) for one in instances)
        one_by_one = weights is None and len(self.generators) > 1
        made = self._one_by_one(instances, depth) if one_by_one else self.model(instances, depth, weights)
        return instances, made.to(states.device, states.dtype)

    def _one_by_one(self, instances: Instances, depth: int) -> torch.Tensor:
        """The output of managed adapters. Each loads its parameters only when it is called, so they cannot be stacked."""
        places = [[i for i, n in enumerate(self.adapter_of) if n == number] for number in range(len(self.generators))]
        made = [
            generator(Instances._make(pick(values, torch.tensor(own)) for values in instances), depth)
            for generator, own in zip(self.generators, places)
        ]
        order = torch.tensor([i for own in places for i in own]).argsort()  # (G,)
        return torch.cat(made)[order.to(made[0].device)]

    def weights(self, depth: int) -> dict[str, torch.Tensor]:
        """The parameters of a depth, by name: (a, b) for one adapter; (G, a, b) for several, one entry per instance."""
        if len(self.generators) == 1:
            return self._of(0, depth)
        each = [self._of(number, depth) for number in range(len(self.generators))]
        return stack_weights(each[number] for number in self.adapter_of)

    def _of(self, number: int, depth: int) -> dict[str, torch.Tensor]:
        """One adapter's parameters at a depth."""
        generator, grad = self.generators[number], torch.is_grad_enabled()
        if number not in self.unbound:  # once per pass
            self.unbound[number] = grad, generator.unbind()
        made_with_grad, unbound = self.unbound[number]
        # Re-entrant checkpointing runs a layer without gradients first, then with them: the second run must read its weights anew.
        return generator.weights(depth, unbound if made_with_grad == grad else None)


def managed(generator: InstanceGenerator) -> bool:
    """Whether FSDP, DeepSpeed or accelerate's offloading loads the parameters only when the module is called."""
    return bool(generator._forward_pre_hooks) or "_hf_hook" in generator.__dict__


@contextmanager
def in_place(generator: InstanceGenerator) -> Iterator[None]:
    """Load parameters that accelerate has offloaded, for a block that reads them without calling their module."""
    hooks = [(m, hook) for m in generator.modules() if (hook := m.__dict__.get("_hf_hook")) is not None]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooks:
            hook.post_forward(module, None)


Values = TypeVar("Values", torch.Tensor, torch.Tensor | None)


def pick(values: Values, rows: torch.Tensor | None) -> Values:
    """Some rows of `values`; None for all."""
    return values if values is None or rows is None else values[rows.to(values.device)]


def put(whole: torch.Tensor, rows: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """Write `values` (G, l) into the last columns of these `rows` (G,) of `whole` (B, L); None for all rows and columns."""
    if rows is None:
        return values.to(whole.dtype)
    columns = torch.arange(whole.shape[1] - values.shape[1], whole.shape[1], device=whole.device)
    return whole.index_put((rows.to(whole.device)[:, None], columns), values.to(whole.dtype))


def names_of_rows(active: Sequence[str], num_rows: int, request: Request) -> list[str | None]:
    """The name of each row's adapter. None: the row has none, as far as the names tell."""
    if request.adapter_names is None:
        return [next(iter(active), None)] * num_rows
    repeats = request.rows_per_name(num_rows, beams=request.prompt_length is not None)
    return [None if name == "__base__" else name for name in request.adapter_names for _ in range(repeats)]


def group_rows(
    generators: Mapping[str, InstanceGenerator],
    active: Sequence[str],
    num_rows: int,
    request: Request,
    device: torch.device,
) -> list[Group]:
    """The adapter groups of a batch; an empty list if no row has an adapter.

    Args:
        generators (`Mapping[str, InstanceGenerator]`): The adapters by name.
        active (`Sequence[str]`): The names of the active adapters. Read if the request has no `adapter_names`.
        num_rows (`int`): B.
        request (`Request`): The request.
        device (`torch.device`): The device of the row numbers.

    Raises:
        ValueError: `adapter_names` and the batch differ in their number of rows.
    """
    if request.adapter_names is None:
        return [Group([generators[name]]) for name in active if name in generators]
    repeats = request.rows_per_name(num_rows, beams=request.prompt_length is not None)
    rows_of: dict[str, list[int]] = {}
    for row in range(num_rows):
        rows_of.setdefault(request.adapter_names[row // repeats], []).append(row)
    alike: dict[tuple, list[str]] = {}
    for name in rows_of:
        if name in generators:
            alike.setdefault(generators[name].signature, []).append(name)
    if len(rows_of) == 1 and alike:
        return [Group([generators[name]]) for name in rows_of]
    return [
        Group.of([generators[n] for n in names], [rows_of[n] for n in names], num_rows, device)
        for names in alike.values()
    ]


class Places(NamedTuple):
    """Where the slots of a group's instances stand among the tokens of their rows.

    Attributes:
        start (`torch.LongTensor`): Shape (G,). The token before which the slots before the instruction stand.
        stop (`torch.LongTensor`): Shape (G,). The token before which the slots behind it stand; S puts them behind the last token.
        before_token (`torch.LongTensor`): Shape (G, l). The token before which each slot stands, one of the two.
        slot_index (`torch.LongTensor`): Shape (G, l). The index of each slot in its row of the stack; in packed rows, N for unused ones.
    """

    start: torch.Tensor
    stop: torch.Tensor
    before_token: torch.Tensor
    slot_index: torch.Tensor


def place_slots(
    groups: list[Group], text: Text, selection: InstanceTokens, info: StackInfo
) -> tuple[Layout, list[Places]]:
    """Ask the adapters where their slots stand, and lay out the rows.

    Args:
        groups (`list[Group]`): The groups, with the output of `encode`.
        text (`Text`): The tokens.
        selection (`InstanceTokens`): All instances of the batch, by the columns of the text.
        info (`StackInfo`): Facts about the stack.

    Returns:
        The layout of the batch, and the places of each group.

    Raises:
        ValueError: Rows have different numbers of slots in a stack with learned absolute positions by column, or a config asks for a
            separator that a row lacks.
    """
    B, S, packing = *text.tokens.shape, text.packing
    L = max(group.model.num_slots for group in groups)
    everywhere = all(group.rows is None for group in groups)
    # A row per instance: G rows.
    front = selection.first[:, None].expand(-1, L)  # (G, L)
    before_token, since = front, torch.zeros_like(front)  # (G, L) each
    used, known = torch.full_like(front, everywhere, dtype=torch.bool), everywhere  # (G, L); are all known to be used
    places = []
    for group in groups:
        model, own = group.model, selection.pick(group.rows)
        behind, own_used = model.place(own.mask, group.vector)  # (G, l) each
        behind, known = behind.to(front.device), known and own_used is None
        start, stop = edges(group, text, selection, info)  # (G,) each
        if info.absolute_column_positions and not info.causal and model.first_visible_layer > 0:
            # Late slots have no position of their own. Where positions go by column, they stand behind the last token, where they
            # move no token.
            start = stop = torch.full_like(start, S)  # (G,)
        places.append((start, stop, torch.where(behind, stop[:, None], start[:, None])))
        before_token = put(before_token, group.rows, places[-1][2])
        used = put(used, group.rows, torch.ones_like(behind) if own_used is None else own_used.to(front.device))
        since = put(since, group.rows, torch.full(behind.shape, model.first_visible_layer, device=front.device))
    if info.causal and info.absolute_column_positions and not everywhere:
        check_equal_numbers(groups, L, B, info)
    predicts = before_token == selection.last[:, None] + 1  # (G, L), whether `start` or `stop` put them there
    late = tuple(sorted({group.model.first_visible_layer for group in groups} - {0}))
    tables = [before_token, since, front, used, predicts]  # (G, L) each
    if packing is not None:
        column, L = packing.columns_of(used)  # (G, L before)
        tables = [packing.spread(table, column, L) for table in tables]  # (B, L) each
    before_token, since, front, used, predicts = tables
    answers = predicts if info.causal else None
    told = None if known and packing is None else used
    layout = arrange(before_token, S, told, answers, since, late, not info.causal, front)  # B rows
    position = layout.slot_index  # (B, L)
    if packing is not None:
        layout = replace(layout, segment_ids=packing.widen(layout))
        position = packing.positions_of(layout, column)  # (G, L)
    own_positions = (pick(position, group.rows)[:, -group.model.num_slots :] for group in groups)  # (G, l) each
    return layout, [Places(*place, own) for place, own in zip(places, own_positions)]


def check_equal_numbers(groups: list[Group], num_slots: int, num_rows: int, info: StackInfo) -> None:
    """Raise a ValueError if not all rows have the same number of slots, where learned positions go by column."""
    full = sum(len(group.rows) for group in groups if group.rows is not None and group.model.num_slots == num_slots)
    if full < num_rows:
        raise ValueError(
            f"The rows of a batch cannot have different numbers of prompt slots in {info.name!r}, whose learned positions go by "
            "column: give all of them adapters with the same `num_virtual_tokens`."
        )


def edges(group: Group, text: Text, selection: InstanceTokens, info: StackInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens (G,) before which slots stand: those before the instruction, and those behind it."""
    position = group.model.config.prompt_position
    start = pick(selection.first + (position == "after_first"), group.rows)  # (G,)
    end = selection.last + 1 if info.causal else last_index(text.tokens)  # (B,); in an encoder, before its end token
    if position in PAIR_POSITIONS:
        own = selection.pick(group.rows)
        tokens = pick(text.tokens, own.rows)  # (G, S); a packed row has several instances
        start = at_separator(
            group.model.config, pick(text.ids, own.rows), tokens, own.first, own.last, own.rows
        )  # (G,)
    return start, torch.maximum(start, pick(end, group.rows))


def at_separator(
    config: InstancePromptConfig,
    ids: torch.Tensor | None,
    tokens: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The column (G,) of each instance's first separator, or of the first token of its second sentence.

    Args:
        config (`InstancePromptConfig`): The adapter's config, with the position and the separator.
        ids (`torch.LongTensor`, *optional*): Shape (G, S). The token ids of each instance's row.
        tokens (`torch.BoolTensor`): Shape (G, S). False where there is padding.
        first, last (`torch.LongTensor`): Shape (G,) each. The first token, and the last instruction token.
        rows (`torch.LongTensor`, *optional*): Shape (G,). The numbers of the rows, for messages. Default: 0, 1, ...

    Raises:
        ValueError: A row has no separator behind its first token, or nothing behind it.
    """
    position, separator = config.prompt_position, config.separator_id
    if ids is None:
        raise ValueError(
            f"`prompt_position={position!r}` looks for the separator in `input_ids`, but the model got `inputs_embeds`: pass "
            f"`input_ids`, or choose one of {list(PLAIN_POSITIONS)}."
        )
    ids = ids.to(tokens.device)
    columns = torch.arange(tokens.shape[1], device=tokens.device)  # (S,)
    # Not the first token, since some tokenizers begin a text with the separator. Not the response, which the prompt must not read.
    inside = tokens & (columns > first[:, None]) & (columns <= last[:, None])  # (G, S)
    found = inside & (ids == separator)  # (G, S)
    if position == "after_separator":  # RoBERTa writes two in a row
        found = inside & ~found & (found.cumsum(dim=1) > 0)  # (G, S)
    if (missing := ~found.any(dim=1) & tokens.any(dim=1)).any():
        bad = missing.nonzero().flatten()  # (rows,)
        bad = bad if rows is None else rows.to(bad.device)[bad]  # (rows,)
        raise ValueError(
            f"`prompt_position={position!r}` needs rows of two sentences with the separator {separator} (`separator_id`) between "
            f"them, and row(s) {bad.tolist()} have none{' with text behind it' if position == 'after_separator' else ''}. For "
            f"single sentences choose one of {list(PLAIN_POSITIONS)}."
        )
    return found.int().argmax(dim=1)  # (G,)
