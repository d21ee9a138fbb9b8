# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The notebook runs from top to bottom in its short form (`make test-notebook`), and what is kept of a whole run is clean."""

from __future__ import annotations

import getpass
import json
import os
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/notebook/peft_instance_prompt.ipynb"


def texts(output: dict) -> str:
    """All text in an output: printed, shown, or of an error."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *(data.get(kind, "") for kind in ("text/plain", "text/html"))]
    return "".join(text if isinstance(text, str) else "".join(text) for text in parts)


def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_kept() -> None:
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1)), (
        "not run from top to bottom"
    )
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"
    said = "\n".join(map(texts, outputs))
    assert re.search(r"accuracy on \d{2,} held-out reviews: 0\.\d\d before, 0\.\d\d after \d{2,} steps", said), (
        "the short form"
    )
    assert "own - shuffled" in said


def test_outputs_name_no_machine() -> None:
    said = "\n".join(texts(output) for cell in cells() for output in cell["outputs"])
    found = re.findall(r"(?<![\w.])/(?:home|root|Users|tmp|work|usr|opt|var)/\S*|site-packages", said)
    assert not found, found
    user = getpass.getuser()
    assert user in ("root", "user") or user not in said


@pytest.mark.slow
def test_the_short_form_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="`make test-notebook` has it")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("SHORT", "1")
    # A kernel is a process of its own, which starts in another folder here.
    paths = [str(ROOT), str(ROOT / "realdata"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = "\n".join(texts(output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    assert re.search(r"accuracy on 8 held-out reviews: \d\.\d\d before, \d\.\d\d after 3 steps", said)
    after = re.search(r"(\d\.\d\d) after 3 steps", said)[1]
    assert f"accuracy after loading: {after}" in said
    assert "human: " in said and "mood: " in said and "__base__: " in said
    assert "8 instances, 95% intervals" in said
    assert (tmp_path / "outputs/notebook/mood/adapter_model.safetensors").is_file()
