# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""Print the names of what the installed package and its tests need, without their bounds: `make test-fresh` installs them."""

from importlib.metadata import requires

from packaging.requirements import Requirement


for requirement in map(Requirement, requires("peft-instance-prompt")):
    if requirement.marker is None or requirement.marker.evaluate({"extra": "test"}):
        print(requirement.name)
