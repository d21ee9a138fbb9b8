# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Checks of a config's fields."""

from __future__ import annotations

import re
import sys

from peft.config import PeftConfig


MOST = 1e4  # of factors: prompts times it are numbers in float16
LARGEST = 2**31 - 1  # of sizes, layers and token ids


def check_int(config: PeftConfig, name: str, minimum: int) -> None:
    """Raise a TypeError or ValueError if a field is not a whole number of at least `minimum` and below 2^31."""
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
    if value > LARGEST:
        raise ValueError(f"`{name}` must be at most {LARGEST}, got {value}.")


def check_pattern(config: PeftConfig, name: str) -> None:
    """Raise a ValueError if a field is no regular expression."""
    value = getattr(config, name)
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"`{name}` must be a regular expression if it is a text, got {value!r}: {error}.") from error


def check_number(config: PeftConfig, name: str, least: float = -MOST, most: float = MOST) -> None:
    """Make a field a float; raise a TypeError or ValueError if it is not a number, or not one from `least` to `most`."""
    value = getattr(config, name)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not -sys.float_info.max <= value <= sys.float_info.max:  # False for NaN, too
        raise ValueError(f"`{name}` must be finite, got {value!r}.")
    if not least <= value <= most:
        raise ValueError(
            f"`{name}` must lie between {least:g} and {most:g}, got {value!r}: beyond, float16 overflows."
        )
    setattr(config, name, float(value))  # torch takes no whole number beyond 64 bits


def check_dropout(config: PeftConfig) -> None:
    """Raise a TypeError or ValueError if `dropout` is not a number from 0 to below 1."""
    check_number(config, "dropout")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"`dropout` must lie in [0, 1), got {config.dropout!r}.")


def check_choice(config: PeftConfig, name: str, allowed: tuple) -> None:
    """Raise a ValueError if a field is none of the allowed values."""
    value = getattr(config, name)
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
        raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")
