# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Prompts that enter at one layer and stay in the stream from there on; the layers below run as if there were none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from ..checks import check_int
from ..config import InstancePromptConfig
from ..generator import PromptGenerator


if TYPE_CHECKING:
    from ..engine.stack import StackInfo


@dataclass
class LatePromptConfig(InstancePromptConfig):
    """Base class of the configs of methods with late prompts.

    Args:
        insertion_layer (`int`, *optional*): The layer k, counted from 0, at whose input the prompt enters. Defaults to half
            the number of layers. With 0 it enters at the first layer: then its positions are counted and the tokens' move;
            otherwise the tokens keep the positions of the base model.
    """

    insertion_layer: Optional[int] = field(
        default=None, metadata={"help": "The layer at whose input the prompt enters; None for the middle."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_int(self, "insertion_layer", minimum=0, optional=True)
        if self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` must be None, as late prompts enter at one layer, `insertion_layer`; got "
                f"{self.layers_to_transform!r}."
            )


class LatePromptGenerator(PromptGenerator):
    """Base class of the generators of late prompts: it has one depth, the layer k, which is the first that sees the slots."""

    feeds_constant = False

    def __init__(self, config: Any, info: StackInfo):
        layer = insertion_layer(config, info)
        super().__init__(config, info, depths=[layer])
        self.first_visible_layer = layer

    @classmethod
    def check(cls, config: Any, info: StackInfo) -> None:
        """Refuse a layer that is not there, and what would let the layers below k notice the slots."""
        start = insertion_layer(config, info)
        if start >= info.num_layers:
            raise ValueError(
                f"`insertion_layer` must lie in 0..{info.num_layers - 1} for {info.layers_name!r}, got "
                f"{config.insertion_layer}."
            )
        if below := [number for number in info.recurrent_layers if number < start]:
            raise ValueError(
                f"Late prompts cannot be hidden from the layers {below} of {info.layers_name!r}, which have a state and no "
                f"attention: choose an `insertion_layer` that is not above them, got {start}, or another method."
            )
        if start > 0 and info.causal and info.numbers_columns:
            raise ValueError(
                f"`insertion_layer` must be 0 in {info.layers_name!r}, got {start}: it gives each column of its input a learned "
                "position, so the slots would move the text in the layers below, which are to run as if there were no prompt."
            )
        if start > 0 and info.counts_columns and config.prompt_position != "before":
            raise ValueError(
                f"`prompt_position` must be 'before' for late prompts in {info.layers_name!r}, got {config.prompt_position!r}: it "
                "reads distances off the columns of its input, so slots that stand among the tokens would move these in the layers "
                "below, which are to run as if there were no prompt."
            )


def insertion_layer(config: Any, info: StackInfo) -> int:
    """The layer at which the prompt enters; by default the middle."""
    return info.num_layers // 2 if config.insertion_layer is None else config.insertion_layer
