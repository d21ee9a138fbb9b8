# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The plan of one step: which rows of the flat batch are whose instruction and slots.

The flat batch of a step holds the tokens of all its requests one behind the other, without padding: new prompts, and one token of each
request in decoding. The plan holds the requests with slots to write in this step. It is made on the host and copied to the device once.

Shapes: T rows of the flat batch, G instances of up to n instruction tokens, l prompt vectors each, K slots in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .package import Group, InstanceTokens, PromptGenerator


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

    def to_dict(self) -> dict[str, Any]:
        return {"key": self.key, "num_read": self.num_read, "slots": self.slots, "vectors": self.vectors}

    @property
    def text(self) -> list[int]:
        """The positions of the instruction's tokens."""
        slots = set(self.slots)
        return [at for at in range(self.num_read + len(slots)) if at not in slots][: self.num_read]

    @property
    def end(self) -> int:
        """The number of tokens that one step must compute: up to the last of the instruction and the slots."""
        return max(*self.slots, *self.text[-1:]) + 1

    def writes(self, done: int, length: int) -> bool:
        """Whether there are slots to write in a step that computes `length` tokens behind `done` computed ones."""
        return any(done <= at < done + length for at in self.slots)

    def is_torn(self, done: int, length: int) -> bool:
        """Whether such a step would end between the tokens that must be computed at once. Slots that are in the cache need none."""
        return done <= max(self.slots) and done + length < self.end


class Prefill(NamedTuple):
    """A request in prefill: a step that computes tokens of its prompt.

    Attributes:
        name (`str`): The request's id, for messages.
        placed (`Placed`): Its instruction and its slots.
        token_ids (`list[int]`): Its prompt, with the slots.
        row (`int`): The row of its first token in this step.
        done (`int`): The number of its tokens in the cache.
        length (`int`): The number of its tokens in this step.
    """

    name: str
    placed: Placed
    token_ids: list[int]
    row: int
    done: int
    length: int


@dataclass
class Rows:
    """Requests whose adapters have the same signature and run together.

    Attributes:
        requests (`list[str]`): Their ids.
        group (`Group`): The adapters.
        selection (`InstanceTokens`): The instances among the rows of the flat batch.
        token_ids (`torch.LongTensor`): Shape (G, n). The instruction's tokens.
        rows (`torch.LongTensor`): Shape (K,). The slots' rows.
        instance (`torch.LongTensor`): Shape (K,). The instance of each slot.
        vector (`torch.LongTensor`): Shape (K,). The number of each slot's vector among the l.
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
    """

    rows: list[Rows] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def close(self) -> dict[str, str]:
        """The failures once the step has run, those of requests whose vectors were not written among them."""
        for rows in self.rows:
            if tuple(rows.written) != rows.group.model.depths:
                due = f"Prompt vectors were due at {rows.group.model.depths} and were written at {rows.written}."
                self.failures.update(dict.fromkeys(rows.requests, due))
        return self.failures


def make_plan(prefills: Iterable[Prefill], generators: Mapping[str, PromptGenerator], device: torch.device) -> Plan:
    """The plan of a step.

    Args:
        prefills (`Iterable[Prefill]`): The requests with slots.
        generators (`Mapping[str, PromptGenerator]`): The adapters by key.
        device (`torch.device`): The device of the flat batch.
    """
    plan = Plan()
    alike: dict[tuple, dict[str, list[Prefill]]] = {}
    for request in prefills:
        placed = request.placed
        if request.done > max(placed.slots):
            continue  # the slots are in the cache
        if complaint := check(request, generators):
            plan.failures[request.name] = complaint
            continue
        signature = generators[placed.key].signature
        alike.setdefault(signature, {}).setdefault(placed.key, []).append(request)
    groups = list(alike.values())
    numbers = iter(copy_once([tensor for of_adapters in groups for tensor in gather(of_adapters)], device))
    plan.rows = [arrange_rows(of_adapters, generators, numbers) for of_adapters in groups]
    return plan


def check(request: Prefill, generators: Mapping[str, PromptGenerator]) -> str | None:
    """A complaint if the adapter is not loaded, or the instruction and the slots are not all in this step."""
    placed = request.placed
    if placed.key not in generators:
        return f"The adapter of request {request.name} is not loaded: it was unloaded before the request came."
    if request.done > 0 or request.length < placed.end:
        return (
            f"Request {request.name} has its instruction and slots among the first {placed.end} tokens of its prompt, but {request.done} "
            f"of them are in the cache and {request.length} are computed now: instance prompts need all of them at once."
        )
    return None


def gather(of_adapters: Mapping[str, list[Prefill]]) -> list[torch.Tensor]:
    """The numbers of [`arrange_rows`], on the host."""
    requests = [request for each in of_adapters.values() for request in each]
    n = max(request.placed.num_read for request in requests)
    texts = [request.placed.text for request in requests]
    padded = [text + text[:1] * (n - len(text)) for text in texts]
    columns = [[request.row + at for at in text] for request, text in zip(requests, padded)]
    ids = [[request.token_ids[at] for at in text] for request, text in zip(requests, padded)]
    slots = [
        (request.row + at, number, vector)
        for number, request in enumerate(requests)
        for at, vector in zip(request.placed.slots, request.placed.vectors)
    ]
    return [
        torch.tensor([columns, ids]),  # (2, G, n)
        torch.tensor([len(text) for text in texts]),  # (G,)
        torch.tensor(slots).T,  # (3, K)
        torch.arange(len(requests)),  # (G,)
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
    of_adapters: Mapping[str, list[Prefill]],
    generators: Mapping[str, PromptGenerator],
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
    names = [request.name for each in of_adapters.values() for request in each]
    return Rows(names, group, selection, ids, rows, instance, vector)
