# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The plan of one step: which rows of the flat batch are whose instruction and slots.

The flat batch of a step holds the tokens of all its requests one behind the other, without padding: new prompts, and one token of each
request in decoding. The plan holds the requests in prefill only.

Shapes: T rows of the flat batch, G instances of up to n instruction tokens, l prompt vectors each, K slots in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..engine.batch import Group
from ..engine.instances import InstanceTokens
from ..generator import PromptGenerator


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
        group (`Group`): The adapters.
        selection (`InstanceTokens`): The instances among the rows of the flat batch.
        token_ids (`torch.LongTensor`): Shape (G, n). The instruction's tokens.
        rows (`torch.LongTensor`): Shape (K,). The slots' rows.
        instance (`torch.LongTensor`): Shape (K,). The instance of each slot.
        vector (`torch.LongTensor`): Shape (K,). The number of each slot's vector among the l.
        written (`list[int]`): The depths at which vectors were written.
    """

    group: Group
    selection: InstanceTokens
    token_ids: torch.Tensor
    rows: torch.Tensor
    instance: torch.Tensor
    vector: torch.Tensor
    written: list[int] = field(default_factory=list)


def make_plan(
    prefills: Iterable[Prefill], generators: Mapping[str, PromptGenerator], device: torch.device
) -> list[Rows]:
    """The plan of a step; empty if the step has no slots to write.

    Args:
        prefills (`Iterable[Prefill]`): The requests with slots.
        generators (`Mapping[str, PromptGenerator]`): The adapters by key.
        device (`torch.device`): The device of the flat batch.

    Raises:
        RuntimeError: A request's adapter is not loaded, or its instruction and slots are not all in this step. The front end
            admits no such request.
    """
    alike: dict[tuple, dict[str, list[Prefill]]] = {}
    for request in prefills:
        if request.done > max(request.placed.slots):
            continue  # the slots are in the cache
        check_whole(request, generators)
        signature = generators[request.placed.key].signature
        alike.setdefault(signature, {}).setdefault(request.placed.key, []).append(request)
    return [gather_rows(of_adapters, generators, device) for of_adapters in alike.values()]


def check_whole(request: Prefill, generators: Mapping[str, PromptGenerator]) -> None:
    """Raise a RuntimeError if the adapter is not loaded, or the instruction and the slots are not all in this step."""
    placed = request.placed
    if placed.key not in generators:
        raise RuntimeError(f"The adapter of request {request.name} is not loaded.")
    last = max(*placed.slots, *placed.text[-1:])
    if request.done > 0 or request.length <= last:
        raise RuntimeError(
            f"Request {request.name} has its instruction and slots among the first {last + 1} tokens of its prompt, but {request.done} "
            f"of them are in the cache and {request.length} are computed now: instance prompts need all of them at once."
        )


def gather_rows(
    of_adapters: Mapping[str, list[Prefill]], generators: Mapping[str, PromptGenerator], device: torch.device
) -> Rows:
    """The rows of requests whose adapters have the same signature, adapter by adapter."""
    requests = [request for each in of_adapters.values() for request in each]

    def tensor(values: list) -> torch.Tensor:
        return torch.tensor(values, device=device)

    counts = tensor([request.placed.num_read for request in requests])  # (G,)
    n = max(request.placed.num_read for request in requests)
    mask = torch.arange(n, device=device) < counts[:, None]  # (G, n)
    texts = [request.placed.text for request in requests]
    columns = [[r.row + at for at in text] + [r.row + text[0]] * (n - len(text)) for r, text in zip(requests, texts)]
    ids = [
        [r.token_ids[at] for at in text] + [r.token_ids[text[0]]] * (n - len(text)) for r, text in zip(requests, texts)
    ]
    index = tensor(columns)  # (G, n)
    last = index.gather(1, counts[:, None] - 1)[:, 0]  # (G,)
    selection = InstanceTokens(mask, index[:, 0], last, torch.zeros_like(last), index)

    rows_of: list[list[int]] = []
    for each in of_adapters.values():
        start = sum(map(len, rows_of))
        rows_of.append(list(range(start, start + len(each))))
    own = [generators[key] for key in of_adapters]
    group = Group(own) if len(own) == 1 else Group.of(own, rows_of, len(requests), device)
    slots = [
        (r.row + at, g, vector) for g, r in enumerate(requests) for at, vector in zip(r.placed.slots, r.placed.vectors)
    ]
    rows, instance, vector = tensor(slots).unbind(1)  # (K,) each
    return Rows(group, selection, tensor(ids), rows, instance, vector)
