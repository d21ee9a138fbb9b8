# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A plugin for ms-swift: `--external_plugins instance_prompt.py --tuner_type instance_prompt` trains any method that PEFT knows.

The environment variable PEFT_INSTANCE_PROMPT_CONFIG names a YAML file with the fields of the adapter's config, `peft_type` among them.
"""

from __future__ import annotations

import os

import torch
from peft import PeftModel, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from peft_instance_prompt.commands import CONFIG, read_config


class InstancePromptTuner(PeftTuner):
    """What ms-swift asks for a fresh adapter; saving, resuming and loading are PEFT's, by the base class."""

    @staticmethod
    def prepare_model(args, model: torch.nn.Module) -> PeftModel:
        if CONFIG not in os.environ:
            raise ValueError(
                f"Set {CONFIG} to a YAML file with the fields of the adapter's config, such as iapt.yaml."
            )
        return get_peft_model(model, read_config(os.environ[CONFIG], task_type=args.task_type.upper()))


tuners_map["instance_prompt"] = InstancePromptTuner
