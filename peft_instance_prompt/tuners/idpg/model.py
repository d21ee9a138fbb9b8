# Copyright 2026-present the peft_instance_prompt authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from __future__ import annotations

from ...model import InstancePromptModel
from .generator import IDPGGenerator


class IDPGModel(InstancePromptModel):
    """Instance-dependent prompt generation (NAACL 2022, https://arxiv.org/abs/2204.04497): a bottleneck turns a vector of the
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
    """

    prefix = "idpg_"
    generator_cls = IDPGGenerator
