# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Python reads this file at its start where this folder is on PYTHONPATH, and at no other time: see commands.py.

It imports nothing. It waits until the process imports PEFT, if ever, and then imports `peft_instance_prompt`, so that what a
script sets before its imports still counts, and a process without PEFT loses no time.
"""

import os
import sys


FOLDER = os.path.dirname(os.path.abspath(__file__))


class Companion:
    """An import finder: it lets the other finders find a package, and has `peft_instance_prompt` follow it."""

    def __init__(self, follow):
        self.follow = follow  # {name of a package: function that is called when the package has been imported}

    def find_spec(self, name, path=None, target=None):
        if name not in self.follow:
            return None
        for finder in list(sys.meta_path):
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is None:  # a folder of that name, which holds no package
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.follow[name]()
            del self.follow[name]  # not before: after an error, the next attempt must not pass without us

        spec.loader.exec_module = exec_module
        return spec


def follow_peft():
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
    from peft_instance_prompt import commands

    commands.choose_config()


def run_hidden():
    """This file hides the `sitecustomize` that the environment may have: run that, too."""
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
