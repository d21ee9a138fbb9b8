# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The releases of vLLM that are served with. It knows no other name of vLLM, so that it can refuse any release with a sentence."""

from __future__ import annotations

import os

import vllm

from .package import SWITCH


# The minor releases that the tests pass on.
TESTED = ((0, 32), (0, 33))


def untested_release() -> str | None:
    """A complaint about the installed vLLM; None if it is a tested release, or the environment variable lets it pass."""
    if tuple(vllm.__version_tuple__[:2]) in TESTED or os.environ.get(SWITCH) == "1":
        return None
    tested = " and ".join(f"{major}.{minor}" for major, minor in TESTED)
    return (
        f"peft_instance_prompt is tested with vLLM {tested}; vLLM {vllm.__version__} is installed, and its instance-prompt adapters "
        f"are not served: prompts could be wrong without any error. Install vLLM {tested}, or set {SWITCH}=1 to try it."
    )
