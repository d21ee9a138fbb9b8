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
from .generator import LPTGenerator


class LPTModel(InstancePromptModel):
    """Late prompt tuning (https://arxiv.org/abs/2210.11292): a prompt generated from the states in the middle of the model
    enters there and stays in the stream, and nothing below is trained or noticed by autograd.

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
    """

    prefix = "lpt_"
    generator_cls = LPTGenerator
