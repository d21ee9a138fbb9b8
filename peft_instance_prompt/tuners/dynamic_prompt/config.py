# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

from ...checks import check_choice, check_int, check_number
from ..instance_vector import InstanceVectorConfig


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

    A soft prompt at the input of which position, length and content are learned, each per task or per instance, in any
    combination. [`DynamicPromptConfig.preset`] gives the paper's variants.

    **Several tasks.** With `num_tasks` one adapter serves them all. The prompts and the heads are shared, and the choices per task
    are looked up by `task_ids`, int64 of shape (B,), which `forward` and `generate` take beside `input_ids`.

    Deviations from the paper and its code: by default the adapter starts as a near no-op (`init_weights`): each vector as the
    opposite of the first token's embedding, and none of them behind the instance; the instance
    vector is the mean over the instruction's tokens and not over padding; unused prompt vectors are masked out of attention;
    choices are made without noise in evaluation.

    Args:
        num_virtual_tokens (`int`): The number l of prompt vectors, the most that `length` can choose. Defaults to 20, the
            paper's.
        position (`str`, `int` or `list[int]`): How many of the prompt vectors stand behind the instance, 0 to l: chosen `"off"`
            (none of them), per `"task"` or per `"instance"`, the default; or a fixed number, with `num_tasks` one for each task.
            Behind is between instruction and response in a causal model, before the end token in an encoder.
        length (`str`): How many of the prompt vectors are used, 0 to l: `"off"` (all), `"task"` or `"instance"`.
        representation (`str`): `"off"`, or the prompt is a mixture of `num_pool` learned prompts, with weights per `"instance"`
            or, with `num_tasks`, per `"task"`.
        num_pool (`int`): The number k of prompts that are mixed. Defaults to 4.
        order (`str`): Which vectors go behind the instance when j of them do: `"paper"`, the default, the last j;
            `"dpt"`, the first j, as in the released code.
        instance_source (`str`): The source of the instance vector: `"frozen"`, the default, the mean of the last hidden
            states of a pass of the base model without prompts; `"embeddings"`, the mean of the input embeddings, which costs
            next to nothing; or `"instance_embeds"`, a vector that is given to `forward` and `generate` under this name.
        instance_embeds_dim (`int`, *optional*): The width of the given vectors, for `instance_source="instance_embeds"`.
        relu_logits (`bool`): Whether the logits of position and length per instance go through a ReLU, as in the released code; a
            row whose logits are all negative then has no gradient. Defaults to `False`.
        tanh_logits (`bool`): Whether the logits of the mixture go through a tanh before its softmax, as in the released code of
            `adap_ins_vec`: no prompt then has more than e^2 times the weight of another. Defaults to `False`.
        init (`str`): The start of the prompts: `"random"`, the default; or `"embeddings"`, the input embeddings of the first l
            (with a mixture `num_pool * l`) ids of the vocabulary, as in the released code. That needs `init_weights="paper"`, whose
            prompts are the vectors themselves.
        num_tasks (`int`, *optional*): The number T of tasks, at least 1, whose choices per `"task"` are learned apart. Default:
            one task, without `task_ids`.
        temperature (`float`): The temperature of the Gumbel-softmax at the start of training, above 0. Defaults to 1.
        min_temperature (`float`): Its temperature at the end, above 0. Defaults to 0.5.
        anneal_steps (`int`): After how many forward passes in training it is reached. In pass t of n the temperature is
            `temperature * (min_temperature / temperature) ** (t / n) ** 2`. Defaults to 680, which is the schedule of the
            released code.
        sample_at_eval (`bool`): Whether choices are drawn at random in evaluation too, as in the released code, so that one
            and the same input gets several answers. Defaults to `False`: the likeliest. In training they are drawn while dropout
            is on: a trainer that sets every dropout to 0 gets the likeliest, too.
        prompt_position (`str`, *optional*): The place of the vectors that do not go behind the instance: `"before"` the first token
            or `"after_first"`. Defaults to the latter, which disturbs a causal model less (the paper has the former), or to `"before"`
            where the text does not begin with a special token (T5). Filled in when the adapter is made.

    The fields that all methods have are those of [`InstancePromptConfig`]; `layers_to_transform` is not one of them, and
    `bottleneck_dim` is not used.
    """

    paper = ("Dynamic Prompting: A Unified Framework for Prompt Tuning", "2303.02909")

    num_virtual_tokens: int = field(default=20, metadata={"help": "The number of prompt vectors per instance."})
    prompt_position: Optional[Literal["before", "after_first"]] = field(
        default=None,
        metadata={
            "help": "The part before the instance: 'before' or 'after_first'; None: 'after_first' if that is special."
        },
    )
    position: Union[Literal["off", "task", "instance"], int, list[int]] = field(
        default="instance",
        metadata={"help": "What the prompt's split around the instance is chosen per, or the split."},
    )
    length: Literal["off", "task", "instance"] = field(
        default="off", metadata={"help": "What the prompt's length is chosen per."}
    )
    representation: Literal["off", "task", "instance"] = field(
        default="off", metadata={"help": "What the weights of a mixture of `num_pool` prompts are chosen per."}
    )
    num_pool: int = field(default=4, metadata={"help": "The number of prompts that are mixed."})
    order: Literal["paper", "dpt"] = field(
        default="paper", metadata={"help": "Behind the instance go the last ('paper') or the first ('dpt') vectors."}
    )
    relu_logits: bool = field(default=False, metadata={"help": "Whether logits per instance go through a ReLU."})
    tanh_logits: bool = field(default=False, metadata={"help": "Whether logits of the mixture go through a tanh."})
    init: Literal["random", "embeddings"] = field(
        default="random", metadata={"help": "What the prompts start from: 'random', or the first 'embeddings'."}
    )
    num_tasks: Optional[int] = field(default=None, metadata={"help": "The number of tasks that share the prompts."})
    temperature: float = field(default=1.0, metadata={"help": "The Gumbel-softmax' temperature at the start."})
    min_temperature: float = field(default=0.5, metadata={"help": "The Gumbel-softmax' temperature at the end."})
    anneal_steps: int = field(default=680, metadata={"help": "Training passes until the lowest temperature."})
    sample_at_eval: bool = field(default=False, metadata={"help": "Whether choices are random in evaluation too."})

    def __post_init__(self):
        super().__post_init__()
        if self.num_tasks is not None:
            check_int(self, "num_tasks", minimum=1)
        self._check_position()
        for name in ("length", "representation"):
            check_choice(self, name, ("off", "task", "instance"))
        check_choice(self, "init", ("random", "embeddings"))
        check_choice(self, "order", ("paper", "dpt"))
        if self.instruction_length is not None:
            raise ValueError(
                f"`instruction_length` must be None, got {self.instruction_length}: the prompt is split around the instance, and the "
                "part before it would let the first tokens of plain text be predicted from a prompt that has read them. Give rows "
                "with labels or a `response_template`, or use another method."
            )
        check_choice(self, "prompt_position", (None, "before", "after_first"))
        for name in ("relu_logits", "tanh_logits", "sample_at_eval"):
            check_choice(self, name, (True, False))
        for name in ("num_pool", "anneal_steps"):
            check_int(self, name, minimum=1)
        for name in ("temperature", "min_temperature"):
            check_number(self, name, least=1e-4)
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
        if self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` must be None, as the prompt stands at the input only, got "
                f"{self.layers_to_transform!r}."
            )

    def _check_position(self) -> None:
        """Raise a ValueError if `position` is neither a choice nor fixed numbers from 0 to l, one for each task."""
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
            **overrides: Fields to set otherwise, and `task_type`.

        Raises:
            ValueError: There is no such preset.

        Example:

        ```py
        >>> DynamicPromptConfig.preset("adap_pos", task_type="CAUSAL_LM").position
        'task'
        ```
        """
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {list(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})
