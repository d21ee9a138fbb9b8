# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""How far the states that generators read differ between texts, by benchmarks/first_token.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import first_token  # noqa: E402


def test_share_that_differs() -> None:
    same = torch.ones(5, 3)
    assert first_token.share_that_differs(same) == pytest.approx(0.0, abs=1e-6)
    assert first_token.share_that_differs(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(1.0)
    # 3 and 5: 1 apart from 4, over the root mean square of the two
    assert first_token.share_that_differs(torch.tensor([[3.0], [5.0]])) == pytest.approx(1 / 17**0.5)


@pytest.mark.slow
def test_what_it_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The first token of MiniLM is the same for all texts at the input, and nearly so in the middle; the mean is not."""
    monkeypatch.setattr(sys, "argv", ["first_token.py", "--texts", "4"])
    first_token.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "24 texts of 6 tasks"
    rows = {name: [float(share.strip("%")) for share in shares] for name, *shares in map(str.split, lines[2:])}
    assert len(rows) == 7 and rows["0"][0] == 0.0
    assert rows["3"][0] < 2 and rows["3"][1] > 30 and rows["(output)"][0] > 30
