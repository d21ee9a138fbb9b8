# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The import paths of 0.2.0: `peft_instance_prompt.tuners.iapt` and the others are the modules of `peft_instance_prompt.methods`."""

import sys

from . import methods
from .methods import *  # noqa: F403
from .methods import dynamic_prompt, iapt, idpg, idspam, instance_vector, ipt, late_prompt, lpt


for _module in (dynamic_prompt, iapt, idpg, idspam, instance_vector, ipt, late_prompt, lpt):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module

__all__ = list(methods.__all__)
