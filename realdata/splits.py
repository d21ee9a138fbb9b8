# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""One fixed way to split examples into train, dev and test."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable


def three_splits(
    examples: list[dict],
    group: Callable[[dict], Hashable] = lambda example: example["text"],
    most: tuple[int, int] = (200, 400),
    seed: int = 0,
) -> dict[str, list[dict]]:
    """
    Train, dev and test examples; the same for the same examples, whatever is trained on them.

    Args:
        examples (`list[dict]`): Examples with a `text`. A text that stands twice is taken once.
        group (`Callable`, *optional*): Examples of one group go to one split. Defaults to the text.
        most (`tuple[int, int]`, *optional*, defaults to `(200, 400)`): The most examples in dev and in test. Dev has at most an eighth of
            all examples, and test a quarter.
        seed (`int`, *optional*, defaults to 0): Of the order.

    Returns:
        `dict[str, list[dict]]`: By the names `"train"`, `"dev"` and `"test"`, each in random order.
    """
    once = list({example["text"]: example for example in reversed(examples)}.values())[::-1]
    n_dev, n_test = min(most[0], len(once) // 8), min(most[1], len(once) // 4)
    if not n_dev:
        raise ValueError(f"At least 8 different texts are needed for three splits, got {len(once)}.")
    groups: dict[Hashable, list[dict]] = {}
    for example in once:
        groups.setdefault(group(example), []).append(example)
    order = list(groups.values())
    rng = random.Random(seed)
    rng.shuffle(order)
    found: dict[str, list[dict]] = {"test": [], "dev": [], "train": []}
    for members in order:
        part = "test" if len(found["test"]) < n_test else "dev" if len(found["dev"]) < n_dev else "train"
        found[part] += members
    found["test"], found["dev"] = found["test"][:n_test], found["dev"][:n_dev]
    for part in found.values():
        rng.shuffle(part)
    return {name: found[name] for name in ("train", "dev", "test")}
