# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch

from peft_instance_prompt.nn.init import fan_in_uniform


@pytest.mark.parametrize(("shape", "fan_in"), [((3, 64, 400), None), ((3, 1, 4000), 64)])
def test_as_torch_draws_its_linear_layers(shape, fan_in):
    torch.manual_seed(0)
    drawn, linear = fan_in_uniform(*shape, fan_in=fan_in), torch.nn.Linear(64, 4000)
    expected = linear.weight if fan_in is None else linear.bias
    assert drawn.shape == shape and isinstance(drawn, torch.nn.Parameter)
    assert drawn.abs().max() <= 64**-0.5
    torch.testing.assert_close(drawn.std(), expected.std(), rtol=0.03, atol=0)
    assert not torch.equal(drawn[0], drawn[1])
