# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
What must hold before a release: `make release-check` builds sdist and wheel into dist/ and runs this file in an environment that
holds the wheel and whatever pip chose beside it.

    python .ci/release_check.py FOLDER_OF_SMOLLM2

The version is the changelog's and the citation's; the wheel holds what it should and nothing else; the quickstart prints what the
tour says. It imports nothing of the project but the installed wheel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def check(held: bool, what: str) -> None:
    print(f"{'ok    ' if held else 'BROKEN'} {what}", flush=True)
    if not held:
        sys.exit(1)


def check_versions() -> None:
    installed = version("peft-instance-prompt")
    # Between two releases a section without a number stands above.
    heading = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    cited = re.search(r"^version: \"?([^\"\n]+)", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    check(
        heading is not None and heading[1] == installed, f"the newest numbered heading of CHANGELOG.md is {installed}"
    )
    check(cited is not None and cited[1] == installed, f"CITATION.cff has version {installed}")


def check_files() -> None:
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "peft_instance_prompt").rglob("*.py")}
    sources.add("peft_instance_prompt/py.typed")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    check(
        inside == sources,
        f"{wheel.name} holds the package: {len(inside)} files, {sorted(inside ^ sources) or 'no other'}",
    )
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    check(
        sources | {"LICENSE", "README.md", "pyproject.toml"} <= packed,
        f"{sdist.name} holds the package and its licence",
    )


def check_quickstart(model: str) -> None:
    """The quickstart, from the installed wheel, in an empty folder."""
    shown = re.search(r"```\n(trainable params:.*?)```", (ROOT / "docs" / "tour.md").read_text(), flags=re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", str(ROOT / "examples" / "quickstart.py")]
        environment = {**os.environ, "MODEL": model, "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(run.stderr[-2000:] if run.returncode else run.stdout)
    check(
        run.returncode == 0 and shown is not None and run.stdout == shown[1],
        "the quickstart prints what the documentation says",
    )


if __name__ == "__main__":
    check_versions()
    check_files()
    check_quickstart(sys.argv[1])
