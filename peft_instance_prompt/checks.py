# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Checks of a config's fields."""

from __future__ import annotations

import re
import sys

from peft.config import PeftConfig


MOST = 1e4  # of factors: prompts times a larger one overflow in float16
LARGEST = 2**31 - 1  # of sizes, layers and token ids


def check_int(config: PeftConfig, name: str, minimum: int, optional: bool = False) -> None:
    """Raise a TypeError or ValueError if a field is not a whole number from `minimum` to 2^31 - 1, or None if `optional`."""
    value = getattr(config, name)
    if value is None and optional:
        return
    if not is_int(value):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
    if value > LARGEST:
        raise ValueError(f"`{name}` must be at most {LARGEST}, got {value}.")


def check_number(config: PeftConfig, name: str, least: float = -MOST, most: float = MOST) -> None:
    """Make a field a float; raise a TypeError or ValueError if it is not a number from `least` to `most`."""
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


def check_names(config: PeftConfig, name: str, pattern: bool = False) -> None:
    """Make a set or tuple of names a sorted list; raise a TypeError if a field is neither names nor None.

    With `pattern`, a text is allowed as well; it raises a ValueError if it is no regular expression.
    """
    value = getattr(config, name)
    if isinstance(value, (set, tuple)):
        value = sorted(value)
        setattr(config, name, value)
    if pattern and isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"`{name}` must be a regular expression if it is a text, got {value!r}: {error}."
            ) from error
    elif value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise TypeError(f"`{name}` must be a list of names or None, got {value!r}.")


def check_layers(config: PeftConfig, name: str) -> None:
    """Make a tuple or range a list; raise a ValueError if a field is not layer numbers, each once, or None."""
    value = getattr(config, name)
    if isinstance(value, (tuple, range)):
        value = list(value)
        setattr(config, name, value)
    layers = [value] if isinstance(value, int) else value
    whole = isinstance(layers, list) and all(is_int(n) and n >= 0 for n in layers)
    if value is not None and not (whole and layers and len(set(layers)) == len(layers)):
        raise ValueError(f"`{name}` must be layer numbers from 0, each once, or None, got {value!r}.")


def check_text(config: PeftConfig, name: str) -> None:
    """Raise a ValueError if a field is neither a text nor token ids, at least one, nor None."""
    value = getattr(config, name)
    ids = isinstance(value, (list, tuple)) and all(is_int(n) and 0 <= n <= LARGEST for n in value)
    if value is not None and not (value and (ids or isinstance(value, str))):
        raise ValueError(f"`{name}` must be token ids or a text, not empty, or None, got {value!r}.")


def is_int(value: object) -> bool:
    """Whether a value is an integer and no bool, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)
