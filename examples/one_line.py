# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""What an example says in one line: that a package is missing, that it was stopped, and that its form is the short one."""

import sys


def say(kind, error, traceback):
    """In place of a traceback, where there is nothing to mend in the code. `sys.excepthook` calls this."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError):
        package = (error.name or str(error)).partition(".")[0]
        print(f"The package {package!r} is missing: pip install {package.replace('_', '-')}", file=sys.stderr)
    elif issubclass(kind, ImportError):  # a library misses another package, or one in a newer release
        print(str(error).strip().partition("\n")[0], file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def short_form(steps):
    print(f"short form: {steps} steps, scores mean nothing", flush=True)


sys.excepthook = say
