# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Each example has a README and a test, and what pages say of examples is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name[0] not in "._")
FRAMEWORKS = ("axolotl", "ms_swift")  # run in environments of their own: tests/frameworks
PAGES = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
CODE = [
    path for folder in ("examples", "benchmarks", "peft_instance_prompt") for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("folder", [name for name in FOLDERS if name not in ("notebook", *FRAMEWORKS)])
def test_each_example_has_a_readme_a_test_and_a_short_form(folder: str) -> None:
    readme = (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
    assert "--short" in readme
    assert f"\ndef test_{folder}(" in (Path(__file__).parent / "test_examples.py").read_text()
    assert f"({folder}/README.md)" in (EXAMPLES / "README.md").read_text(), "the list of examples leaves it out"


@pytest.mark.parametrize("folder", FRAMEWORKS)
def test_each_framework_has_a_readme_a_test_and_a_target(folder: str) -> None:
    readme = (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
    assert (ROOT / f"tests/frameworks/test_{folder}.py").is_file()
    (target,) = set(re.findall(r"`make (test-\w+)`", readme))
    assert (
        f"\n{target}:" in (ROOT / "Makefile").read_text()
        and f"({folder}/README.md)" in (EXAMPLES / "README.md").read_text()
    )
    for named in re.findall(r"^\| `([\w.]+)` \|", readme, flags=re.MULTILINE):
        assert (EXAMPLES / folder / named).is_file(), f"the README names {named}"


@pytest.mark.parametrize("path", [*PAGES, *CODE], ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_of_examples_exist(path: Path) -> None:
    for named in re.findall(r"(?<![\w/])examples/[\w./-]*\w", path.read_text(encoding="utf-8")):
        assert (ROOT / named).exists(), f"{path.name} names {named}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_commands_have_the_options_that_a_readme_shows(folder: str) -> None:
    commands = re.findall(
        r"(examples/[\w/]+\.py)([^\n`#]*)", (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
    )
    assert commands or folder in ("notebook", *FRAMEWORKS)
    for script, rest in commands:
        known = (ROOT / script).read_text() + (EXAMPLES / "reviews.py").read_text()
        for option in re.findall(r"--[a-z-]+", rest):
            assert f'"{option}"' in known, f"{script} has no {option}"
