# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the documentation shows is what the tests and examples run."""

from __future__ import annotations

import ast
import re
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


def spoken(folder: Path) -> str:
    """All texts in the package's code, with "..." where an f-string puts a value."""
    texts = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    said = spoken(ROOT / "peft_instance_prompt")
    quoted = re.findall(r"^> (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(quoted) > 10
    for message in quoted:
        if message.startswith("KeyError"):  # PEFT's
            continue
        pieces = [re.escape(piece.strip()) for piece in message.split("...") if piece.strip()]
        assert re.search(r"[^\n]{0,60}".join(pieces), said), message
