# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What ends an example early is said in one line, whichever script it is; and none writes into the documentation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PLUGINS = ("axolotl", "ms_swift")  # run within these frameworks
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*/*.py") if path.parent.name not in PLUGINS)
# What the scripts import first. `import X` then fails, as if X were not installed.
PACKAGES = ("accelerate", "datasets", "huggingface_hub", "matplotlib", "numpy", "peft", "torch")
WITHOUT = f"import runpy, sys; sys.modules.update(dict.fromkeys({PACKAGES})); runpy.run_path(sys.argv[1], run_name='__main__')"


def run(code: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_a_missing_package_is_named(script: Path) -> None:
    if script.name == "client.py":
        pytest.skip("needs no package")
    done = run(WITHOUT, str(script))
    assert done.returncode == 1
    assert re.fullmatch(r"The package '(\w+)' is missing: pip install (\S+)\n", done.stderr)


@pytest.mark.parametrize("name", ["finetune/finetune_iapt.py", "serve_vllm/client.py"])
def test_ctrl_c(name: str) -> None:
    """While it works: the first thing that a script does with its arguments is in place of the work."""
    code = (
        "import argparse, runpy, signal, sys; sys.argv = sys.argv[1:]\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's children ignore it
        "argparse.ArgumentParser.parse_args = lambda *_: signal.raise_signal(signal.SIGINT)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run(code, str(ROOT / "examples" / name))
    assert done.stderr.endswith("\nstopped\n") and "Traceback" not in done.stderr
    assert done.returncode != 0


def test_other_errors_keep_their_traceback() -> None:
    done = run(f"import sys; sys.path.append({str(ROOT / 'examples')!r}); import one_line; 1 / 0")
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_outputs_are_no_part_of_the_documentation(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert '"docs' not in text and 'parents[2] / "docs' not in text
    if '"--short"' in text:  # the others take it from reviews.py
        assert "one_line.short_form(" in text


@pytest.mark.parametrize("folder", sorted({path.parent.name for path in SCRIPTS} | set(PLUGINS)))
def test_readme_or_site_names_each_example(folder: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert any(f"examples/{folder}" in page.read_text(encoding="utf-8") for page in pages)
