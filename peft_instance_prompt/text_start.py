# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`init_text`: prompts that begin as the states of a text, for every method (after Cartridges, https://arxiv.org/abs/2506.06266)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .engine.stack import StackInfo


class TextStart(nn.Module):
    """The part of a generator that holds the states of `init_text`. Without a text it holds nothing.

    Let s (l, w) be the states of the text's tokens at a depth of the bare model. The prompt of this depth is `s + rms(s) * generated`,
    where other prompts begin with copies of the first token's state. The states are buffers: they are not trained, and they are saved
    with the adapter, so that loading needs no text.

    Attributes:
        from_text (`bool`): Whether there is a text.
        text (`torch.Tensor`): Shape (layers, l, d). The states at the layers, in their order.
        text_input (`torch.Tensor`): Shape (1, l, e). The input embeddings, if prompts stand there.
    """

    def add_text(self, config: Any, depths: Sequence[int], info: StackInfo) -> None:
        """Make buffers for the states of the config's `init_text`.

        Args:
            config (`InstancePromptConfig`): The adapter's config.
            depths (`Sequence[int]`): Where prompts are generated: layers, and -1 for the input embeddings.
            info (`StackInfo`): Facts about the stack.
        """
        self.from_text, self.text_depths = config.init_text is not None, tuple(depths)
        layers, l = [depth for depth in depths if depth >= 0], config.num_virtual_tokens
        if self.from_text and layers:
            self.register_buffer("text", torch.zeros(len(layers), l, info.hidden_size))
        if self.from_text and len(layers) < len(depths):
            self.register_buffer("text_input", torch.zeros(1, l, info.embedding_size))

    @torch.no_grad()
    def begin_from_text(self, states: Mapping[int, torch.Tensor]) -> None:
        """Fill the buffers.

        Args:
            states (`Mapping[int, torch.Tensor]`): By depth: the states (l, w) of the text's tokens.

        Raises:
            ValueError: A depth has no states, or states of a wrong shape.
        """
        for depth in self.text_depths:
            ((name, row),) = self.text_row(depth).items()
            own = self.get_buffer(name)[row]  # (l, w)
            if depth not in states:
                raise ValueError(
                    f"`init_text` must be None for this model: its layer {depth} does not run on a text alone, or runs without its "
                    "forward hooks, so that the text has no state there."
                )
            if own.shape != states[depth].shape:
                raise ValueError(
                    f"`init_text` must have states of shape {tuple(own.shape)} at depth {depth}, got {tuple(states[depth].shape)}: "
                    "leave it None for this model, or choose a method that writes to the input only."
                )
            own.copy_(states[depth])

    def text_row(self, depth: int) -> dict[str, int]:
        """The name of the buffer with the states of a depth, and their index in it; empty without a text."""
        if not self.from_text:
            return {}
        layers = [number for number in self.text_depths if number >= 0]
        return {"text_input": 0} if depth < 0 else {"text": layers.index(depth)}

    def text_state(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The text's states among the tensors of a depth: (l, w), or (G, l, w) for several adapters; None without a text."""
        return weights.get("text", weights.get("text_input"))


def repeat_to(ids: Iterable[int], length: int) -> list[int]:
    """The ids of a text, repeated or cut to `length` of them, as in PEFT's prompt tuning."""
    ids = list(ids)
    return (ids * -(-length // len(ids)))[:length]
