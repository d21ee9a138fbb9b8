# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Texts, and rows into which several of them are packed."""

from __future__ import annotations

import torch
from tiny import VOCAB


LENGTHS = (7, 4, 9)


def texts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """The ids (1, n) of a sequence of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (1, n), generator=generator) for n in lengths]


def labels_of(ids: torch.Tensor, instruction: int = 2) -> torch.Tensor:
    labels = ids.clone()
    labels[:, :instruction] = -100
    return labels


def packed(rows: list[list[torch.Tensor]], width: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of several sequences (1, n), with pads at position 0 up to the width of the longest, as TRL writes them."""
    width = max(sum(one.shape[1] for one in row) for row in rows) if width is None else width
    batch: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        pads = torch.zeros(1, width - sum(one.shape[1] for one in row), dtype=torch.long)
        batch["input_ids"].append(torch.cat([*row, pads], dim=1))
        batch["labels"].append(torch.cat([*map(labels_of, row), pads - 100], dim=1))
        batch["position_ids"].append(torch.cat([*(torch.arange(one.shape[1])[None] for one in row), pads], dim=1))
    return {name: torch.cat(values) for name, values in batch.items()}


def boundaries(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
