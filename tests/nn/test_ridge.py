# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Predictions for points that are left out, against a fit on all others for each."""

from __future__ import annotations

import torch

from peft_instance_prompt.nn.ridge import leave_one_out


def test_against_a_fit_on_all_others():
    """Ridge regression, written out in the primal: the weights of `(X^T X + r s I)^-1 X^T y`, n times."""
    points, targets = torch.randn(12, 3, dtype=torch.double), torch.randn(12, 2, dtype=torch.double)
    found = leave_one_out(points, targets, ridge=0.3)
    x = points - points.mean(dim=0)
    scale = x.square().sum(dim=1).mean().sqrt()
    x = torch.cat([x / scale, torch.ones(12, 1, dtype=torch.double)], dim=1)
    for n in range(12):
        others = torch.arange(12) != n
        gram = x[others].T @ x[others] + 0.3 * torch.eye(4, dtype=torch.double)
        weights = torch.linalg.solve(gram, x[others].T @ targets[others])
        torch.testing.assert_close(found[n], x[n] @ weights)


def test_what_cannot_be_known_is_not_told():
    """In 500 dimensions a rule fits 60 random labels perfectly; on points that are left out it is right half of the time."""
    points, classes = torch.randn(60, 500), torch.randint(2, (60,))
    targets = torch.nn.functional.one_hot(classes, 2)
    right = (leave_one_out(points, targets).argmax(dim=1) == classes).double().mean()
    assert 0.2 < right < 0.75
    points[:, 0] += 40 * classes  # now it can be known
    assert (leave_one_out(points, targets).argmax(dim=1) == classes).all()


def test_points_that_are_all_the_same():
    found = leave_one_out(torch.ones(4, 3), torch.tensor([[1.0], [0.0], [1.0], [0.0]]))
    assert found.isfinite().all()
