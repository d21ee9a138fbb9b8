# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import warnings

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ...generator import INPUT, Instance, PromptGenerator, Source, anchored
from ...nn.pooling import rms_norm
from ...stack import StackInfo
from .config import IPTConfig
from .encoders import ENCODERS, Table


# A full table of a vocabulary of this size is more than most people expect of an adapter.
LARGE_VOCABULARY = 50_000


class IPTGenerator(PromptGenerator):
    """The generator of IPT (https://arxiv.org/abs/2206.01958).

    With E the table and x_1..x_T the first instruction tokens, the instance's part S (P, w) is `E[x_1]..E[x_P]`, or
    `W encoder(E[x_1]..E[x_T]) + b`. The prompt at the input is S (plus a task prompt); in the deep host it is a task prompt
    at every layer, plus 0.05 S at the first.
    """

    def __init__(self, config: IPTConfig, info: StackInfo):
        super().__init__(config, info)
        P = config.num_virtual_tokens
        if config.host == "prompt":
            self.depths, width = (INPUT,), info.embedding_size
        else:
            self.depths, width = self.depths if config.task_prompt else self.depths[:1], info.hidden_size
        self.scale = config.instance_scale if config.host == "deep" else 1.0
        self.paper = config.init_weights == "paper"
        self.looks_up = config.strategy == "lookup"
        self.num_read = P if self.looks_up else config.max_instance_tokens
        read_width = width if self.looks_up else info.embedding_size

        self.constant_input = config.condition == "constant"
        own_table = config.trainable or config.init != "embeddings"
        self.table = None
        if self.constant_input:
            self.constant = nn.Parameter(torch.empty(self.num_read, read_width).uniform_(-0.5, 0.5))
        elif own_table:
            self.table = Table(info.vocab_size, read_width, config.table_rank, config.trainable)
        if self.looks_up:
            # A table that is all zeros could not differ between tokens: what is zero at the start is a gate behind it.
            self.gate = None if self.paper else nn.Parameter(torch.zeros(width))
        else:
            self.encoder = ENCODERS[config.encoder](read_width, config.bottleneck_dim)
            self.dropout = nn.Dropout(config.dropout)
            self.out = nn.Linear(self.encoder.num_features, P * width)
        if config.task_prompt:
            self.task = nn.ParameterList(nn.Parameter(torch.zeros(P, width)) for _ in self.depths)

        last = [self.gate] if self.looks_up else list(self.out.parameters())
        tasks = list(self.task) if config.task_prompt else []
        if config.init_weights is True:
            for parameter in last:
                nn.init.zeros_(parameter)
        elif self.paper:
            for task in tasks:
                nn.init.normal_(task) if config.host == "deep" else nn.init.uniform_(task, -0.5, 0.5)
        else:
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
        return {name: x for name, x in self.state_dict().items() if name.startswith(("table.", "encoder."))}

    @torch.no_grad()
    def begin(self, embeddings: torch.Tensor) -> None:
        if self.constant_input:
            return
        if self.config.init_file is not None:
            loaded = load_file(self.config.init_file)
            for name, tensor in self._pretrained().items():
                tensor.copy_(loaded[name])
        elif self.config.init == "embeddings" and self.table is not None:
            self.table.weight.copy_(embeddings)

    def encode(self, source: Source) -> torch.Tensor | None:
        if source.instance_embeds is not None:
            warnings.warn("`instance_embeds` are not used by IPT adapters, which make the prompt from the tokens.")
        if self.constant_input:
            return None
        order = (
            (~source.mask).int().argsort(dim=1, stable=True)[:, : self.num_read]
        )  # (B, T), instruction tokens first
        if self.table is None:
            found = source.embeds.detach().gather(1, order[..., None].expand(-1, -1, source.embeds.shape[-1]))
        else:
            if source.input_ids is None:
                raise ValueError(
                    "IPT looks the prompt up by token ids, but the model got `inputs_embeds`; pass `input_ids`, or use "
                    "`init='embeddings'` with `trainable=False`."
                )
            ids = source.input_ids.gather(1, order)  # (B, T)
            if (highest := int(ids.max())) >= len(self.table.weight):
                raise ValueError(
                    f"The table of this IPT adapter has {len(self.table.weight)} rows, but the text has the token id "
                    f"{highest}: the vocabulary has grown since the adapter was made."
                )
            found = self.table(ids.to(self.table.weight.device))  # (B, T, w)
        counts = source.mask.sum(dim=1, keepdim=True)  # (B, 1)
        counted = torch.arange(order.shape[1], device=counts.device) < counts  # (B, T)
        found = found.masked_fill(~counted[..., None].to(found.device), 0.0)
        if self.looks_up:  # a batch of short rows
            found = nn.functional.pad(found, (0, 0, 0, self.num_read - found.shape[1]))  # (B, P, w)
        return found

    def place(self, source: Source, instance: Instance) -> tuple[torch.Tensor, torch.Tensor | None]:
        before, live = super().place(source, instance)
        if self.looks_up and not self.constant_input and not self.config.task_prompt:
            counts = instance.mask.sum(dim=1, keepdim=True)  # (B, 1)
            live = torch.arange(self.num_slots, device=counts.device) < counts  # (B, P)
        return before, live

    def parameters_at(self, depth: int) -> list[str]:
        # The table is read in `encode`, adapter by adapter: a copy of it for each row of the batch would not fit anywhere.
        task = f"task.{self.depths.index(depth)}"
        names = [name for name, _ in self.named_parameters() if not name.startswith("table.")]
        return [n for n in names if n == task or (depth == self.depths[0] and not n.startswith("task."))]

    def forward(self, states: torch.Tensor, instance: Instance, depth: int) -> torch.Tensor:
        generated = 0.0
        if depth == self.depths[0]:
            generated = self.scale * self._instance_part(instance)  # (B, P, w)
        if self.config.task_prompt:
            task = self.task[self.depths.index(depth)]  # (P, w)
            generated = (task + generated).expand(states.shape[0], -1, -1)  # (B, P, w)
        return generated if self.paper else anchored(generated, states, self.anchor_index(instance))

    def _instance_part(self, instance: Instance) -> torch.Tensor:
        """S, (B, P, w)."""
        counts = instance.mask.sum(dim=1)  # (B,)
        if self.constant_input:
            vectors, counts = self.constant.expand(len(counts), -1, -1), torch.full_like(counts, self.num_read)
        else:
            vectors = instance.vector  # (B, T, w)
        vectors = vectors if self.paper else rms_norm(vectors)
        if self.looks_up:
            return vectors if self.paper else vectors * self.gate  # (B, P, w)
        features = self.encoder(vectors.to(self.out.weight.dtype), counts)  # (B, f)
        return self.out(self.dropout(features)).unflatten(-1, (self.num_slots, -1))  # (B, P, w)


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
