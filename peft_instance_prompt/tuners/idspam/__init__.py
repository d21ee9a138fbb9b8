# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .config import IDSPAMConfig
from .generator import IDSPAMGenerator


__all__ = ["IDSPAMConfig", "IDSPAMGenerator", "IDSPAMModel"]

IDSPAMModel = register_method(
    "idspam",
    IDSPAMConfig,
    IDSPAMGenerator,
    doc="""ID-SPAM (ACL 2025, https://arxiv.org/abs/2506.05629): one head of self-attention over the token embeddings of the
    instance, averaged over the tokens, goes through a bottleneck to a prompt that enters at one layer and stays in the stream.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        config ([`IDSPAMConfig`]): The configuration.
        adapter_name (`str`): The adapter's name. Defaults to `"default"`.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from peft_instance_prompt import IDSPAMConfig

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> model = get_peft_model(model, IDSPAMConfig(task_type="CAUSAL_LM"))
    ```
    """,
)
