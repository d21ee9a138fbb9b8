# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Names of the contract that changed after 0.2.0: generators of other packages may still use the old ones."""

from __future__ import annotations

import torch
from tiny import causal_lm

from peft_instance_prompt.engine.stack import describe
from peft_instance_prompt.generator import Placement
from peft_instance_prompt.methods.iapt import IAPTConfig, IAPTGenerator


class FirstDown(IAPTGenerator):
    """All depths share the first `down`, said by the old name."""

    def rows_at(self, depth: int) -> dict[str, int]:
        return {**super().rows_at(depth), "down": 0}


def test_rows_at_is_read() -> None:
    config, (info,) = IAPTConfig(num_virtual_tokens=2, bottleneck_dim=4, activation="rational"), describe(causal_lm())
    generator = FirstDown(config, info)
    for number, depth in enumerate(generator.depths):
        weights = generator.weights(depth)
        assert torch.equal(weights["down"], generator.down[0])
        assert torch.equal(weights["up"], generator.up[number]), "what the old name leaves alone is as by `index_at`"
    assert len(generator.unbind()["down"]) == len(generator.down) > 1
    assert IAPTGenerator(config, info).rows_at(generator.depths[1]) == {
        name: 1 for name in ("down", "pool", "slot", "up", "activation")
    }


def test_live_is_used() -> None:
    behind, used = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    assert Placement(behind, used).live is used and Placement(behind).live is None
