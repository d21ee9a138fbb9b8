# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .config import IPTConfig
from .encoders import ENCODERS, Encoder, Table
from .generator import IPTGenerator


__all__ = ["ENCODERS", "Encoder", "IPTConfig", "IPTGenerator", "IPTModel", "Table"]

IPTModel = register_method(
    "ipt",
    IPTConfig,
    IPTGenerator,
    doc="""Instance-wise prompt tuning (https://arxiv.org/abs/2206.01958): the prompt is made from the instance's token ids, by
    a second embedding table and, if wanted, a small network.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        config ([`IPTConfig`]): The configuration.
        adapter_name (`str`): The adapter's name. Defaults to `"default"`.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from peft_instance_prompt import IPTConfig

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> model = get_peft_model(model, IPTConfig(task_type="CAUSAL_LM", strategy="encoder", encoder="cnn"))
    ```
    """,
)
