# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ...generator import INPUT, Instances, Placement, PromptGenerator, Source, Weights, chosen_layers
from ...nn.init import fan_in_uniform
from ...nn.pooling import rms_norm
from .encoders import ENCODERS, Table


if TYPE_CHECKING:
    from ...engine.stack import StackInfo
    from .config import IPTConfig


# A full table of a vocabulary of this size is more than most people expect of an adapter.
LARGE_VOCABULARY = 50_000


class IPTGenerator(PromptGenerator):
    """The generator of IPT (https://arxiv.org/abs/2206.01958).

    With E the table and x_1..x_T the first instruction tokens, the instance's part S (P, w) is `E[x_1]..E[x_P]`, or
    `W encoder(E[x_1]..E[x_T]) + b`. The prompt at the input is S (plus a task prompt); in the deep host it is a task prompt
    at every layer, plus 0.05 S at the first.

    Attributes:
        table (`Table`, *optional*): The table. None if the base model's embeddings are read, or a constant is.
        gate (`nn.Parameter`): Shape (1, 1, w). The factor of the looked-up vectors; none with `init_weights="paper"`.
        encoder_... (`nn.Parameter`): The parameters of the encoder, see `encoders.py`.
        out, out_bias (`nn.Parameter`): Shapes (1, f, P*w) and (1, 1, P*w): W and b behind the encoder.
        task (`nn.Parameter`): Shape (D, P, w). The task prompts.
        constant (`nn.Parameter`): Shape (1, T, w). With `condition="constant"`: in place of the looked-up vectors.
    """

    feeds_constant = False
    table: Table | None

    def __init__(self, config: IPTConfig, info: StackInfo):
        deep, P = config.host == "deep", config.num_virtual_tokens
        layers = sorted(chosen_layers(config, info))
        super().__init__(config, info, depths=(layers if config.task_prompt else layers[:1]) if deep else [INPUT])
        width = info.hidden_size if deep else info.embedding_size
        self.scale = config.instance_scale if deep else 1.0
        self.looks_up = config.strategy == "lookup"
        self.num_read = P if self.looks_up else config.max_instance_tokens
        read_width = width if self.looks_up else info.embedding_size

        self.table = None
        if self.constant_condition:
            self.constant = nn.Parameter(torch.empty(1, self.num_read, read_width).uniform_(-0.5, 0.5))
        elif config.trainable or config.init != "embeddings":
            assert config.table_rank != "auto"  # the config has replaced it by a number or None
            self.table = Table(info.vocab_size, read_width, config.table_rank, config.trainable)
        last = []
        if not self.looks_up:
            self.encoder = ENCODERS[config.encoder]
            for name, parameter in self.encoder.parameters(read_width, config.bottleneck_dim).items():
                self.register_parameter(name, parameter)
            self.dropout = nn.Dropout(config.dropout)
            f = self.encoder.features_per_unit * config.bottleneck_dim
            self.out, self.out_bias = fan_in_uniform(1, f, P * width), fan_in_uniform(1, 1, P * width, fan_in=f)
            last = [self.out, self.out_bias]
        elif not self.paper:
            # The zero at the start is a gate behind the table: a table of zeros would be the same for all tokens.
            self.gate = nn.Parameter(torch.zeros(1, 1, width))
            last = [self.gate]
        if config.task_prompt:
            self.task = nn.Parameter(torch.zeros(len(self.depths), P, width))

        self.zero_at_start(*last)
        tasks = [self.task] if config.task_prompt else []
        if self.paper:
            for task in tasks:
                nn.init.normal_(task) if deep else nn.init.uniform_(task, -0.5, 0.5)
        elif config.init_weights is False:
            for parameter in last + tasks:
                nn.init.normal_(parameter, std=0.3)

    @classmethod
    def check(cls, config: IPTConfig, info: StackInfo) -> None:
        width = info.hidden_size if config.host == "deep" else info.embedding_size
        if config.init == "embeddings" and config.strategy == "lookup" and width != info.embedding_size:
            raise ValueError(
                f"`init='embeddings'` needs prompt vectors as wide as the embeddings of {info.layers_name!r}, which have "
                f"{info.embedding_size} and not {width}; use `host='prompt'` or another `init`."
            )
        if config.condition == "constant":
            return
        copied = config.trainable or config.init != "embeddings"
        if copied and config.table_rank is None and info.vocab_size >= LARGE_VOCABULARY:
            table_width = width if config.strategy == "lookup" else info.embedding_size
            warnings.warn(
                f"The full table of this IPT adapter has {info.vocab_size * table_width:,} parameters, for a vocabulary of "
                f"{info.vocab_size:,}. Set `table_rank`, e.g. 64, for {64 * (info.vocab_size + table_width):,}."
            )
        if config.init_file is not None:
            with torch.device("meta"):
                wanted = cls(config, info)._pretrained()
            check_file(config.init_file, wanted)

    def _pretrained(self) -> dict[str, torch.Tensor]:
        """The tensors that an `init_file` holds."""
        return {name: x for name, x in self.state_dict().items() if name.startswith(("table.", "encoder_"))}

    @torch.no_grad()
    def begin(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.constant_condition:
            return
        if self.config.init_file is not None:
            loaded = load_file(self.config.init_file)
            for name, tensor in self._pretrained().items():
                tensor.copy_(loaded[name])
        elif self.config.init == "embeddings" and self.table is not None:
            self.table.weight.copy_(embed(torch.arange(len(self.table.weight))))

    def encode(self, source: Source) -> torch.Tensor | None:
        if source.instance_embeds is not None:
            warnings.warn("`instance_embeds` are not used by IPT adapters, which make the prompt from the tokens.")
        if self.constant_condition:
            return None
        order = (
            (~source.mask).int().argsort(dim=1, stable=True)[:, : self.num_read]
        )  # (G, T), instruction tokens first
        if self.table is None:
            vectors = source.embeds.detach().gather(1, order[..., None].expand(-1, -1, source.embeds.shape[-1]))
        else:
            if source.token_ids is None:
                raise ValueError(
                    "IPT looks the prompt up by token ids, but the model got `inputs_embeds`; pass `input_ids`, or use "
                    "`init='embeddings'` with `trainable=False`."
                )
            ids = source.token_ids.gather(1, order)  # (G, T)
            if (highest := int(ids.max())) >= len(self.table.weight):
                raise ValueError(
                    f"The table of this IPT adapter has {len(self.table.weight)} rows, but the text has the token id "
                    f"{highest}: the vocabulary has grown since the adapter was made."
                )
            vectors = self.table(ids.to(self.table.weight.device))  # (G, T, w)
        counts = source.mask.sum(dim=1, keepdim=True)  # (G, 1)
        counted = torch.arange(order.shape[1], device=counts.device) < counts  # (G, T)
        vectors = vectors.masked_fill(~counted[..., None].to(vectors.device), 0.0)
        if self.looks_up:  # a batch of short instructions
            vectors = nn.functional.pad(vectors, (0, 0, 0, self.num_read - vectors.shape[1]))  # (G, P, w)
        return vectors

    def place(self, mask: torch.Tensor, vector: torch.Tensor | None) -> Placement:
        placement = super().place(mask, vector)
        if not self.looks_up or self.constant_condition or self.config.task_prompt:
            return placement
        slot = torch.arange(self.num_slots, device=mask.device)  # (P,)
        return placement._replace(live=slot < mask.sum(dim=1, keepdim=True))  # (G, P)

    def rows_at(self, depth: int) -> dict[str, int]:
        rows = {name: 0 for name, _ in self.named_parameters(recurse=False)} if depth == self.depths[0] else {}
        return {**rows, "task": self.depths.index(depth)} if self.config.task_prompt else rows

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        if depth != self.depths[0]:
            return weights["task"]  # (P, w) or (G, P, w)
        generated = self.scale * self._instance_part(instances, weights)  # (G, P, w)
        return weights["task"] + generated if self.config.task_prompt else generated

    def _instance_part(self, instances: Instances, weights: Weights) -> torch.Tensor:
        """S, (G, P, w)."""
        counts = instances.mask.sum(dim=1)  # (G,)
        if self.constant_condition:
            vectors = weights["constant"].expand(len(counts), -1, -1)  # (G, T, w)
            counts = torch.full_like(counts, self.num_read)
        else:
            vectors = instances.vector  # (G, T, w)
            counts = counts.clamp(max=vectors.shape[1])  # (G,), those that were read
        vectors = vectors if self.paper else rms_norm(vectors)
        if self.looks_up:
            return vectors if self.paper else vectors * weights["gate"]  # (G, P, w)
        features = self.encoder.run(vectors.to(weights["out"].dtype), counts, weights)  # (G, 1, f)
        prompts = self.dropout(features) @ weights["out"] + weights["out_bias"]  # (G, 1, P * w)
        return prompts.unflatten(-1, (self.num_slots, -1)).flatten(1, 2)  # (G, P, w)


def check_file(file: str, wanted: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError if a safetensors file cannot be read or does not hold tensors of the wanted names and shapes."""
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"`init_file` {str(file)!r} is not a readable safetensors file: {error}.") from error
    wrong = {n: (tuple(x.shape), found.get(n)) for n, x in wanted.items() if found.get(n) != tuple(x.shape)}
    if wrong:
        raise ValueError(
            f"`init_file` {str(file)!r} does not fit this adapter. Tensors, as wanted and as found: "
            + ", ".join(f"{name} {want} {have}" for name, (want, have) in wrong.items())
            + "."
        )
