# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Look at the choices for each instance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ...engine.intercept import Generated, intercept
from .generator import Choices, DynamicPromptGenerator


@contextmanager
def record_choices() -> Iterator[list[Choices]]:
    """Collect the choices of dynamic prompts inside the context, in this thread.

    Gives a list to which each forward pass that generates prompts adds a [`Choices`] per adapter that has something to choose; in
    `generate` with a cache that is the pass over the prompt.

    Example:

    ```py
    >>> with record_choices() as record:
    ...     model(**batch)
    >>> record[0].positions
    tensor([3, 0, 20, 3])
    ```
    """
    record: list[Choices] = []

    def note(made: Generated) -> None:
        generator = made.generators[0]
        if made.depth is None and isinstance(generator, DynamicPromptGenerator):
            record.append(generator.choices(made.values, made.rows))

    with intercept(note):
        yield record
