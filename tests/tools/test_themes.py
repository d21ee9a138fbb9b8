# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The colours can be read on their background, and told apart by people with a colour blindness."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from peft_instance_prompt.tools.themes import THEMES, check_theme


# What is seen of linear RGB without the long or the medium cones: Machado, Oliveira and Fernandes 2009, severity 1.
SEEN = {
    "all cones": torch.eye(3),
    "protanopia": torch.tensor(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": torch.tensor(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


def linear(colour: str) -> torch.Tensor:
    c = torch.tensor([int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)])
    return torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one: str, two: str) -> float:
    """That of the Web Content Accessibility Guidelines."""
    luminance = [float(linear(c) @ torch.tensor([0.2126, 0.7152, 0.0722])) + 0.05 for c in (one, two)]
    return max(luminance) / min(luminance)


def lab(rgb: torch.Tensor) -> torch.Tensor:
    """Linear RGB as CIELAB, in which a difference of about 2 can just be seen."""
    xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    t = xyz / torch.tensor([0.9505, 1.0, 1.089])
    f = torch.where(t > 216 / 24389, t.clamp(min=1e-9) ** (1 / 3), (24389 / 27 * t + 16) / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("name", THEMES)
def test_colours_stand_out(name):
    theme = check_theme(name)
    assert contrast(theme.ink, theme.paper) >= 7 and contrast(theme.soft, theme.paper) >= 4.5
    assert all(contrast(colour, theme.paper) >= 3 for colour in (*theme.series, theme.more, theme.less)[:-1])


@pytest.mark.parametrize("name", THEMES)
@pytest.mark.parametrize("cones", SEEN)
def test_colours_can_be_told_apart(name, cones):
    theme = THEMES[name]
    for one, two in [*combinations(theme.series[:4], 2), (theme.more, theme.less)]:
        seen = [lab((SEEN[cones] @ linear(colour)).clamp(0, 1)) for colour in (one, two)]
        assert (seen[0] - seen[1]).norm() > 10, (one, two)


def test_unknown_theme():
    with pytest.raises(ValueError, match="`theme` must be one of .*light.*dark.*'sepia'"):
        check_theme("sepia")
