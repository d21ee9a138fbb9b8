# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Dynamic prompting (https://arxiv.org/abs/2303.02909): position, length and content of a prompt at the input are chosen per instance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

import torch
from torch import nn
from torch.nn import functional as F

from ..checks import check_choice, check_int, check_number
from ..engine.slots import Layout, take
from ..engine.stack import StackInfo
from ..generator import INPUT, Instances, Placement, PromptGenerator, Source, Weights
from ..nn.straight_through import SamplingSwitch, attach_position_gradient, length_gate, straight_through_choice
from ..registry import register_method
from ..task_ids import check_task_ids
from .instance_vector import InstanceVectorConfig, instance_vector, vector_width


# The variants of the paper.
PRESETS: dict[str, dict[str, Any]] = {
    "adap_pos": {"position": "task"},
    "adap_ins_pos": {"position": "instance"},
    "adap_length": {"position": "off", "length": "task"},
    "adap_ins_length": {"position": "off", "length": "instance"},
    "adap_ins_vec": {"position": "off", "representation": "instance"},
    "adap_ins_vec_pos": {"position": "instance", "representation": "instance"},
    "adap_pos_ins_vec": {"position": "task", "representation": "instance"},
}


@dataclass
class DynamicPromptConfig(InstanceVectorConfig):
    """Configuration of [`DynamicPromptModel`], dynamic prompting (https://arxiv.org/abs/2303.02909).

    A soft prompt at the input. Its position, length and content are learned, each per task or per instance, in any combination.
    [`DynamicPromptConfig.preset`] gives the paper's variants.

    **Several tasks.** With `num_tasks`, one adapter serves them all. The tasks share the prompts and the heads; `task_ids`, int64 of
    shape (B,), which `forward` and `generate` take beside `input_ids`, look up the choices per task.

    Deviations from the paper and its code: by default the adapter starts as a near no-op (`init_weights`), in which each vector is
    the opposite of the first token's embedding and no vector stands behind the instance; the instance vector is the mean over the
    instruction's tokens and not over padding; attention does not see unused prompt vectors; in evaluation, choices have no noise.

    Args:
        num_virtual_tokens (`int`): The number l of prompt vectors, the most that `length` can choose. Defaults to 20, the
            paper's.
        position (`str`, `int` or `list[int]`): How many of the prompt vectors stand behind the instance, 0 to l. `"off"`: none.
            `"task"` or `"instance"`, the default: chosen per task or per instance. A number: fixed; with `num_tasks`, a list with
            a number for each task. Behind the instance is between instruction and response in a causal model, before the end
            token in an encoder.
        length (`str`): How many of the prompt vectors are used, 0 to l: `"off"`, the default, all; or chosen per `"task"` or per
            `"instance"`.
        representation (`str`): `"off"`, the default: one learned prompt. Otherwise a mixture of `num_pool` learned prompts, with
            weights per `"instance"` or, with `num_tasks`, per `"task"`.
        num_pool (`int`): The number k of prompts in the mixture. Defaults to 4.
        order (`str`): Which vectors stand behind the instance when j of them do: `"paper"`, the default, the last j; `"dpt"`, the
            first j, as in the released code.
        instance_source (`str`): Where the instance vector comes from. `"frozen"`, the default: the mean of the last hidden states
            of a plain pass of the base model, without prompts. `"embeddings"`: the mean of the input embeddings, which costs next
            to nothing. `"instance_embeds"`: the argument of this name of `forward` and `generate`.
        instance_embeds_dim (`int`, *optional*): The width of `instance_embeds`, for `instance_source="instance_embeds"`.
        relu_logits (`bool`): Whether the logits of position and length per instance go through a ReLU, as in the released code; a
            row whose logits are all negative then has no gradient. Defaults to `False`.
        tanh_logits (`bool`): Whether the mixture's logits go through a tanh before its softmax, as in the released code of
            `adap_ins_vec`; the largest weight is then at most e^2 times the smallest. Defaults to `False`.
        init (`str`): The start of the prompts: `"random"`, the default; or `"embeddings"`, the input embeddings of the first l
            ids of the vocabulary (with a mixture, the first `num_pool * l`), as in the released code. That needs
            `init_weights="paper"`, whose prompts are the vectors themselves.
        num_tasks (`int`, *optional*): The number T of tasks, at least 1, with choices per `"task"` of their own. Defaults to one
            task, without `task_ids`.
        temperature (`float`): The temperature of the Gumbel-softmax at the start of training, above 0. Defaults to 1.
        min_temperature (`float`): Its temperature at the end, above 0. Defaults to 0.5.
        anneal_steps (`int`): The number n of forward passes in training until then. In pass t the temperature is
            `temperature * (min_temperature / temperature) ** (t / n) ** 2`. Defaults to 680, the released code's schedule.
        sample_at_eval (`bool`): Whether choices are drawn at random in evaluation too, as in the released code, so that the same
            input can get different answers. Defaults to `False`: the likeliest choice. In training, choices are drawn while
            dropout is on; a trainer that sets every dropout to 0 gets the likeliest choice there, too.
        prompt_position (`str`, *optional*): The place of the vectors that do not stand behind the instance: `"before"` the first
            token or `"after_first"`. Filled in when the adapter is made: `"after_first"`, which disturbs a causal model less (the
            paper has `"before"`), or `"before"` if the text does not begin with a special token (T5).

    All fields of [`InstancePromptConfig`] but `layers_to_transform` are inherited; `bottleneck_dim` has no effect.
    """

    paper = ("Dynamic Prompting: A Unified Framework for Prompt Tuning", "2303.02909")

    num_virtual_tokens: int = 20
    prompt_position: Optional[Literal["before", "after_first"]] = None
    position: Union[Literal["off", "task", "instance"], int, list[int]] = "instance"
    length: Literal["off", "task", "instance"] = "off"
    representation: Literal["off", "task", "instance"] = "off"
    num_pool: int = 4
    order: Literal["paper", "dpt"] = "paper"
    relu_logits: bool = False
    tanh_logits: bool = False
    init: Literal["random", "embeddings"] = "random"
    num_tasks: Optional[int] = None
    temperature: float = 1.0
    min_temperature: float = 0.5
    anneal_steps: int = 680
    sample_at_eval: bool = False

    def _check_fields(self) -> None:
        super()._check_fields()
        if self.instruction_length is not None:
            raise ValueError(
                f"`instruction_length` must be None, got {self.instruction_length}: the prompt is split around the instance, and the "
                "part before it would let the first tokens of plain text be predicted from a prompt that has read them. Give rows "
                "with labels or a `response_template`, or use a different method."
            )
        if self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` must be None, as the prompt stands at the input only, got "
                f"{self.layers_to_transform!r}."
            )
        check_int(self, "num_tasks", minimum=1, optional=True)
        self._check_position()
        for name in ("length", "representation"):
            check_choice(self, name, ("off", "task", "instance"))
        check_choice(self, "init", ("random", "embeddings"))
        check_choice(self, "order", ("paper", "dpt"))
        check_choice(self, "prompt_position", (None, "before", "after_first"))
        for name in ("relu_logits", "tanh_logits", "sample_at_eval"):
            check_choice(self, name, (True, False))
        for name in ("num_pool", "anneal_steps"):
            check_int(self, name, minimum=1)
        for name in ("temperature", "min_temperature"):
            check_number(self, name, least=1e-4)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        per_task = "task" in (self.position, self.length, self.representation) or isinstance(self.position, list)
        if self.num_tasks is not None and not per_task:
            raise ValueError(
                "`num_tasks` is for choices per task: set `position`, `length` or `representation` to 'task', got "
                f"{self.num_tasks} with {self.position!r}, {self.length!r} and {self.representation!r}."
            )
        if self.num_tasks is None and self.representation == "task":
            raise ValueError(
                "`representation='task'` needs `num_tasks`: for one task, a mixture is no more than one prompt."
            )
        if self.init == "embeddings" and self.init_weights != "paper":
            raise ValueError(
                "`init='embeddings'` needs `init_weights='paper'`, got "
                f"{self.init_weights!r}: in the other forms the prompts are added to a state that they begin as."
            )

    def _check_position(self) -> None:
        """Raise a ValueError if `position` is neither a choice nor a fixed number from 0 to l for each task."""
        fixed = self.position
        if isinstance(fixed, str) or fixed is None:
            return check_choice(self, "position", ("off", "task", "instance"))
        numbers = [fixed] * (self.num_tasks or 1) if isinstance(fixed, int) else fixed
        l = self.num_virtual_tokens
        whole = isinstance(numbers, list) and all(type(n) is int and 0 <= n <= l for n in numbers)
        if not whole or len(numbers) != (self.num_tasks or 1) or (fixed is numbers and self.num_tasks is None):
            raise ValueError(
                "`position` must be one of ['off', 'task', 'instance'], or how many vectors stand behind the instance, from 0 to "
                f"`num_virtual_tokens` {l}; or with `num_tasks` a list of such numbers, one for each task; got {fixed!r} with "
                f"`num_tasks` {self.num_tasks}."
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> DynamicPromptConfig:
        """A variant of the paper.

        Args:
            name (`str`): `"adap_pos"`, `"adap_ins_pos"`, `"adap_length"`, `"adap_ins_length"`, `"adap_ins_vec"`,
                `"adap_ins_vec_pos"` or `"adap_pos_ins_vec"`. The last learns position and mixture together, as the released
                code does. The paper has two stages: train `"adap_pos"`, then `"adap_pos_ins_vec"` with
                `position=`[`learned_position`]`(model)`.
            **overrides: Other values for the preset's fields, and any further fields, such as `task_type`.

        Raises:
            ValueError: No preset has this name.

        Example:

        ```py
        >>> DynamicPromptConfig.preset("adap_pos", task_type="CAUSAL_LM").position
        'task'
        ```
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {list(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})


@dataclass(frozen=True)
class Choices:
    """An adapter's choices for its G instances in one forward pass. A choice that the config switches off is None.

    Attributes:
        rows (`torch.LongTensor`): Shape (G,). The instances' rows in the batch.
        positions (`torch.LongTensor`, *optional*): Shape (G,). How many of the l prompt vectors stand behind the instance.
        lengths (`torch.LongTensor`, *optional*): Shape (G,). How many of the l prompt vectors are used.
        mixture (`torch.Tensor`, *optional*): Shape (G, k). The weights of the k prompts in the mixture.
    """

    rows: torch.Tensor
    positions: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    mixture: torch.Tensor | None = None


class DynamicPromptGenerator(PromptGenerator):
    """Dynamic prompting (https://arxiv.org/abs/2303.02909): a soft prompt at the input. How it is split around the instance, its
    length and its content are chosen per task or per instance.

    With P (l, e) a row's prompt and X (n, e) its text, the input is `[P[:l - j]; X; P[l - j:]]`. Of the prompt vectors, the first i are
    used. The prompt is `P = sum_k beta_k P_k` with `beta = softmax(head(x))`, x the instance vector.

    `encode` makes all choices, once per forward pass. Its output (G, K) holds the weights of each choice's candidates side by side: of
    position and length (l + 1 candidates each), one-hot values with the gradient of the Gumbel-softmax; of the mixture (k candidates),
    the softmax. A choice per task has a logit for each candidate and task; a choice per instance has a linear head on the instance
    vector, with `(d + 1) * (l + 1)` or `(d + 1) * k` weights. The prompts have `l * e` or `k * l * e` weights.

    Attributes:
        prompts (`nn.Parameter`): Shape (1, k, l*e); k is 1 without a mixture.
        heads (`nn.ModuleDict`): The linear layers of the choices per instance, by name: `"position"`, `"length"`, `"representation"`.
        logits (`nn.ParameterDict`): Those of the choices per task, by name. Shape (candidates,) or, with `num_tasks`,
            (T, candidates).
        constant (`nn.Parameter`): Shape (1, width). With `condition="constant"`: the vector that the heads read.
        step (`torch.LongTensor`): A buffer: the number of forward passes in training, which sets the temperature.
        sampling (`SamplingSwitch`): Whether choices are drawn at random.
    """

    feeds_constant = False
    step: torch.Tensor

    def __init__(self, config: DynamicPromptConfig, info: StackInfo):
        super().__init__(config, info, depths=[INPUT])
        l, e = config.num_virtual_tokens, info.embedding_size
        pool = config.num_pool if config.representation != "off" else 1
        # The released code draws the prompts from this range, or copies the embeddings of the first l words.
        self.prompts = nn.Parameter(torch.rand(1, pool, l * e) - 0.5)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.sampling = SamplingSwitch(in_evaluation=config.sample_at_eval)

        sizes = {"position": l + 1, "length": l + 1, "representation": config.num_pool}
        self.sizes = {name: size for name, size in sizes.items() if getattr(config, name) != "off"}
        self.places_by_vector = not self.sizes.keys().isdisjoint(("position", "length"))
        per_instance = [name for name in self.sizes if getattr(config, name) == "instance"]
        width = vector_width(config, info)
        self.heads = nn.ModuleDict({name: nn.Linear(width, self.sizes[name]) for name in per_instance})
        tasks = () if config.num_tasks is None else (config.num_tasks,)
        per_task = [name for name in self.sizes if getattr(config, name) == "task"]
        self.logits = nn.ParameterDict({n: nn.Parameter(torch.rand(*tasks, self.sizes[n]) - 0.5) for n in per_task})
        if self.constant_condition and self.heads:
            self.constant = nn.Parameter(torch.randn(1, width))
        self.zero_at_start(self.prompts)
        if config.init_weights is True:
            self._start_at_no_choice()

    @torch.no_grad()
    def _start_at_no_choice(self) -> None:
        """Make the plain prompt, with no vector behind the instance and all vectors used, the likeliest choice at the start.

        Half of the draws take it, the others are spread evenly over the other candidates; evaluation always takes it.
        """
        for name, plain in (("position", 0), ("length", self.num_slots)):
            if name in self.heads:
                nn.init.zeros_(self.heads.get_parameter(f"{name}.weight"))
            if name in self.heads or name in self.logits:
                logits = self.heads.get_parameter(f"{name}.bias") if name in self.heads else self.logits[name]
                logits.zero_()
                logits[..., plain] = torch.tensor(float(self.num_slots)).log()

    @classmethod
    def check(cls, config: DynamicPromptConfig, info: StackInfo) -> None:
        pool = config.num_pool if config.representation != "off" else 1
        if config.init == "embeddings" and pool * config.num_virtual_tokens > info.vocab_size:
            raise ValueError(
                f"`init='embeddings'` needs {pool} x {config.num_virtual_tokens} embeddings (`num_pool` x `num_virtual_tokens`), and "
                f"{info.layers_name!r} has {info.vocab_size}."
            )

    @torch.no_grad()
    def begin(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.config.init == "embeddings":
            ids = torch.arange(self.prompts.shape[1] * self.num_slots)  # (k * l,)
            self.prompts.copy_(embed(ids).reshape(self.prompts.shape))

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
        vector = self._vector(source) if self.heads else None  # (G, width)
        tasks = self._tasks(source)  # (G,)
        weights = []
        for name, size in self.sizes.items():
            mixes = name == "representation"
            if name not in self.heads and name not in self.logits:
                fixed = self._of_tasks(torch.tensor(self.config.position, device=self.prompts.device), tasks)  # (G,)
                weights.append(F.one_hot(fixed, size).float())  # (G, candidates)
                continue
            if name in self.heads:
                head: Any = self.heads[name]  # `nn.Linear`
                logits = head(vector.to(head.weight.device, head.weight.dtype))  # (G, candidates)
                # The released code has a ReLU before its choices, and none before its softmax over the pool.
                logits = torch.relu(logits) if self.config.relu_logits and not mixes else logits
            else:
                logits = self._of_tasks(self.logits[name], tasks)  # (G, candidates)
            if mixes:
                logits = torch.tanh(logits) if self.config.tanh_logits else logits
                weights.append(logits.float().softmax(dim=-1))
            else:
                weights.append(straight_through_choice(logits, temperature, self.sampling.on)[1])
        if learns:
            self.step += 1
        return torch.cat(weights, dim=-1)  # (G, K)

    def _tasks(self, source: Source) -> torch.Tensor:
        """The task (G,) of each instance; 0 where there is one task."""
        if self.config.num_tasks is None:
            return torch.zeros(len(source.mask), dtype=torch.long, device=self.prompts.device)  # (G,)
        return check_task_ids(source.task_ids, len(source.mask), self.config.num_tasks).to(self.prompts.device)

    def _of_tasks(self, values: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """The rows (G, ...) of `values` for the instances' tasks (G,). Without a dimension over tasks, all instances share `values`."""
        shared = self.config.num_tasks is None or values.dim() == 0
        return values.expand(len(tasks), *values.shape) if shared else values[tasks]  # (G, ...)

    def _vector(self, source: Source) -> torch.Tensor:
        """The vectors (G, width) that the heads read."""
        if self.constant_condition:
            return self.constant.expand(len(source.mask), -1)  # (G, width)
        vector = instance_vector(self.config, source)  # (G, width)
        # Normalised: otherwise an update of a head moves a choice about d times as far as an update of the prompts, and choices
        # freeze in the first steps.
        return vector if self.paper else F.normalize(vector.float(), dim=-1).to(vector.dtype)

    def _weights(self, vector: torch.Tensor | None, name: str) -> torch.Tensor | None:
        """A choice's weights (G, candidates) in the output of `encode`; None if the config switches it off."""
        if name not in self.sizes:
            return None
        return vector.split(list(self.sizes.values()), dim=-1)[list(self.sizes).index(name)]

    def choices(self, vector: torch.Tensor, rows: torch.Tensor | None = None) -> Choices:
        """The choices in an output of `encode`.

        Args:
            vector (`torch.Tensor`): Shape (G, K). The output of `encode`.
            rows (`torch.LongTensor`, *optional*): Shape (G,). The instances' rows in the batch. Defaults to the first G.
        """
        position, length, mixture = (self._weights(vector, n) for n in ("position", "length", "representation"))
        return Choices(
            torch.arange(len(vector), device=vector.device) if rows is None else rows,
            None if position is None else position.argmax(dim=-1),  # (G,)
            None if length is None else length.argmax(dim=-1),  # (G,)
            None if mixture is None else mixture.detach(),
        )

    def place(self, mask: torch.Tensor, vector: torch.Tensor | None) -> Placement:
        position, length = self._weights(vector, "position"), self._weights(vector, "length")
        slot = torch.arange(self.num_slots, device=mask.device)  # (l,)
        number = slot.new_zeros(len(mask), 1)  # (G, 1)
        if position is not None:
            number = position.argmax(dim=-1, keepdim=True).to(slot.device)
        behind = slot >= self.num_slots - number if self.config.order == "paper" else slot < number  # (G, l)
        if length is None:
            return Placement(behind)
        return Placement(behind, slot < length.argmax(dim=-1, keepdim=True).to(slot.device))  # (G, l) each

    def start(self, instances: Instances, depth: int) -> torch.Tensor | None:
        # The opposite of the first token, the attention sink: a query that attends to the sink does not attend to its opposite.
        # Copies of the sink, as in the other methods, would take too much attention: there are many vectors here.
        return None if self.paper else -instances.base_state

    def index_at(self, depth: int) -> dict[str, int]:
        return {"prompts": 0}

    def generate(self, instances: Instances, depth: int, weights: Weights) -> torch.Tensor:
        prompts = weights["prompts"]  # (k, l * e) or (G, k, l * e)
        mixture = self._weights(instances.vector, "representation")  # (G, k)
        if mixture is not None:
            prompts = mixture.to(prompts.dtype)[:, None] @ prompts  # (G, 1, l * e)
        return prompts.reshape(-1, self.num_slots, prompts.shape[-1] // self.num_slots)  # (1 or G, l, e)

    def forward(self, instances: Instances, depth: int, weights: Weights | None = None) -> torch.Tensor:
        prompts = super().forward(instances, depth, weights)  # (G, l, e)
        length = self._weights(instances.vector, "length")  # (G, l + 1)
        return prompts if length is None else prompts * length_gate(length)[:, :, None].to(prompts.dtype)

    def attach_choice_gradient(
        self,
        widened: torch.Tensor,
        prompts: torch.Tensor,
        embeds: torch.Tensor,
        vector: torch.Tensor | None,
        layout: Layout,
        front: torch.Tensor,
        end: torch.Tensor,
    ) -> torch.Tensor:
        weights = self._weights(vector, "position")  # (B, l + 1)
        if weights is None or not weights.requires_grad or not isinstance(self.config.position, str):
            return widened
        places = (front, end, self.config.order)
        known = (weights.to(widened.device), prompts.detach(), embeds.detach(), *places)
        if layout.all_used:
            return attach_position_gradient(widened, *known).clone()  # no view: some stacks add positions in place
        # Unused slots stand at an edge of the row, whatever the position. Move them to its end.
        unused = torch.zeros_like(layout.order, dtype=torch.bool).scatter(1, layout.slot_index, ~layout.used)  # (B, N)
        index = unused.int().argsort(dim=1, stable=True)  # (B, N)
        attached = attach_position_gradient(take(widened, index), *known, layout.used.sum(dim=1))  # (B, N, e)
        return take(attached, index.argsort(dim=1))  # (B, N, e)


DynamicPromptModel = register_method("dynamic_prompt", DynamicPromptConfig, DynamicPromptGenerator)
