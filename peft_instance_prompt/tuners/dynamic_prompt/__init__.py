# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .choices import learned_position, record_choices
from .config import DynamicPromptConfig
from .generator import Choices, DynamicPromptGenerator


__all__ = [
    "Choices",
    "DynamicPromptConfig",
    "DynamicPromptGenerator",
    "DynamicPromptModel",
    "learned_position",
    "record_choices",
]

DynamicPromptModel = register_method(
    "dynamic_prompt",
    DynamicPromptConfig,
    DynamicPromptGenerator,
    doc="""Dynamic prompting (https://arxiv.org/abs/2303.02909): a soft prompt at the input whose split around the instance, length
    and content are chosen per task or per instance.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        config ([`DynamicPromptConfig`]): The configuration.
        adapter_name (`str`): The adapter's name. Defaults to `"default"`.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from peft_instance_prompt import DynamicPromptConfig, record_choices

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> model = get_peft_model(model, DynamicPromptConfig.preset("adap_ins_pos", task_type="CAUSAL_LM"))
    >>> with record_choices() as record:
    ...     model(**batch)
    >>> record[0].positions  # how many prompt vectors stand behind each instance
    ```
    """,
)
