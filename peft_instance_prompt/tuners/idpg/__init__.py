# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from ...registry import register_method
from .config import IDPGConfig
from .generator import IDPGGenerator


__all__ = ["IDPGConfig", "IDPGGenerator", "IDPGModel"]

IDPGModel = register_method(
    "idpg",
    IDPGConfig,
    IDPGGenerator,
    doc="""Instance-dependent prompt generation (NAACL 2022, https://arxiv.org/abs/2204.04497): a bottleneck turns a vector of the
    instance into the prompt at the input and, in the multi-layer variant, into additions to it between the layers.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        config ([`IDPGConfig`]): The configuration.
        adapter_name (`str`): The adapter's name. Defaults to `"default"`.

    Example:

    ```py
    >>> from transformers import AutoModelForCausalLM
    >>> from peft import get_peft_model
    >>> from peft_instance_prompt import IDPGConfig

    >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> model = get_peft_model(model, IDPGConfig.preset("m-phm", task_type="CAUSAL_LM"))
    ```
    """,
)
