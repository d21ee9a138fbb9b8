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
from .generator import IPTGenerator


class IPTModel(InstancePromptModel):
    """Instance-wise prompt tuning (https://arxiv.org/abs/2206.01958): the prompt is made from the instance's token ids, by
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
    """

    prefix = "ipt_"
    generator_cls = IPTGenerator
