# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the documentation shows is what the tests and examples run."""

from __future__ import annotations

from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("page", "file"),
    [("docs/how_it_works.md", "tests/mean_prompt.py"), ("README.md", "examples/quickstart.py")],
)
def test_a_page_shows_a_file_as_it_is(page: str, file: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines(keepends=True)
    code = "".join(line for line in lines if not line.startswith("# SPDX-")).lstrip()
    assert f"```py\n{code}```\n" in (ROOT / page).read_text(encoding="utf-8"), f"{page} shows another {file}"
