# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The families that the tests of `generate` share."""

from __future__ import annotations

import pytest


# gemma3 has sliding layers, and both rows are longer than its window.
@pytest.fixture(params=["llama", "gemma3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param
