# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Imports `peft_instance_prompt` right after PEFT, in each Python whose PYTHONPATH holds this folder: see commands.py.

Python reads this file at its start. The file imports nothing until the process imports PEFT, so that a script's settings before its
imports still count, and a process without PEFT loses no time.
"""

import os
import sys


FOLDER = os.path.dirname(os.path.abspath(__file__))


class Companion:
    """An import finder. It lets the other finders find a package, and calls a function right after the package is imported."""

    def __init__(self, follow):
        self.follow = follow  # {name of a package: function to call after its import}

    def find_spec(self, name, path=None, target=None):
        if name not in self.follow:
            return None
        for finder in list(sys.meta_path):
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is None:  # a folder of that name without a package in it
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.follow[name]()
            del self.follow[name]  # last: after an error, the next import must call the function again

        spec.loader.exec_module = exec_module
        return spec


def follow_peft():
    """Import `peft_instance_prompt` and the modules of `run --import`; print a line if it is not installed for this Python."""
    try:
        from peft_instance_prompt import commands
    except ModuleNotFoundError as error:
        if error.name != "peft_instance_prompt":
            raise
        print(
            f"peft_instance_prompt is not installed for {sys.executable}, though PYTHONPATH holds {FOLDER}: PEFT will not know "
            "its methods there.",
            file=sys.stderr,
        )
    else:
        commands.import_methods()


def follow_trl():
    """Put the config of `run --peft-config` behind `trl.get_peft_config`."""
    from peft_instance_prompt import commands

    commands.choose_config()


def run_hidden():
    """Run the environment's own `sitecustomize`, if there is one: this file hides it."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != FOLDER]
    for finder in list(sys.meta_path):
        spec = finder.find_spec("sitecustomize", None)
        if spec is not None:
            from importlib.util import module_from_spec

            module = sys.modules["sitecustomize"] = module_from_spec(spec)
            spec.loader.exec_module(module)
            return


if "PEFT_INSTANCE_PROMPT_CONFIG" in os.environ:
    sys.meta_path.insert(0, Companion({"peft": follow_peft, "trl": follow_trl}))
else:
    sys.meta_path.insert(0, Companion({"peft": follow_peft}))
run_hidden()
