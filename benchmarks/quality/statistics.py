# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""Means of differences between two methods on the same instances, with intervals."""

from __future__ import annotations

import torch


def paired_interval(
    differences: list[torch.Tensor], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """
    The mean over tasks of the mean difference, and the ends of its percentile bootstrap interval.

    In each resample, every task draws its seeds and its instances with replacement; so the interval covers both what other
    instances and what other seeds would have given.

    Args:
        differences (`list[torch.Tensor]`): One tensor (seeds, instances) for each task: the first method's value minus the second's.
        level (`float`, *optional*, defaults to 0.95): The share of resamples that the interval covers.
        resamples (`int`, *optional*, defaults to 2000): Their number.
        seed (`int`, *optional*, defaults to 0): Of the resampling.

    Returns:
        `tuple[float, float, float]`: Mean, low, high.
    """
    if not differences or any(not table.numel() for table in differences):
        raise ValueError("There is nothing to resample: each task needs at least one seed and one instance.")
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(resamples, dtype=torch.float64)
    for table in differences:
        S, n = table.shape
        table = table.double()
        rows = torch.randint(S, (resamples, S), generator=generator)
        weights = torch.stack([(rows == s).double().mean(dim=1) for s in range(S)], dim=1)  # (resamples, S)
        picks = torch.randint(n, (resamples, n), generator=generator)
        columns = torch.stack([table[s][picks].mean(dim=1) for s in range(S)], dim=1)  # (resamples, S)
        total += (weights * columns).sum(dim=1) / len(differences)
    tail = (1 - level) / 2
    low, high = total.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return sum(table.double().mean().item() for table in differences) / len(differences), low, high
