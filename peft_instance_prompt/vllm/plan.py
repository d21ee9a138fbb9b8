# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The plan of one step: which rows of the flat batch are whose instruction and slots, and which are edited.

The flat batch of a step holds the tokens of all its requests one behind the other, without padding: new prompts, and one token of each
request in decoding. The plan holds the requests with slots to write or tokens to edit in this step. It is made on the host and copied to
the device once.

An instance of a method that edits is a *tile*: up to 64 edited tokens of one request in this step. An edit reads its own token only, so
that it does not matter where tiles are cut, and padding stays small if a long prompt shares a step with short ones.

Shapes: T rows of the flat batch, G instances of up to n instruction tokens, l prompt vectors each (n edits of a tile), K rows to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .package import Group, InstanceGenerator, InstanceTokens


TILE = 64  # tokens


@dataclass(frozen=True)
class Placed:
    """Where a request's instruction and slots stand in its prompt, slots counted. The front end decides it.

    Attributes:
        key (`str`): The adapter's key.
        num_read (`int`): The number of instruction tokens, which are the first tokens of the prompt that are no slots.
        slots (`list[int]`): The positions of the slots, in order.
        vectors (`list[int]`): For each slot, the number of its vector among the adapter's l.
    """

    key: str
    num_read: int
    slots: list[int]
    vectors: list[int]

    @property
    def text(self) -> list[int]:
        """The positions of the instruction's tokens."""
        slots = set(self.slots)
        return [at for at in range(self.num_read + len(slots)) if at not in slots][: self.num_read]

    @property
    def end(self) -> int:
        """The number of tokens that one step must compute: up to the last of the instruction and the slots."""
        return max(*self.slots, *self.text[-1:]) + 1

    def positions(self, done: int, length: int) -> list[int]:
        """The slots among `length` tokens behind the first `done`."""
        return [at for at in self.slots if done <= at < done + length]

    def writes(self, done: int, length: int) -> bool:
        """Whether there are slots to write in a step that computes `length` tokens behind `done` computed ones."""
        return bool(self.positions(done, length))

    def is_due(self, done: int, length: int) -> bool:
        """Whether the plan of such a step has the request: not all of its slots are in the cache."""
        return done <= max(self.slots)

    def is_torn(self, done: int, length: int) -> bool:
        """Whether such a step would end between the tokens that must be computed at once. Slots that are in the cache need none."""
        return self.is_due(done, length) and done + length < self.end

    def complaint(self, done: int, length: int) -> str | None:
        """Why such a step cannot write the slots; None if it can."""
        if done == 0 and length >= self.end:
            return None
        return (
            f"Its instruction and slots are among the first {self.end} tokens of its prompt, but {done} of them are in the cache and "
            f"{length} are computed now: instance prompts need all of them at once."
        )

    def parts(self, token_ids: list[int], row: int, done: int, length: int) -> list[Part]:
        """The request's instance in such a step, whose first token is at `row` of the flat batch."""
        text = self.text
        writes = [(row + at, vector) for at, vector in zip(self.slots, self.vectors)]
        return [Part([row + at for at in text], [token_ids[at] for at in text], writes)]


@dataclass(frozen=True)
class Edited:
    """Which tokens of a request's prompt are edited; of those that the engine generates, none is. The front end decides it.

    Attributes:
        key (`str`): The adapter's key.
        ranges (`list[list[int]]`): The positions that are edited, as ranges `[start, stop]` in order.
    """

    key: str
    ranges: list[list[int]]

    def positions(self, done: int, length: int) -> list[int]:
        """The edited positions among `length` tokens behind the first `done`."""
        return [at for start, stop in self.ranges for at in range(max(start, done), min(stop, done + length))]

    def writes(self, done: int, length: int) -> bool:
        """Whether there are tokens to edit in a step that computes `length` tokens behind `done` computed ones."""
        return any(start < done + length and done < stop for start, stop in self.ranges)

    is_due = writes

    def is_torn(self, done: int, length: int) -> bool:
        """False: edits are causal, so that a prompt may be cut anywhere."""
        return False

    def complaint(self, done: int, length: int) -> str | None:
        """None: every step can edit its tokens."""
        return None

    def parts(self, token_ids: list[int], row: int, done: int, length: int) -> list[Part]:
        """The request's tiles in such a step, whose first token is at `row` of the flat batch."""
        edited = self.positions(done, length)
        tiles = [edited[at : at + TILE] for at in range(0, len(edited), TILE)]
        rows = [[row + at - done for at in tile] for tile in tiles]
        return [
            Part(own, [token_ids[at] for at in tile], [(one, number) for number, one in enumerate(own)])
            for tile, own in zip(tiles, rows)
        ]


class Part(NamedTuple):
    """An instance of a step.

    Attributes:
        rows (`list[int]`): The rows of the flat batch that it reads.
        token_ids (`list[int]`): Their tokens.
        writes (`list[tuple[int, int]]`): The rows that it writes, each with the number of its vector.
    """

    rows: list[int]
    token_ids: list[int]
    writes: list[tuple[int, int]]


class Prefill(NamedTuple):
    """A request in prefill: a step that computes tokens of its prompt.

    Attributes:
        name (`str`): The request's id, for messages.
        placed (`Placed` or `Edited`): Its instruction and its slots, or the tokens that are edited.
        token_ids (`list[int]`): Its prompt, with the slots.
        row (`int`): The row of its first token in this step.
        done (`int`): The number of its tokens in the cache.
        length (`int`): The number of its tokens in this step.
    """

    name: str
    placed: Placed | Edited
    token_ids: list[int]
    row: int
    done: int
    length: int

    def parts(self) -> list[Part]:
        """Its instances in this step."""
        return self.placed.parts(self.token_ids, self.row, self.done, self.length)


