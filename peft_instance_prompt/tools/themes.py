# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The colours of the pictures and the HTML report, light and dark. People with a common colour blindness can tell them apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours as `#rrggbb`.

    Attributes:
        paper (`str`): The background.
        ink (`str`): Text.
        soft (`str`): Text and marks that stand back.
        line (`str`): Frames and grids.
        series (`tuple[str, ...]`): Categories, from Okabe and Ito's palette, darkened or lightened for contrast to the background.
        more, less (`str`): The two ends of a scale whose middle is the background.
        ramp (`tuple[float, float]`): The range of matplotlib's `viridis` that stands out from the background.
    """

    paper: str
    ink: str
    soft: str
    line: str
    series: tuple[str, ...]
    more: str
    less: str
    ramp: tuple[float, float]


THEMES = {
    "light": Theme(
        paper="#ffffff",
        ink="#1f2328",
        soft="#59636e",
        line="#d1d9e0",
        series=("#0072b2", "#d55e00", "#00795a", "#a8478a", "#8a6d00", "#3f8fc4"),
        more="#0072b2",
        less="#d98200",
        ramp=(0.0, 0.85),
    ),
    "dark": Theme(
        paper="#0d1117",
        ink="#e6edf3",
        soft="#9198a1",
        line="#3d444d",
        series=("#56b4e9", "#e69f00", "#2fc49a", "#e79ccb", "#f0e442", "#f2814a"),
        more="#56b4e9",
        less="#e69f00",
        ramp=(0.2, 1.0),
    ),
}


def check_theme(name: str) -> Theme:
    """The theme with this name. Raises a ValueError if there is none."""
    if name not in THEMES:
        raise ValueError(f"`theme` must be one of {list(THEMES)}, got {name!r}.")
    return THEMES[name]
