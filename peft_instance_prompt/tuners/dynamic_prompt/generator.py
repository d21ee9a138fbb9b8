# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ...generator import INPUT, Instance, PromptGenerator, Source, state_at
from ...nn.pooling import last_index, mean_pool, rms
from ...nn.straight_through import attach_position_gradient, length_gate, straight_through_choice
from ...slots import Layout, arrange, take
from ...stack import StackInfo
from ..idpg.generator import check_instance_embeds
from .choices import Choices, note_choices
from .config import DynamicPromptConfig


class DynamicPromptGenerator(PromptGenerator):
    """The generator of dynamic prompting (https://arxiv.org/abs/2303.02909).

    All choices are made in `encode`, once per forward pass. What it returns, (B, K), holds side by side the weights of the
    candidates of each choice: one-hot in value, and with the gradient of the Gumbel-softmax, for position and length (l + 1
    each); the softmax for the mixture (k). A choice per task has as many logits as candidates, one per instance a linear head
    on the instance vector, `(d + 1) * (l + 1)` or `(d + 1) * k` weights; the prompts have `l * e` or `k * l * e`.

    Attributes:
        step (`torch.LongTensor`): How many forward passes in training there were, a buffer, for the temperature.
    """

    def __init__(self, config: DynamicPromptConfig, info: StackInfo):
        super().__init__(config, info)
        l, e = config.num_virtual_tokens, info.embedding_size
        self.depths = (INPUT,)
        self.paper = config.init_weights == "paper"
        self.constant_input = config.condition == "constant"
        mixes = config.representation == "instance"
        # The released code draws the prompts from this range, or copies the embeddings of the first l words.
        self.prompts = nn.Parameter(torch.rand(config.num_pool if mixes else 1, l, e) - 0.5)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

        sizes = {"position": l + 1, "length": l + 1, "representation": config.num_pool}
        self.sizes = {name: size for name, size in sizes.items() if getattr(config, name) != "off"}
        per_instance = [name for name in self.sizes if getattr(config, name) == "instance"]
        width = {"frozen": info.output_size, "embeddings": e}.get(config.instance_source, config.instance_embeds_dim)
        self.heads = nn.ModuleDict({name: nn.Linear(width, self.sizes[name]) for name in per_instance})
        self.logits = nn.ParameterDict(
            {name: nn.Parameter(torch.rand(size) - 0.5) for name, size in self.sizes.items() if name not in self.heads}
        )
        if self.constant_input and self.heads:
            self.constant = nn.Parameter(torch.randn(width))
        if config.init_weights is True:
            nn.init.zeros_(self.prompts)
            self._start_at_no_choice()

    @torch.no_grad()
    def _start_at_no_choice(self) -> None:
        """Let the plain prompt, none of it behind the instance and all of it used, begin as the likeliest choice.

        One half of the draws take it, the others are spread evenly; evaluation takes it until training has another view.
        """
        for name, plain in (("position", 0), ("length", self.num_slots)):
            if name in self.heads:
                self.heads[name].weight.zero_()
            if name in self.sizes:
                logits = self.heads[name].bias if name in self.heads else self.logits[name]
                logits.zero_()
                logits[plain] = torch.tensor(float(self.num_slots)).log()

    @property
    def temperature(self) -> float:
        """The temperature of the next choice."""
        config = self.config
        passed = min(int(self.step) / config.anneal_steps, 1.0)
        return config.temperature * (config.min_temperature / config.temperature) ** passed**2

    def encode(self, source: Source) -> torch.Tensor | None:
        if not self.sizes:
            return None
        learns = self.training and torch.is_grad_enabled()
        temperature = self.temperature if learns else self.config.temperature
        noise = self.training or self.config.sample_at_eval
        vector = self._vector(source) if self.heads else None  # (B, width)
        weights = []
        for name in self.sizes:
            if name in self.heads:
                head = self.heads[name]
                logits = head(vector.to(head.weight.device, head.weight.dtype))  # (B, candidates)
                logits = torch.relu(logits) if self.config.relu_logits else logits
            else:
                logits = self.logits[name].expand(source.mask.shape[0], -1)  # (B, candidates)
            if name == "representation":
                weights.append(logits.float().softmax(dim=-1))
            else:
                weights.append(straight_through_choice(logits, temperature, noise)[1])
        if learns:
            self.step += 1
        return torch.cat(weights, dim=-1)  # (B, K)

    def _vector(self, source: Source) -> torch.Tensor:
        """What the heads read of each instance, (B, width)."""
        kind = self.config.instance_source
        if self.constant_input:
            return self.constant.expand(source.mask.shape[0], -1)  # (B, width)
        if kind == "instance_embeds":
            vector = check_instance_embeds(
                source.instance_embeds, source.mask.shape[0], self.config.instance_embeds_dim
            )
        else:
            vector = mean_pool(source.embeds.detach() if kind == "embeddings" else source.frozen_pass(), source.mask)
        # Of unit length: a step of a head, whose weights are as many, else moves a choice as far as d steps of the prompts move
        # those, and with a learning rate for the prompts the choices are made for good in the first steps.
        return vector if self.paper else F.normalize(vector.float(), dim=-1).to(vector.dtype)  # (B, width)

    def _weights(self, instance: Instance, name: str) -> torch.Tensor | None:
        """The weights (B, candidates) of a choice, None if there is no such choice."""
        if name not in self.sizes:
            return None
        return instance.vector.split(list(self.sizes.values()), dim=-1)[list(self.sizes).index(name)]

    def _text(self, instance: Instance) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens (B,) before which the two parts of the prompt stand."""
        start = instance.first + (self.config.prompt_position == "after_first")
        end = last_index(instance.mask) + self.causal  # in an encoder, the last one is the end token
        return start, torch.maximum(start, end)

    def _behind(self, instance: Instance) -> torch.Tensor:
        """Which of the prompt vectors stand behind the instance, (B, l)."""
        place = torch.arange(self.num_slots, device=instance.mask.device)  # (l,)
        weights = self._weights(instance, "position")
        number = place.new_zeros(instance.mask.shape[:1]) if weights is None else weights.argmax(dim=-1)  # (B,)
        if self.config.order == "paper":
            return place >= self.num_slots - number[:, None]  # (B, l)
        return place < number[:, None]  # (B, l)

    def place(self, source: Source, instance: Instance) -> tuple[torch.Tensor, torch.Tensor | None]:
        start, end = self._text(instance)
        anchor = torch.where(self._behind(instance), end[:, None], start[:, None])  # (B, l)
        position, length, mixture = (self._weights(instance, n) for n in ("position", "length", "representation"))
        used = None if length is None else length.argmax(dim=-1)  # (B,)
        rows = torch.arange(len(anchor), device=anchor.device) if source.rows is None else source.rows  # (B,)
        note_choices(
            Choices(
                rows,
                None if position is None else position.argmax(dim=-1),
                used,
                None if mixture is None else mixture.detach(),
            )
        )
        if used is None:
            return anchor, None
        return anchor, torch.arange(self.num_slots, device=used.device) < used[:, None]  # (B, l)

    def forward(self, states: torch.Tensor, instance: Instance, depth: int) -> torch.Tensor:
        mixture = self._weights(instance, "representation")
        if mixture is None:
            prompts = self.prompts.expand(states.shape[0], -1, -1)  # (B, l, e)
        else:
            prompts = torch.einsum("bk,kle->ble", mixture.to(self.prompts.dtype), self.prompts)  # (B, l, e)
        if not self.paper:
            # The opposite of the first token, which is the attention sink: what attends to that turns away from these.
            # Copies of it, as in the other methods, take too much attention where there are many.
            base = -state_at(states, instance.first).to(prompts.dtype)  # (B, 1, e)
            prompts = base + rms(base) * prompts  # (B, l, e)
        length = self._weights(instance, "length")
        return prompts if length is None else prompts * length_gate(length)[:, :, None].to(prompts.dtype)

    def attach(
        self, widened: torch.Tensor, prompts: torch.Tensor, embeds: torch.Tensor, instance: Instance, layout: Layout
    ) -> torch.Tensor:
        weights = self._weights(instance, "position")
        if weights is None or not weights.requires_grad:
            return widened
        start, end = self._text(instance)
        weights = weights.to(widened.device)
        known = (weights, prompts.detach(), embeds.detach(), start, end, self.config.order)
        if layout.all_live:
            return attach_position_gradient(widened, *known)
        # Unused slots stand at the left edge. The candidates have them in their places.
        whole = arrange(layout.anchor, layout.num_tokens)
        # Where each position of `whole` is in `widened`.
        there = take(layout.order.argsort(dim=1), whole.order)  # (B, N)
        attached = attach_position_gradient(take(widened, there), *known)  # (B, N, e)
        return take(attached, there.argsort(dim=1))  # (B, N, e)
