# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Look at what was chosen for each instance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choices:
    """What one adapter chose for its rows of one forward pass. G rows, l prompt vectors, k prompts in the pool.

    Attributes:
        rows (`torch.LongTensor`): Shape (G,). Which rows of the batch these are.
        positions (`torch.LongTensor`, *optional*): Shape (G,). How many of the l prompt vectors stand behind the instance.
        lengths (`torch.LongTensor`, *optional*): Shape (G,). How many of them are used.
        mixture (`torch.Tensor`, *optional*): Shape (G, k). The weights of the prompts that are mixed.
    """

    rows: torch.Tensor
    positions: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    mixture: torch.Tensor | None = None


# A context variable, so that threads that share a model do not see each other's.
_record: ContextVar[list[Choices] | None] = ContextVar("instance_prompt_choices", default=None)


@contextmanager
def record_choices() -> Iterator[list[Choices]]:
    """Collect what dynamic prompts choose inside the context, in this thread.

    Gives a list to which each forward pass that generates prompts adds a [`Choices`] per adapter; in `generate` with a
    cache that is the pass over the prompt.

    Example:

    ```py
    >>> with record_choices() as record:
    ...     model(**batch)
    >>> record[0].positions
    tensor([3, 0, 20, 3])
    ```
    """
    record: list[Choices] = []
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)


def note_choices(choices: Choices) -> None:
    """Add to the record, if one is kept."""
    record = _record.get()
    if record is not None:
        record.append(choices)
