# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""Means of differences between two methods on the same instances, with intervals."""

from __future__ import annotations

import torch


def paired_interval(
    differences: list[list[torch.Tensor]], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """
    The mean over tasks of the mean difference, and the ends of its percentile bootstrap interval.

    In each resample, every training draws its seeds with replacement, and every task its instances; so the interval covers both what
    other instances and what other seeds would have given. The tasks of a mixture are of one training: a seed that is good for one
    of them may be for all, so they draw the same seeds.

    Args:
        differences (`list[list[torch.Tensor]]`): For each training, one tensor (seeds, instances) for each of its tasks: the first
            method's value minus the second's.
        level (`float`, *optional*, defaults to 0.95): The share of resamples that the interval covers.
        resamples (`int`, *optional*, defaults to 2000): Their number.
        seed (`int`, *optional*, defaults to 0): Of the resampling.

    Returns:
        `tuple[float, float, float]`: Mean, low, high.

    Raises:
        ValueError: If there is no seed or no instance, or the tasks of a training differ in their number of seeds.
    """
    trainings = [[table.double() for table in training] for training in differences]
    tables = [table for training in trainings for table in training]
    if not tables or any(not table.numel() for table in tables):
        raise ValueError("There is nothing to resample: each task needs at least one seed and one instance.")
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(resamples, dtype=torch.float64)
    for training in trainings:
        if len(counts := {len(table) for table in training}) > 1:
            raise ValueError(f"The tasks of one training have the same seeds, got {sorted(counts)} of them.")
        (S,) = counts
        rows = torch.randint(S, (resamples, S), generator=generator)
        weights = torch.stack([(rows == s).double().mean(dim=1) for s in range(S)], dim=1)  # (resamples, S)
        for table in training:
            n = table.shape[1]
            picks = torch.randint(n, (resamples, n), generator=generator)
            columns = torch.stack([table[s][picks].mean(dim=1) for s in range(S)], dim=1)  # (resamples, S)
            total += (weights * columns).sum(dim=1) / len(tables)
    tail = (1 - level) / 2
    low, high = total.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return sum(table.mean().item() for table in tables) / len(tables), low, high
