# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A decoder with a prompt, a padded batch for it, and the rule that no call leaves anything behind."""

from __future__ import annotations

import pytest
from methods import METHODS
from peft import PeftModel
from tiny import adapted, batch, causal_lm

from peft_instance_prompt.engine.forward import current_pass
from peft_instance_prompt.engine.request import Request, current_request


INPUTS = batch(9, 6)
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def prompted(method: str, family: str = "llama", seed: int = 0, **fields) -> PeftModel:
    return adapted(causal_lm(family), METHODS[method](task_type="CAUSAL_LM", **fields), seed=seed)


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert current_pass.get() is None
    assert current_request() == Request()
