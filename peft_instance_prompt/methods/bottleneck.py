# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Generators with a bottleneck: the field `down_factor` of their configs, with which one learning rate suits both matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from torch import nn

from ..checks import check_number
from ..config import InstancePromptConfig
from ..engine.stack import StackInfo
from ..nn.init import slower_down


@dataclass
class BottleneckConfig(InstancePromptConfig):
    """Base class of the configs of methods whose generator is a bottleneck: a down-projection to the width m, then an up-projection.

    Args:
        down_factor (`float`, *optional*): The factor f of the down-projection. Its weights are stored divided by f and multiplied
            by f when they are read, so that the projection moves f times as far under an optimizer that moves all weights alike,
            as Adam does. Each of its outputs sums over the width d of the model, each of the up-projection's over m, so that one
            learning rate without f is too high for the one or too low for the other. It changes neither the start nor the
            form. Defaults to 1, which leaves it out. `None`, the default of IAPT alone, is filled in when the adapter is made: 2.4 m / d,
            at most 1; with `init_weights="paper"` 1.
    """

    old_defaults: ClassVar[dict[int, dict[str, Any]]] = {1: {"down_factor": 1.0}}

    down_factor: Optional[float] = 1.0

    def _fill_in(self) -> None:
        super()._fill_in()
        if self.down_factor is None and self.init_weights == "paper":
            self.down_factor = 1.0

    def _check_fields(self) -> None:
        super()._check_fields()
        if self.down_factor is not None:
            check_number(self, "down_factor", least=1e-4)

    def complete(self, model: nn.Module, infos: Sequence[StackInfo]) -> None:
        super().complete(model, infos)
        self.down_factor = self.factor_of(infos[0].hidden_size)

    def factor_of(self, width: int) -> float:
        """The factor of a down-projection from states of a width: the config's, or the default for this width."""
        return slower_down(self.bottleneck_dim, width) if self.down_factor is None else self.down_factor
