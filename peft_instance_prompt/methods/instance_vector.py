# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The instance vector that IDPG and dynamic prompting read: the fields of their configs, the sources of the vector, and checks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Optional

import torch

from ..checks import check_choice, check_int
from ..config import InstancePromptConfig
from ..engine.stack import StackInfo
from ..generator import Source
from ..nn.pooling import first_token, last_token, mean_pool


# From states (G, n, d) and their mask (G, n) to vectors (G, d).
Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
POOLINGS: dict[str, Pool] = {"first": first_token, "last": last_token, "mean": mean_pool}


@dataclass
class InstanceVectorConfig(InstancePromptConfig):
    """Base class of the configs of methods that read a vector of the instance.

    Args:
        instance_source (`str`): Where the vector comes from. `"frozen"`, the default: pooled last hidden states of a plain pass of
            the base model, without prompts, gradient and dropout. `"embeddings"`: the mean of the input embeddings, which costs
            next to nothing. `"instance_embeds"`: the argument of this name of `forward` and `generate`.
        instance_embeds_dim (`int`, *optional*): The width of `instance_embeds`, for `instance_source="instance_embeds"`.

    Raises:
        ValueError: `instance_embeds_dim` is set without `instance_source="instance_embeds"`, or missing with it.
    """

    instance_source: Literal["frozen", "embeddings", "instance_embeds"] = "frozen"
    instance_embeds_dim: Optional[int] = None

    def _check_fields(self) -> None:
        super()._check_fields()
        check_choice(self, "instance_source", ("frozen", "embeddings", "instance_embeds"))
        check_int(self, "instance_embeds_dim", minimum=1, optional=True)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if (self.instance_source == "instance_embeds") != (self.instance_embeds_dim is not None):
            raise ValueError(
                "`instance_embeds_dim` must be the width of the given vectors with `instance_source='instance_embeds'` and "
                f"None otherwise, got {self.instance_embeds_dim!r} with {self.instance_source!r}."
            )


def vector_width(config: InstanceVectorConfig, info: StackInfo) -> int:
    """The width k of the vector."""
    widths = {"frozen": info.output_size, "embeddings": info.embedding_size}
    return widths.get(config.instance_source, config.instance_embeds_dim)


def find_pooling(name: str, info: StackInfo) -> Pool:
    """The pooling of a name in `POOLINGS`.

    `"auto"` is the last token in a causal model, the mean in the encoder of an encoder-decoder model, otherwise the first token.
    """
    auto = "last" if info.causal else "mean" if info.encoder_of_pair else "first"
    return POOLINGS[auto if name == "auto" else name]


def instance_vector(config: InstanceVectorConfig, source: Source, pool: Pool = mean_pool) -> torch.Tensor:
    """The vector (G, k) of each instance, without gradient to the base model.

    Args:
        config (`InstanceVectorConfig`): The config.
        source (`Source`): The input of the generator's `encode`.
        pool (`Callable`): Pools the plain pass's last hidden states. Defaults to the mean.

    Raises:
        ValueError: `instance_embeds` is missing or has a shape other than (G, k).
    """
    kind = config.instance_source
    if kind == "instance_embeds":
        given = check_instance_embeds(source.instance_embeds, len(source.mask), config.instance_embeds_dim)
        return given.to(source.embeds)  # (G, k)
    if source.instance_embeds is not None:
        warnings.warn(
            f"`instance_embeds` are not used by this {type(config).__name__.removesuffix('Config')} adapter, whose "
            f"`instance_source` is {kind!r}."
        )
    if kind == "embeddings":
        return mean_pool(source.embeds, source.mask).detach()  # (G, e)
    return pool(source.frozen_states(), source.mask)  # (G, d)


def check_instance_embeds(given: torch.Tensor | None, num_instances: int, width: int) -> torch.Tensor:
    """`instance_embeds`, checked.

    Args:
        given (`torch.Tensor`, *optional*): The argument of the call, floats of shape (G, k).
        num_instances (`int`): The number G of instances.
        width (`int`): The width k.

    Raises:
        ValueError: `instance_embeds` is missing or has a shape other than (G, k).
    """
    if given is None:
        raise ValueError(
            f"This adapter needs `instance_embeds`, a tensor of shape {(num_instances, width)}: pass it to `forward` and "
            "`generate` beside `input_ids`."
        )
    if tuple(given.shape) != (num_instances, width):
        raise ValueError(
            f"`instance_embeds` must have the shape (batch, `instance_embeds_dim`), {(num_instances, width)}, got "
            f"{tuple(given.shape)}."
        )
    return given
