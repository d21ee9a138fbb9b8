# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Low precision: a base model in half precision, and autocast."""

from __future__ import annotations

import pytest
import torch
from llama_calls import GREEDY, INPUTS, LIVE, logits, prompted, train_step
from methods import METHODS
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from tiny import causal_lm


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    """The norm of the error is some two roundings of the dtype, on any kernels; the largest error varies more."""
    error = (found.float() - exact)[LIVE].norm() / exact[LIVE].norm()
    assert error < 8 * torch.finfo(found.dtype).eps


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kind: str, dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    """The adapter is kept in float32 beside a base model in half precision, unless that is turned off."""
    exact = prompted(kind)
    model = get_peft_model(
        causal_lm().to(dtype), METHODS[kind](task_type="CAUSAL_LM"), autocast_adapter_dtype=autocast_adapter_dtype
    )
    set_peft_model_state_dict(model, get_peft_model_state_dict(exact))
    own = {p.dtype for p in model.parameters() if p.requires_grad}
    assert own == {torch.float32 if autocast_adapter_dtype else dtype}
    found = logits(model)
    assert found.dtype == dtype
    assert_near(found, logits(exact))
    tokens = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(tokens, model.generate(**INPUTS, **GREEDY, use_cache=False)) and tokens.shape == (2, 13)
    assert train_step(model) == pytest.approx(train_step(exact), rel=0.03)


def test_autocast(kind: str) -> None:
    model, exact = prompted(kind), prompted(kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
        assert model.generate(**INPUTS, **GREEDY).shape == (2, 13)
        loss = train_step(model)
    assert found.dtype == torch.bfloat16
    assert_near(found, logits(exact))
    assert loss == pytest.approx(train_step(exact), rel=0.03)
