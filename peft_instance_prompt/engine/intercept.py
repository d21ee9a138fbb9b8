# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Look at generated vectors or replace them, without a change to model or adapter. The tools are built on this."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from ..generator import InstanceGenerator, Instances
from .request import noted, notes
from .slots import Layout
from .tokens import InstanceTokens


@dataclass(frozen=True)
class Generated:
    """Vectors generated for G instances of one adapter, or of several that ran together; l slots each.

    Attributes:
        values (`torch.Tensor`): Shape (G, l, d), the prompt vectors of one depth; or (G, ...), the output of the method's `encode`,
            on which the places of the slots and the prompt vectors may depend.
        depth (`int`, *optional*): The layer, or `INPUT`; None for the output of `encode`.
        generators (`list[InstanceGenerator]`): The generator; in a mixed batch, those that ran together.
        rows (`torch.LongTensor`, *optional*): Shape (G,). The instances' rows in the batch, or sequences in a packed batch. None: all.
        instances (`Instances`, *optional*): The input of the generator.
        selection (`InstanceTokens`, *optional*): Where the instances' tokens stand: among the stack's positions, or at `INPUT` in the text.
        layout (`Layout`, *optional*): Where slots and tokens of the batch stand.
    """

    values: torch.Tensor
    depth: int | None
    generators: list[InstanceGenerator]
    rows: torch.Tensor | None = None
    instances: Instances | None = None
    selection: InstanceTokens | None = None
    layout: Layout | None = None


Interceptor = Callable[[Generated], "torch.Tensor | None"]


def intercept(function: Interceptor) -> AbstractContextManager[None]:
    """Call `function` with all vectors that models generate within the context, in this thread.

    Interceptors nest: the inner one is called first, and the outer one gets what the inner one returned.

    Args:
        function (`Callable`): Takes a [`Generated`]; returns a tensor of the shape of its `values`, to be used
            instead, or None to leave them.

    Example:

    ```py
    >>> seen = {}
    >>> with intercept(lambda made: seen.__setitem__(made.depth, made.values)):
    ...     model(**batch)
    >>> seen[0].shape  # the vectors before layer 0: (batch, num_virtual_tokens, hidden size)
    ```
    """
    return noted(interceptor=function)


Values = TypeVar("Values", torch.Tensor, torch.Tensor | None)


def intercepted(values: Values, **fields: Any) -> Values:
    """`values`, or what the interceptors put in their place; `fields` are the other fields of [`Generated`]."""
    functions = [entry.interceptor for entry in reversed(notes.get()) if entry.interceptor is not None]
    if not functions or values is None:
        return values
    made = Generated(values, **fields)
    for function in functions:
        changed = function(made)
        made = made if changed is None else replace(made, values=changed)
    return made.values
