# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapter groups: which instances of a batch have which adapter, and which adapters run together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..generator import InstanceGenerator, Instances, stack_weights
from .instances import InstanceTokens
from .intercept import intercepted
from .layout import Layout, Seats
from .packing import Packing
from .request import Request


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
        """The prompt vectors (G, l, w) of one depth.

        Args:
            states (`torch.Tensor`): Shape (B, N, w). The layer's input for the whole batch, or the input embeddings.
            depth (`int`): The layer, or `INPUT`.
            selection (`InstanceTokens`): The group's instances among the columns of `states`.
            layout (`Layout`, *optional*): Where slots and tokens of the batch stand; only tools look at it.
        """
        model = self.model
        weights = None if any(map(managed, self.generators)) else self.weights(depth)
        device = self._device(weights, states.device)
        base = selection.last if model.copies_last else selection.first  # (G,)
        instances = Instances(
            selection.take(states).to(device),  # (G, n, w)
            selection.mask.to(device),
            selection.state_at(states, base).to(device),  # (G, 1, w)
            None if self.vector is None else self.vector.to(device),
        )
        prompts = self._call(instances, depth, weights).to(states.device, states.dtype)  # (G, l, w)
        fields = {"instances": instances, "selection": selection, "layout": layout, "rows": self.rows}
        return intercepted(prompts, depth=depth, generators=self.generators, **fields)

    def edit(self, states: torch.Tensor, depth: int) -> torch.Tensor:
        """The states (B, N, d) of a layer's input with the adapters' edits at the positions that are `edited`."""
        assert self.edited is not None  # the pass has found them
        weights = None if any(map(managed, self.generators)) else self.weights(depth)
        device = self._device(weights, states.device)
        own, mask = pick(states, self.rows).to(device), self.edited.to(device)  # (rows, N, d), (rows, N)
        instances = Instances(own, mask, own[:, :0].detach(), None if self.vector is None else self.vector.to(device))
        edits = self._call(instances, depth, weights).to(states.device, states.dtype)  # (rows, N, d)
        shown = mask.to(states.device, states.dtype)[..., None]  # (rows, N, 1)
        if self.rows is None:
            return torch.addcmul(states, edits, shown)  # (B, N, d)
        return states.index_add(0, self.rows.to(states.device), edits * shown)  # (B, N, d)

    def _call(self, instances: Instances, depth: int, weights: dict[str, torch.Tensor] | None) -> torch.Tensor:
        """The output of the adapters for their instances."""
        if weights is None and len(self.generators) > 1:
            return self._one_by_one(instances, depth)
        return self.model(instances, depth, weights)

    def _device(self, weights: Mapping[str, torch.Tensor] | None, default: torch.device) -> torch.device:
        """The device of the adapters, which may differ from the layer's.

        A managed module loads its parameters only when it is called, and a `DataParallel` replica has none: `vector` or the layer
        decides for them.
        """
        known = [self.vector] if weights is None else [*weights.values(), self.vector]
        return next((tensor.device for tensor in known if tensor is not None), default)

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


def put(
    whole: torch.Tensor, rows: torch.Tensor | None, values: torch.Tensor, seats: Seats | None = None
) -> torch.Tensor:
    """Write `values` (G, l, ...) into these instances' slots in `whole` (B, L, ...); unused slots stay in front.

    `rows` are the instances; None for all of them. `seats` say which slots are theirs in packed rows.
    """
    if seats is not None:
        return seats.put(whole, rows, values)
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
