# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`task_ids`, the task of each row, for an adapter that serves several tasks. PEFT's multitask prompt tuning has the same argument."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from peft import peft_model

from .config import InstanceConfig
from .engine.request import note


def check_task_ids(given: torch.Tensor | None, num_instances: int, num_tasks: int) -> torch.Tensor:
    """`task_ids` as int64 (G,).

    Args:
        given (`torch.Tensor`, *optional*): The argument of the call, integers of shape (G,).
        num_instances (`int`): The number G of instances.
        num_tasks (`int`): The number T of tasks, counted from 0.

    Raises:
        ValueError: `task_ids` is missing, has a shape other than (G,), or holds an id outside 0..T - 1.
    """
    if given is None:
        raise ValueError(
            f"This adapter needs `task_ids`, integers of shape {(num_instances,)} from 0 to {num_tasks - 1} (`num_tasks` "
            f"{num_tasks}): pass them to `forward` and `generate` beside `input_ids`. With transformers' `Trainer`, a column "
            "`task_ids` reaches the model with `remove_unused_columns=False`."
        )
    if tuple(given.shape) != (num_instances,):
        raise ValueError(f"`task_ids` must have the shape (batch,), {(num_instances,)}, got {tuple(given.shape)}.")
    outside = (given < 0) | (given >= num_tasks)  # (G,)
    if bool(outside.any()):
        raise ValueError(
            f"`task_ids` must lie in 0..{num_tasks - 1}, as the adapter has `num_tasks` {num_tasks}, got "
            f"{sorted(set(given[outside].tolist()))}."
        )
    return given.long()


def carry_task_ids() -> None:
    """Make the forward of PEFT's models note `task_ids` in the request, if the active adapter is this package's.

    PEFT's models declare this argument, and pass it to PEFT's own method only.
    """
    for cls in vars(peft_model).values():
        forward = vars(cls).get("forward") if isinstance(cls, type) and issubclass(cls, peft_model.PeftModel) else None
        if forward is not None and "task_ids" in inspect.signature(forward).parameters:
            setattr(cls, "forward", _carried(forward))


def _carried(forward: Any) -> Any:
    place = list(inspect.signature(forward).parameters).index("task_ids") - 1  # without `self`

    @functools.wraps(forward)
    def carried(self: Any, *args: Any, **kwargs: Any) -> Any:
        task_ids = args[place] if len(args) > place else kwargs.get("task_ids")
        if task_ids is None or not isinstance(self.active_peft_config, InstanceConfig):
            return forward(self, *args, **kwargs)
        if len(args) > place:
            args = (*args[:place], None, *args[place + 1 :])
        else:
            del kwargs["task_ids"]
        with note(self.get_base_model(), task_ids=task_ids):
            return forward(self, *args, **kwargs)

    return carried
