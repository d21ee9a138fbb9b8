# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Weights that DeepSpeed's ZeRO-3 has sharded. It does so while transformers loads a model, before an adapter is attached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


def num_elements(parameter: nn.Parameter) -> int:
    """The number of elements of a whole parameter. A sharded one is empty until its module runs."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather sharded parameters while the block runs, in all processes at once."""
    apart = [parameter for parameter in parameters if hasattr(parameter, "ds_numel")]
    if not apart:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(apart):
        yield
