# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""IPT, instance-wise prompt tuning (https://arxiv.org/abs/2206.01958): the token ids look up the prompt in a second embedding table."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Optional, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..checks import check_choice, check_dropout, check_int, check_number
from ..engine.stack import StackInfo
from ..generator import INPUT, Instances, Placement, PromptGenerator, Source, Weights, chosen_layers
from ..nn.encoders import ENCODERS, Table
from ..nn.init import fan_in_uniform
from ..nn.pooling import rms_norm
from ..registry import register_method
from .accumulation import AccumulatingConfig


@dataclass
class IPTConfig(AccumulatingConfig):
    """Configuration of [`IPTModel`], instance-wise prompt tuning (https://arxiv.org/abs/2206.01958).

    A second embedding table, of shape (vocab_size, width), turns the instance's token ids into the prompt. With `strategy="lookup"`,
    each of the first P instruction tokens looks up a prompt vector, P being `num_virtual_tokens`; with `strategy="encoder"`, a small
    network turns the looked-up vectors of the first tokens into P prompt vectors.

    The table is nearly all of the adapter. A full table has 14 to 29 % of a model's parameters, though the paper states 0.5 to
    1.5 %, so by default it is the product of a (vocab_size, 64) and a (64, width) matrix. With the vocabulary of 128,256 and the
    width of 2,048 of a Llama 3.2 1B, that is 8.3 M parameters, 0.67 % of the model: 33 MB in float32 and 133 MB in training
    with AdamW (weight, gradient and two moments); the full table is 263 M, 1.05 GB and 4.2 GB. The rest is small there
    (the CNN 0.4 M and 0.1 M per prompt vector), so that any strategy with P up to 20 stays between 0.5 and 1.5 %.

    Deviations from the paper: by default the adapter starts as a near no-op, with a table of zeros, which `lookup` reads as it is;
    the vectors of other tables are divided by their root mean square (`init_weights`; `"paper"` has neither); fewer prompt vectors
    (5 and not 100); the low-rank table; the encoders' inner width is `bottleneck_dim` (the released CNN has 1, the LSTM 64, and
    the MLP is one matrix from the mean to all prompt vectors, 105 M weights); padding is never looked up; dropout is active in
    training only.

    Args:
        num_virtual_tokens (`int`): The number P of prompt vectors. Defaults to 5. With `strategy="lookup"` and without a task
            prompt, a row with fewer instruction tokens uses as many prompt vectors as it has tokens.
        strategy (`str`): `"lookup"` (the default) or `"encoder"`.
        encoder (`str`): The network of `strategy="encoder"`: `"cnn"`, the default, a TextCNN with kernels 3, 4 and 5 and the
            maximum over time; `"mlp"`, on the mean over tokens; `"lstm"`, a bidirectional LSTM of two layers.
        bottleneck_dim (`int`): The inner width m of the encoder: features per kernel, hidden units, or units per direction.
            Defaults to 16.
        max_instance_tokens (`int`): How many instruction tokens the encoder reads. Defaults to 100, the paper's.
        host (`str`): `"prompt"`, the default: the prompt stands at the input. `"deep"`: each layer has a learned task prompt, and
            the instance's part is added to that of the first layer.
        task_prompt (`bool`, *optional*): Whether there is a learned task prompt, to which the instance's part is added.
            Defaults to the paper's: `False` for `host="prompt"`, `True` for `"deep"`. A `"deep"` host without a task prompt
            writes to the first layer only.
        instance_scale (`float`): The factor of the instance's part with `host="deep"`. Defaults to 0.05.
        table_rank (`int`, `None` or `"auto"`): The rank of the table; `None` for a full one. Defaults to `"auto"`: 64, and a
            full table with `init="embeddings"`.
        init (`str`, *optional*): The start of the table. `"zeros"`: a token that training never meets keeps the vector zero, whose
            slot changes next to nothing, instead of a random one; for `lookup` in a table that is trained, and not with
            `init_weights="paper"`. There it is the default, elsewhere `"random"`: uniform in [-0.5, 0.5]. In a low-rank table both
            are of the first factor. `"pretrained"`: the table (and the encoder) in `init_file`. `"embeddings"`: a copy of the base
            model's input embeddings; with `trainable=False`, no copy is made and the base model's own are read.
        init_file (`str`, *optional*): A safetensors file with `table.*` (and `encoder_*`), as `examples/methods/pretrain_ipt.py` in
            the project's repository writes it. Saved adapters do not name it: loading them does not need it.
        trainable (`bool`): Whether the table is trained. Defaults to `True`.
        dropout (`float`): The dropout on the encoder's features, in training only, from 0 to below 1. Defaults to 0.1.
        vocab_size (`int`, *optional*): The number of the base model's embeddings. Filled in; a later base model must agree.

    All fields of [`AccumulatingConfig`] and [`InstancePromptConfig`] are inherited. `accumulate` is for `host="deep"`: without it, what was
    looked up leaves the slots at the second layer.
    """

    paper = ("Instance-wise Prompt Tuning for Pretrained Language Models", "2206.01958")
    old_defaults: ClassVar[dict[int, dict[str, Any]]] = {1: {"init": "random"}}

    num_virtual_tokens: int = 5
    strategy: Literal["lookup", "encoder"] = "lookup"
    encoder: Literal["cnn", "mlp", "lstm"] = "cnn"
    max_instance_tokens: int = 100
    host: Literal["prompt", "deep"] = "prompt"
    task_prompt: Optional[bool] = None
    instance_scale: float = 0.05
    table_rank: Optional[Union[int, Literal["auto"]]] = "auto"
    init: Optional[Literal["zeros", "random", "pretrained", "embeddings"]] = None
    init_file: Optional[str] = None
    trainable: bool = True
    dropout: float = 0.1
    vocab_size: Optional[int] = None

    @property
    def can_be_zero(self) -> bool:
        """Whether a table of zeros learns: it is trained, and its vectors are read as they are."""
        return self.strategy == "lookup" and self.trainable is True and self.init_weights != "paper"

    def _fill_in(self) -> None:
        super()._fill_in()
        if self.task_prompt is None:
            self.task_prompt = self.host == "deep"
        if self.init is None:
            self.init = "zeros" if self.can_be_zero else "random"
        if self.table_rank == "auto":
            self.table_rank = None if self.init == "embeddings" else 64

    def _check_fields(self) -> None:
        super()._check_fields()
        check_choice(self, "strategy", ("lookup", "encoder"))
        check_choice(self, "encoder", ("cnn", "mlp", "lstm"))
        check_choice(self, "host", ("prompt", "deep"))
        check_choice(self, "init", ("zeros", "random", "pretrained", "embeddings"))
        for name in ("task_prompt", "trainable"):
            check_choice(self, name, (True, False))
        check_int(self, "max_instance_tokens", minimum=1)
        check_number(self, "instance_scale")
        for name in ("table_rank", "vocab_size"):
            check_int(self, name, minimum=1, optional=True)
        check_dropout(self)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.init == "zeros" and not self.can_be_zero:
            raise ValueError(
                "`init='zeros'` needs `strategy='lookup'`, `trainable=True` and an `init_weights` other than 'paper', got "
                f"{self.strategy!r}, {self.trainable} and {self.init_weights!r}; leave `init` out."
            )
        if self.init == "embeddings" and self.table_rank is not None:
            raise ValueError(f"`table_rank` must be None with `init='embeddings'`, got {self.table_rank}.")
        loaded = self.hidden_size is not None  # a saved adapter does not keep the file
        if (self.init == "pretrained") != (self.init_file is not None) and not (loaded and self.init_file is None):
            raise ValueError(
                "`init_file` must name a safetensors file with `init='pretrained'` and be None otherwise, got "
                f"{self.init_file!r} with {self.init!r}."
            )
        nothing = self.strategy == "lookup" and not self.trainable and not self.task_prompt
        if nothing and self.init_weights == "paper" and self.condition == "instance":
            raise ValueError(
                "`trainable=False` leaves nothing to train with `strategy='lookup'`, `init_weights='paper'` and no "
                "`task_prompt`."
            )
        if self.host == "prompt" and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` must be None with `host='prompt'`, which writes to the input only, got "
                f"{self.layers_to_transform!r}."
            )

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        # The saved weights replace the file, which may not exist where the adapter is loaded.
        saved = copy.copy(self)
        saved.init_file = None
        super(IPTConfig, saved).save_pretrained(save_directory, **kwargs)


# From this vocabulary on, a full table is larger than most users expect of an adapter, and a warning says so.
LARGE_VOCABULARY = 50_000


class IPTGenerator(PromptGenerator):
    """Instance-wise prompt tuning (https://arxiv.org/abs/2206.01958): a second embedding table and, as an option, a small network
    turn the instance's token ids into the prompt.

    With E the table and x_1..x_T the first instruction tokens, the instance's part S (P, w) is `E[x_1]..E[x_P]`, or
    `W encoder(E[x_1]..E[x_T]) + b`. The prompt at the input is S, plus a task prompt if there is one. With the deep host, each layer's
    prompt is a task prompt, at the first layer plus `instance_scale` times S.

    Attributes:
        table (`Table`, *optional*): The table. None if the generator reads the base model's embeddings or a constant.
        gate (`nn.Parameter`): Shape (1, 1, w). The factor of the looked-up vectors. With `init="zeros"` and with
            `init_weights="paper"` there is none.
        encoder_... (`nn.Parameter`): The parameters of the encoder, see `nn/encoders.py`.
        out, out_bias (`nn.Parameter`): Shapes (1, f, P*w) and (1, 1, P*w): W and b behind the encoder.
        task (`nn.Parameter`): Shape (D, P, w). The task prompts.
        constant (`nn.Parameter`): Shape (1, T, w). With `condition="constant"`, instead of the looked-up vectors.
    """

    feeds_constant = False
    table: Table | None

    def __init__(self, config: IPTConfig, info: StackInfo):
        deep, P = config.host == "deep", config.num_virtual_tokens
        layers = sorted(chosen_layers(config, info))
        super().__init__(config, info, depths=(layers if config.task_prompt else layers[:1]) if deep else [INPUT])
        width = info.hidden_size if deep else info.embedding_size
        self.adds: bool = config.accumulates([info])
        self.scale = config.instance_scale if deep else 1.0
        self.looks_up = config.strategy == "lookup"
        self.num_read = P if self.looks_up else config.max_instance_tokens
        self.reads_bare: bool = self.paper or config.init == "zeros"  # vectors that are neither normalised nor gated
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
        elif config.init == "zeros":
            last = [p for name, p in self.named_parameters() if name in ("constant", "table.weight")]
        elif not self.paper:
            self.gate = nn.Parameter(torch.zeros(1, 1, width))  # makes a near no-op of a table that is not zero
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
        """The tensors that an `init_file` must hold, by name."""
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
        first = (~source.mask).int().argsort(dim=1, stable=True)  # (G, n), instruction tokens first
        order = first[:, : self.num_read]  # (G, T)
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
        if self.looks_up:  # a batch of short instructions has T < P
            vectors = nn.functional.pad(vectors, (0, 0, 0, self.num_read - vectors.shape[1]))  # (G, P, w)
        return vectors

    def place(self, mask: torch.Tensor, vector: torch.Tensor | None) -> Placement:
        placement = super().place(mask, vector)
        if not self.looks_up or self.constant_condition or self.config.task_prompt:
            return placement
        slot = torch.arange(self.num_slots, device=mask.device)  # (P,)
        return placement._replace(used=slot < mask.sum(dim=1, keepdim=True))  # (G, P)

    def index_at(self, depth: int) -> dict[str, int]:
        rows = {name: 0 for name, _ in self.named_parameters(recurse=False)} if depth == self.depths[0] else {}
        return {**rows, "task": self.depths.index(depth)} if self.config.task_prompt else rows

    def adds_at(self, depth: int) -> bool:
        return self.adds and depth != self.depths[0]

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        if depth != self.depths[0]:
            return weights["task"]  # (P, w) or (G, P, w)
        generated = self.scale * self._instance_part(instances, weights)  # (G, P, w)
        return weights["task"] + generated if self.config.task_prompt else generated

    def _instance_part(self, instances: Instances, weights: Weights) -> torch.Tensor:
        """The instance's part S (G, P, w)."""
        counts = instances.mask.sum(dim=1)  # (G,)
        if self.constant_condition:
            vectors = weights["constant"].expand(len(counts), -1, -1)  # (G, T, w)
            counts = torch.full_like(counts, self.num_read)
        else:
            vectors = instances.vector  # (G, T, w)
            counts = counts.clamp(max=vectors.shape[1])  # (G,), the tokens that are read
        vectors = vectors if self.reads_bare else rms_norm(vectors)
        if self.looks_up:
            return vectors if self.reads_bare else vectors * weights["gate"]  # (G, P, w)
        features = self.encoder.run(vectors.to(weights["out"].dtype), counts, weights)  # (G, 1, f)
        prompts = self.dropout(features) @ weights["out"] + weights["out_bias"]  # (G, 1, P * w)
        return prompts.unflatten(-1, (self.num_slots, -1)).flatten(1, 2)  # (G, P, w)


def check_file(file: str, wanted: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError if a safetensors file cannot be read, or lacks a tensor of a wanted name and shape."""
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


IPTModel = register_method("ipt", IPTConfig, IPTGenerator)
