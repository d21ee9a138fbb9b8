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
from .generator import IAPTGenerator


class IAPTModel(InstancePromptModel):
    """Instruction-aware prompt tuning (https://arxiv.org/abs/2405.18203): the prompt of each layer is generated from that
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
    """

    prefix = "iapt_"
    generator_cls = IAPTGenerator
