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
from .generator import DynamicPromptGenerator


class DynamicPromptModel(InstancePromptModel):
    """Dynamic prompting (https://arxiv.org/abs/2303.02909): a soft prompt at the input whose split around the instance, length
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
    """

    prefix = "dynamic_prompt_"
    generator_cls = DynamicPromptGenerator