@dataclass
class Rows:
    """Requests whose adapters have the same signature and run together.

    Attributes:
        requests (`list[str]`): Their ids.
        group (`Group`): The adapters.
        selection (`InstanceTokens`): The instances among the rows of the flat batch.
        token_ids (`torch.LongTensor`): Shape (G, n). The instruction's tokens.
        rows (`torch.LongTensor`): Shape (K,). The rows that are written: those of slots, or of edited tokens.
        instance (`torch.LongTensor`): Shape (K,). The instance of each.
        vector (`torch.LongTensor`): Shape (K,). The number of each one's vector among its instance's.
        written (`list[int]`): The depths at which vectors were written.
    """

    requests: list[str]
    group: Group
    selection: InstanceTokens
    token_ids: torch.Tensor
    rows: torch.Tensor
    instance: torch.Tensor
    vector: torch.Tensor
    written: list[int] = field(default_factory=list)


@dataclass
class Plan:
    """What one step writes.

    Attributes:
        rows (`list[Rows]`): One entry per adapter group; empty if there is nothing to write.
        failures (`dict[str, str]`): By the id of a request that cannot be served as the front end placed it: why. Nothing is written
            for it, and its answer must not leave the engine.
        done (`dict[str, int]`): How many tokens of each request were in the cache before the step.
    """

    rows: list[Rows] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)

    def close(self) -> None:
        """Once the step has run, add the requests whose vectors were not written to the failures."""
        for rows in self.rows:
            if tuple(rows.written) != rows.group.model.depths:
                due = f"Prompt vectors were due at {rows.group.model.depths} and were written at {rows.written}."
                self.failures.update(dict.fromkeys(rows.requests, due))


def make_plan(prefills: Iterable[Prefill], generators: Mapping[str, InstanceGenerator], device: torch.device) -> Plan:
    """The plan of a step.

    Args:
        prefills (`Iterable[Prefill]`): The requests with adapters.
        generators (`Mapping[str, InstanceGenerator]`): The adapters by key.
        device (`torch.device`): The device of the flat batch.
    """
    plan = Plan()
    alike: dict[tuple, dict[str, list[Prefill]]] = {}
    for request in prefills:
        placed = request.placed
        if not placed.is_due(request.done, request.length):
            continue
        plan.done[request.name] = request.done
        if complaint := check(request, generators):
            plan.failures[request.name] = complaint
            continue
        signature = generators[placed.key].signature
        alike.setdefault(signature, {}).setdefault(placed.key, []).append(request)
    groups = [
        {key: [part for request in each for part in request.parts()] for key, each in of_adapters.items()}
        for of_adapters in alike.values()
    ]
    numbers = iter(copy_once([tensor for of_adapters in groups for tensor in gather(of_adapters)], device))
    for requests, of_adapters in zip(alike.values(), groups):
        names = [request.name for each in requests.values() for request in each]
        plan.rows.append(arrange_rows(names, of_adapters, generators, numbers))
    return plan


def check(request: Prefill, generators: Mapping[str, InstanceGenerator]) -> str | None:
    """A complaint if the adapter is not loaded, or the instruction and the slots are not all in this step."""
    if request.placed.key not in generators:
        return f"The adapter of request {request.name} is not loaded: it was unloaded before the request came."
    return request.placed.complaint(request.done, request.length)


def gather(of_adapters: Mapping[str, list[Part]]) -> list[torch.Tensor]:
    """The numbers of [`arrange_rows`], on the host."""
    parts = [part for each in of_adapters.values() for part in each]
    n = max(len(part.rows) for part in parts)
    columns, ids = (
        [values + values[:1] * (n - len(values)) for values in each]
        for each in ([part.rows for part in parts], [part.token_ids for part in parts])
    )
    writes = [(row, number, vector) for number, part in enumerate(parts) for row, vector in part.writes]
    return [
        torch.tensor([columns, ids]),  # (2, G, n)
        torch.tensor([len(part.rows) for part in parts]),  # (G,)
        torch.tensor(writes).T,  # (3, K)
        torch.arange(len(parts)),  # (G,)
    ]


def copy_once(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy tensors of the host to a device in one go, which the device does not wait for."""
    if device.type == "cpu" or not tensors:
        return tensors
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def arrange_rows(
    names: list[str],
    of_adapters: Mapping[str, list[Part]],
    generators: Mapping[str, InstanceGenerator],
    numbers: Iterator[torch.Tensor],
) -> Rows:
    """The rows of requests whose adapters have the same signature, adapter by adapter."""
    (columns, ids), counts, (rows, instance, vector), order = (next(numbers) for _ in range(4))
    mask = torch.arange(columns.shape[1], device=columns.device) < counts[:, None]  # (G, n)
    last = columns.gather(1, counts[:, None] - 1)[:, 0]  # (G,)
    selection = InstanceTokens(mask, columns[:, 0], last, torch.zeros_like(last), columns)
    own = [generators[key] for key in of_adapters]
    sizes = [len(each) for each in of_adapters.values()]
    adapter_of = [number for number, size in enumerate(sizes) for _ in range(size)]
    group = Group(own) if len(own) == 1 else Group(own, None, list(order.split(sizes)), adapter_of)
    return Rows(names, group, selection, ids, rows, instance, vector)
