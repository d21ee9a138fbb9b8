# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""IDPG's presets, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import batch, causal_lm

from peft_instance_prompt import IDPGConfig


INPUTS = batch(9, 6)


def config(**fields) -> IDPGConfig:
    return IDPGConfig(**{"task_type": "CAUSAL_LM", "phm_n": 4, "num_virtual_tokens": 4, "dropout": 0.0, **fields})


@torch.no_grad()
def logits(model: PeftModel, **kwargs) -> torch.Tensor:
    return model(**INPUTS, **kwargs).logits


def test_presets() -> None:
    fields = {name: IDPGConfig.preset(name) for name in ("s-phm", "s-dnn", "m-phm", "m-dnn", "m-phm-glove")}
    assert [c.bottleneck_dim for c in fields.values()] == [256, 256, 16, 16, 16]
    assert [c.phm_share_A for c in fields.values()] == [True, True, False, False, False]
    assert fields["m-phm"].to_dict() == IDPGConfig().to_dict()
    assert IDPGConfig.preset("m-phm-glove", instance_embeds_dim=100).instance_embeds_dim == 100
    with pytest.raises(ValueError, match=r"no preset 'l-phm'.*'s-phm', 's-dnn', 'm-phm', 'm-dnn', 'm-phm-glove'"):
        IDPGConfig.preset("l-phm")


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"projection": "lowrank"}, ValueError, r"`projection`.*'phm', 'dense'.*'lowrank'"),
        ({"phm_n": 0}, ValueError, "`phm_n` must be at least 1, got 0"),
        ({"layer_sharing": "some"}, ValueError, "`layer_sharing`.*'some'"),
        ({"depth_input": "next"}, ValueError, "`depth_input`.*'next'"),
        ({"instance_source": "glove"}, ValueError, "`instance_source`.*'glove'"),
        ({"instance_pooling": "max"}, ValueError, "`instance_pooling`.*'max'"),
        ({"multi_layer": "yes"}, ValueError, "`multi_layer`.*'yes'"),
        ({"dropout": 1.0}, ValueError, r"`dropout`.*\[0, 1\).*1.0"),
        ({"instance_source": "instance_embeds"}, ValueError, "`instance_embeds_dim`.*None with 'instance_embeds'"),
        ({"instance_embeds_dim": 12}, ValueError, "`instance_embeds_dim`.*12 with 'frozen'"),
        ({"multi_layer": False, "layers_to_transform": [1]}, ValueError, r"`layers_to_transform`.*\[1\]"),
        ({"prompt_position": "middle"}, ValueError, "`prompt_position`.*'end'.*'middle'"),
    ],
)
def test_bad_field(fields: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        IDPGConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"phm_n": 16, "bottleneck_dim": 8}, r"`phm_n`.*`bottleneck_dim` 8.*\[32, 128\].*got 16.*\[1, 2, 4, 8\]"),
        ({"phm_n": 3}, r"got 3.*\[1, 2, 4, 8, 16\]"),
        ({"phm_n": 8, "instance_source": "instance_embeds", "instance_embeds_dim": 12}, r"12.*got 8.*\[1, 2, 4\]"),
    ],
)
def test_width_that_n_does_not_divide(fields: dict, says: str) -> None:
    base = causal_lm()
    with pytest.raises(ValueError, match=says):
        get_peft_model(base, config(**fields))
    assert not any("idpg" in name for name, _ in base.named_modules()) and not base._forward_pre_hooks
    get_peft_model(base, config(**{**fields, "phm_n": 4}))
