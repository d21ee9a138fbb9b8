# Copyright 2026-present the peft_instance_prompt authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The rows of a batch by adapter: which of them run together, and how to pick them out and put them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from . import slots
from .generator import Instance, PromptGenerator, Ready, run_together
from .intercept import intercepted
from .scope import Request


@dataclass
class Group:
    """Rows whose adapters have one signature and are run together.

    Attributes:
        generators (`list[PromptGenerator]`): The adapters.
        rows_of (`list[torch.LongTensor]`, *optional*): The rows of the batch that each of them has; None if there is but
            one adapter and it has all of them.
        instance (`Instance`, *optional*): What is known of the rows.
    """

    generators: list[PromptGenerator]
    rows_of: list[torch.Tensor] | None = None
    instance: Instance | None = None

    def __post_init__(self):
        self.rows = None if self.rows_of is None else torch.cat(self.rows_of)  # (G,)
        self.ready = Ready.of(self.generators) if len(self.generators) > 1 else None
        names = ("depths", "adds", "num_slots", "visible_from")
        self.depths, self.adds, self.num_slots, self.visible_from = (getattr(self.generators[0], n) for n in names)

    def __iter__(self):
        return zip(self.generators, self.rows_of or [None])

    def run(self, states: torch.Tensor, depth: int, layout: slots.Layout) -> torch.Tensor:
        """The prompt vectors (G, l, d) of these rows, from the states (B, N, d) of the batch."""
        device = next(self.generators[0].parameters()).device  # layers can lie elsewhere than the adapter
        instance = Instance(*(None if value is None else value.to(device) for value in self.instance))
        each = [generator for generator, rows in self for _ in (range(1) if rows is None else rows)]
        prompts = run_together(each, pick(states, self.rows).to(device), instance, depth, self.ready)
        prompts = prompts.to(states.device, states.dtype)
        known = {"states": states, "instance": self.instance, "layout": layout}
        return intercepted(prompts, depth=depth, generators=self.generators, **known)


def pick(values: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor | None:
    return values if values is None or rows is None else values[rows.to(values.device)]


def put(whole: torch.Tensor, rows: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """`whole` (B, L, ...) with `values` (G, l, ...) in the last l columns of `rows`: dead slots come first."""
    if rows is None:
        return values.to(whole.dtype)
    columns = torch.arange(whole.shape[1] - values.shape[1], whole.shape[1], device=whole.device)
    return whole.index_put((rows.to(whole.device)[:, None], columns), values.to(whole.dtype))


def group_rows(
    generators: Mapping[str, PromptGenerator],
    active: Sequence[str],
    num_rows: int,
    request: Request,
    device: torch.device,
) -> list[Group]:
    """The rows of a batch by adapter; none if no adapter is to be used.

    Args:
        generators (`Mapping[str, PromptGenerator]`): The adapters by name.
        active (`Sequence[str]`): The names of the active adapters, for a request that names none.
        num_rows (`int`): B.
        request (`Request`): What the caller said.
        device (`torch.device`): Where the rows' numbers are to lie.

    Raises:
        ValueError: The request names adapters for another number of rows.
    """
    if request.adapter_names is None:
        return [Group([generators[name]]) for name in active if name in generators]
    repeats, rest = divmod(num_rows, len(request.adapter_names))  # in generate, a row may have become several beams
    if rest or (repeats != 1 and request.prompt_length is None):
        raise ValueError(
            f"`adapter_names` must name an adapter for each of the {num_rows} rows, got {len(request.adapter_names)}."
        )
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
        Group([generators[n] for n in names], [torch.tensor(rows_of[n], device=device) for n in names])
        for names in alike.values()
    ]
