# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Leave-one-out ridge regression: does a linear rule tell classes apart on points that it was not fitted on?"""

from __future__ import annotations

import torch


def leave_one_out(points: torch.Tensor, targets: torch.Tensor, ridge: float = 0.1) -> torch.Tensor:
    """The prediction for each point by ridge regression on all other points.

    It has a closed form: with the kernel `K` of the points, `C = K + r I` and `a = C^-1 y`, the prediction for point i is
    `y_i - a_i / (C^-1)_ii`.

    Args:
        points (`torch.Tensor` of shape `(n, k)`): At least 2 points. The function centres them and adds a constant feature.
        targets (`torch.Tensor` of shape `(n, c)`): For classes: 1 in the column of the class, 0 elsewhere.
        ridge (`float`, *optional*, defaults to 0.1): The penalty, in units of the mean square length of a point.

    Returns:
        `torch.Tensor` of shape `(n, c)`, in float64.
    """
    points, targets = points.double(), targets.double()
    points = points - points.mean(dim=0)  # (n, k)
    kernel = points @ points.T  # (n, n)
    scale = kernel.diagonal().mean().clamp(min=torch.finfo(kernel.dtype).tiny)
    kernel = kernel / scale + 1  # 1 for the constant feature
    inverse = torch.linalg.inv(kernel + ridge * torch.eye(len(points), dtype=kernel.dtype))  # (n, n)
    return targets - (inverse @ targets) / inverse.diagonal()[:, None]  # (n, c)
