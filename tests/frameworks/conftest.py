# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The tests of training frameworks share frameworks.py, and are skipped where their framework is not installed."""

from __future__ import annotations

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parent))  # for frameworks.py
