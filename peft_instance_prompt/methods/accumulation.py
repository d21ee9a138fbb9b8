# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Methods that write at every layer: the field of their configs that says whether vectors replace the states in the slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from torch import nn

from ..checks import check_choice
from ..config import InstancePromptConfig
from ..engine.stack import StackInfo


@dataclass
class AccumulatingConfig(InstancePromptConfig):
    """Base class of the configs of methods whose vectors can be added to the states in the slots, between the layers.

    Args:
        accumulate (`bool`, *optional*): Whether the prompt vectors of a layer are added to the states in the slots, which then read
            the text through the model's own attention, or replace them, the paper's form. At the first layer with prompts they
            replace them in both. Filled in when the adapter is made: `True` in encoders and with `prompt_position="end"`; `False`
            where slots stand before a causal text, of which they can read nothing, and with `init_weights="paper"`.

    Raises:
        ValueError: `accumulate` is `True` with `init_weights="paper"`.
    """

    old_defaults: ClassVar[dict[int, dict[str, Any]]] = {1: {"accumulate": False}}

    accumulate: Optional[bool] = None

    def _fill_in(self) -> None:
        super()._fill_in()
        if self.accumulate is None and self.init_weights == "paper":
            self.accumulate = False

    def _check_fields(self) -> None:
        super()._check_fields()
        check_choice(self, "accumulate", (None, True, False))

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.init_weights == "paper" and self.accumulate:
            raise ValueError(
                "`accumulate` must be False or None with `init_weights='paper'`, the paper's form, got True."
            )

    def complete(self, model: nn.Module, infos: Sequence[StackInfo]) -> None:
        super().complete(model, infos)
        self.accumulate = self.accumulates(infos)

    def accumulates(self, infos: Sequence[StackInfo]) -> bool:
        """Whether prompt vectors are added to the states in the slots of these stacks."""
        if self.accumulate is None:
            return self.prompt_position == "end" or not any(info.causal for info in infos)
        return self.accumulate
