# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The factor of the down-projection: it changes how far a step moves the projection, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, generator_of

from peft_instance_prompt import IAPTConfig, IDPGConfig, IDSPAMConfig, LPTConfig


SMALL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
MAKE = {
    "iapt": lambda **kw: IAPTConfig(**SMALL, **kw),
    "lpt": lambda **kw: LPTConfig(**SMALL, **kw),
    "lpt_pooled": lambda **kw: LPTConfig(**SMALL, generator_type="appg", **kw),
    "idspam": lambda **kw: IDSPAMConfig(**SMALL, **kw),
    "idpg": lambda **kw: IDPGConfig(**SMALL, phm_n=4, **kw),
    "idpg_shared": lambda **kw: IDPGConfig(**SMALL, phm_n=4, phm_share_A=True, **kw),
    "idpg_dense": lambda **kw: IDPGConfig(**SMALL, projection="dense", **kw),
}
READERS = {"idpg": ("A1", "B1"), "idpg_shared": ("B1",), "idpg_dense": ("W1",)}  # the others read with `down`
FACTOR = 0.25


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_same_prompts_from_weights_that_are_divided_by_it(name: str) -> None:
    inputs = batch(9, 6)
    plain, divided = (adapted(causal_lm(), MAKE[name](down_factor=factor)) for factor in (1.0, FACTOR))
    for (key, one), (_, other) in zip(
        generator_of(plain).named_parameters(), generator_of(divided).named_parameters()
    ):
        other.copy_(one / FACTOR if key in READERS.get(name, ("down",)) else one)
    expected = plain(**inputs).logits
    assert_same(divided(**inputs).logits, expected)
    generator = generator_of(divided)
    for key in READERS.get(name, ("down",)):
        getattr(generator, key).mul_(2)
    assert (divided(**inputs).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", MAKE)
def test_same_start(name: str) -> None:
    made = []
    for factor in (1.0, FACTOR):
        torch.manual_seed(3)
        generator = generator_of(get_peft_model(causal_lm(), MAKE[name](down_factor=factor)))
        made.append(dict(generator.named_parameters()))
    for key, one in made[0].items():
        times = FACTOR if key in READERS.get(name, ("down",)) else 1.0
        assert torch.equal(made[1][key] * times, one)


@pytest.mark.parametrize(("width", "m", "expected"), [(32, 16, 1.0), (96, 16, 0.4), (192, 16, 0.2), (192, 40, 0.5)])
def test_filled_in_from_the_width(width: int, m: int, expected: float, tmp_path: Path) -> None:
    base = causal_lm(hidden_size=width)
    model = get_peft_model(base, IAPTConfig(**SMALL, bottleneck_dim=m))
    assert model.active_peft_config.down_factor == pytest.approx(expected)
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).down_factor == pytest.approx(expected)


def test_what_a_config_says_stays() -> None:
    base = causal_lm(hidden_size=96)
    assert get_peft_model(base, IAPTConfig(**SMALL, down_factor=0.3)).active_peft_config.down_factor == 0.3
    assert IAPTConfig(init_weights="paper").down_factor == 1.0
    for config in (LPTConfig(), IDSPAMConfig(), IDPGConfig(phm_n=4)):  # no figures for these
        assert get_peft_model(causal_lm(hidden_size=256), config).active_peft_config.down_factor == 1.0
    asked = LPTConfig(down_factor=None, bottleneck_dim=16)
    assert get_peft_model(causal_lm(hidden_size=96), asked).active_peft_config.down_factor == pytest.approx(0.4)


@pytest.mark.parametrize("name", MAKE)
def test_file_of_an_older_form_has_none(name: str, tmp_path: Path) -> None:
    MAKE[name]().save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    for version in (None, 1):
        old = {key: value for key, value in saved.items() if key not in ("down_factor", "format_version")}
        file.write_text(json.dumps(old if version is None else {**old, "format_version": version}))
        assert PeftConfig.from_pretrained(str(tmp_path)).down_factor == 1.0


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1.0, ValueError), ("0.1", TypeError)])
def test_bad_factor(value, error: type) -> None:
    with pytest.raises(error, match="`down_factor`"):
        LPTConfig(down_factor=value)
