# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .config import LPTConfig
from .generator import LPTGenerator


__all__ = ["LPTConfig", "LPTGenerator", "LPTModel"]

LPTModel = register_method(
    "lpt",
    LPTConfig,
    LPTGenerator,
    doc="""Late prompt tuning (https://arxiv.org/abs/2210.11292): a prompt generated from the states in the middle of the model
    enters there and stays in the stream. Nothing below is trained, and training builds no autograd graph there.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        config ([`LPTConfig`]): The configuration.
        adapter_name (`str`): The adapter's name. Defaults to `"default"`.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from peft_instance_prompt import LPTConfig

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> model = get_peft_model(model, LPTConfig(task_type="CAUSAL_LM"))
    ```
    """,
)
