# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The choices that dynamic prompting makes for each instance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..engine.intercept import Generated, intercept
from ..methods.dynamic_prompt import Choices, DynamicPromptGenerator
from .inspection import active_generator


def learned_position(model: nn.Module) -> int | list[int]:
    """The likeliest number of prompt vectors behind the instance, from an adapter that learned its `position` per `"task"`.

    The second stage of `adap_pos_ins_vec` takes it as its fixed `position`.

    Args:
        model (`nn.Module`): The model with the adapter.

    Returns:
        `int` or `list[int]`: The number, 0 to l; with `num_tasks`, a list with the number of each task.

    Raises:
        ValueError: There is no active adapter of dynamic prompting with `position="task"`.

    Example:

    ```py
    >>> model = get_peft_model(base, DynamicPromptConfig.preset("adap_pos", task_type="CAUSAL_LM"))
    >>> train(model)
    >>> position, base = learned_position(model), model.unload()
    >>> config = DynamicPromptConfig.preset("adap_pos_ins_vec", position=position, task_type="CAUSAL_LM")
    >>> train(get_peft_model(base, config))
    ```
    """
    generator: Any = active_generator(model)[1]
    found = generator.config.position if isinstance(generator, DynamicPromptGenerator) else None
    if found != "task":
        raise ValueError(
            f"The active adapter must be dynamic prompting with `position='task'`, got {type(generator.config).__name__}"
            f" with `position` {found!r}."
        )
    return generator.logits["position"].argmax(dim=-1).tolist()


@contextmanager
def record_choices() -> Iterator[list[Choices]]:
    """Collect the choices of dynamic prompting inside the context, in this thread.

    Yields a list. Each forward pass that generates prompts (in `generate` with a cache, the prefill) adds a [`Choices`] for each
    adapter that has something to choose.

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
