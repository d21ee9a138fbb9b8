# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Late prompts: they enter at the input of one layer and stay in the residual stream; the layers below run as if there were none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from ..checks import check_int
from ..engine.stack import StackInfo
from ..generator import PromptGenerator
from .bottleneck import BottleneckConfig


@dataclass
class LatePromptConfig(BottleneckConfig):
    """Base class of the configs of methods with late prompts.

    Args:
        insertion_layer (`int`, *optional*): The layer k, counted from 0, at whose input the prompt enters. Defaults to half
            the number of layers. With 0 its slots take positions and shift those of the tokens; otherwise the tokens keep the
            positions that they have in the base model.

    Raises:
        ValueError: `layers_to_transform` is set, which late prompts do not have.
    """

    insertion_layer: Optional[int] = None

    def _check_fields(self) -> None:
        super()._check_fields()
        check_int(self, "insertion_layer", minimum=0, optional=True)
        if self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` must be None, as late prompts enter at one layer, `insertion_layer`; got "
                f"{self.layers_to_transform!r}."
            )


class LatePromptGenerator(PromptGenerator):
    """Base class of the generators of late prompts. Its one depth is the layer k, the first layer that sees the slots."""

    feeds_constant = False

    def __init__(self, config: Any, info: StackInfo):
        layer = insertion_layer(config, info)
        super().__init__(config, info, depths=[layer])
        self.first_visible_layer = layer

    @classmethod
    def check(cls, config: Any, info: StackInfo) -> None:
        """Raise a ValueError if there is no such layer, or if the slots would change what the layers below it compute."""
        start = insertion_layer(config, info)
        if start >= info.num_layers:
            raise ValueError(
                f"`insertion_layer` must lie in 0..{info.num_layers - 1} for {info.layers_name!r}, got "
                f"{config.insertion_layer}."
            )
        if below := [number for number in info.recurrent_layers if number < start]:
            raise ValueError(
                f"Late prompts cannot be hidden from the layers {below} of {info.layers_name!r}, which have a state and no "
                f"attention: choose an `insertion_layer` that is not above them, got {start}, or a different method."
            )
        if start > 0 and info.twin_layers is not None:
            raise ValueError(
                f"Late prompts cannot be hidden from the first layers of {info.name!r}, which runs those of {info.layers_name!r} and "
                f"of {info.twin_layers!r} in turns: set `insertion_layer` to 0, got {start}, or choose another method."
            )
        if start > 0 and info.causal and info.absolute_column_positions:
            raise ValueError(
                f"`insertion_layer` must be 0 in {info.layers_name!r}, got {start}: its learned positions are those of the columns, "
                "so the slots would shift the text's positions in the layers below, which must run as if there were no prompt."
            )
        if start > 0 and info.distance_by_column and config.prompt_position != "before":
            raise ValueError(
                f"`prompt_position` must be 'before' for late prompts in {info.layers_name!r}, got {config.prompt_position!r}: it "
                "measures distances by column, so slots among the tokens would change these distances in the layers below, which "
                "must run as if there were no prompt."
            )


def insertion_layer(config: Any, info: StackInfo) -> int:
    """The layer at whose input the prompt enters: the config's, or the middle one."""
    return info.num_layers // 2 if config.insertion_layer is None else config.insertion_layer
