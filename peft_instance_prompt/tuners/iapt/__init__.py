# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .config import IAPTConfig
from .generator import IAPTGenerator


__all__ = ["IAPTConfig", "IAPTGenerator", "IAPTModel"]

IAPTModel = register_method(
    "iapt",
    IAPTConfig,
    IAPTGenerator,
    doc="""Instruction-aware prompt tuning (https://arxiv.org/abs/2405.18203): the prompt of each layer is generated from that
    layer's own input, by self-attention pooling and a bottleneck with a learned activation.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        config ([`IAPTConfig`]): The configuration.
        adapter_name (`str`): The adapter's name. Defaults to `"default"`.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from peft_instance_prompt import IAPTConfig

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> model = get_peft_model(model, IAPTConfig(task_type="CAUSAL_LM"))
    ```
    """,
)
