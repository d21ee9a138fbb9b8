# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`python -m peft_instance_prompt run TOOL ...`: run a tool that does not import this package, with this package's methods.

PEFT knows the methods once this package is imported, and a tool's command line has no place for an import. So `run` puts the folder
`startup/` on PYTHONPATH and replaces its own process with the tool. Each Python in it, child processes too, reads
`startup/sitecustomize.py` at its start, which imports this package right after PEFT.

`python -m peft_instance_prompt env` prints the same settings for a shell.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME


LONGEST_PATH = 4095  # bytes
STARTUP = str(Path(__file__).parent / "startup")
# Environment variables, which child processes inherit. `startup/sitecustomize.py` holds a copy of the name in `CONFIG`.
IMPORTS = "PEFT_INSTANCE_PROMPT_IMPORT"
CONFIG = "PEFT_INSTANCE_PROMPT_CONFIG"


# ------------------------------------------------------------------------------------------------- in a tool's process


def import_methods() -> None:
    """Import the modules that `--import` named, which register further methods."""
    for name in filter(None, os.environ.get(IMPORTS, "").split(",")):
        import_module(name)


def choose_config() -> None:
    """Replace `trl.get_peft_config`, which makes LoRA's configs only, by a function that returns the config of `--peft-config`.

    Raises:
        RuntimeError: The installed TRL has no `get_peft_config`.
    """
    trl = sys.modules["trl"]
    if "get_peft_config" not in dir(trl):
        raise RuntimeError("`--peft-config` needs the function `trl.get_peft_config`, which this TRL does not have.")
    trl.get_peft_config = chosen_config  # type: ignore[attr-defined]


def chosen_config(model_args: Any) -> PeftConfig:
    """The config of `--peft-config`. TRL calls this with its `model_args`, whose task type alone counts.

    Raises:
        ValueError: `model_args` set one of TRL's LoRA options, which would have no effect.
    """
    path = os.environ[CONFIG]
    without_effect = [
        f"--{field.name}"
        for field in fields(model_args)
        if (field.name.startswith("lora_") or field.name in ("use_rslora", "use_dora"))
        and field.name != "lora_task_type"
        and getattr(model_args, field.name) != field.default
    ]
    if without_effect:
        raise ValueError(f"{', '.join(without_effect)} would have no effect: the adapter's config is {path}.")
    config = read_config(path, task_type=model_args.lora_task_type)
    print(f"peft_instance_prompt: the adapter is a {type(config).__name__} from {path}", file=sys.stderr)
    return config


def read_config(path: str | os.PathLike, **defaults: Any) -> PeftConfig:
    """The config of a fresh adapter, from a file or an adapter's folder.

    Args:
        path (`str`): A YAML or JSON file with the fields of a config, `peft_type` among them, or a folder with an
            `adapter_config.json`.
        **defaults: Values of fields that the file does not give.

    Raises:
        ValueError: The file cannot be read, names no method that PEFT knows, or holds values that the method refuses.
    """
    shown = str(path)[:200]
    try:
        file = Path(path, CONFIG_NAME) if Path(path).is_dir() else Path(path)
        if file.exists() and not file.is_file():  # a pipe or a device may never end
            raise ValueError(f"{file} must be a file with the config of an adapter; it is no regular file.")
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{shown} cannot be read as the config of an adapter: {why}.") from error
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind.upper() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(f"{file} must be the fields of a config, with a `peft_type` among {known}; got {kind!r}.")
    given = {**defaults, **{name: value for name, value in content.items() if name != "peft_type"}}
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()](**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no config of {kind.upper()}: {error}") from error


# ---------------------------------------------------------------------------------------------------- the two commands


def settings(options: argparse.Namespace) -> dict[str, str]:
    """The environment variables under which every Python imports this package right after PEFT.

    Raises:
        ValueError: A module of `--import` cannot be imported, or `--peft-config` names no valid config.
    """
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != STARTUP]
    found = {"PYTHONPATH": os.pathsep.join([STARTUP, *paths])}
    if options.imports:
        found[IMPORTS] = ",".join(options.imports)
        try:
            for name in options.imports:
                import_module(name)
        except (ImportError, TypeError, ValueError) as error:  # the last two: a relative or an empty name
            raise ValueError(f"`--import` names a module that cannot be imported: {error}.") from error
    if options.peft_config is not None:
        read_config(options.peft_config)
        found[CONFIG] = os.path.abspath(options.peft_config)
    return found


def find_tool(tool: Sequence[str], module: Sequence[str] | None) -> list[str]:
    """The command line of a tool: a module, a Python script, or a command of this environment or on the PATH.

    Raises:
        ValueError: No tool is named, or none has that name.
    """
    if module is not None:
        if not module:
            raise ValueError("Name a module after `-m`.")
        return [sys.executable, "-m", *module]
    if not tool:
        raise ValueError("Name a tool to run: a script, `-m module`, or a command such as `lm_eval`.")
    name, *rest = tool
    if len(os.fsencode(name)) > LONGEST_PATH:
        raise ValueError(f"There is no tool of the name {name[:40]!r}..., which has {len(name)} letters.")
    if name.endswith(".py") or Path(name, "__main__.py").is_file():
        if not Path(name).exists():
            raise ValueError(f"There is no script {name!r}.")
        return [sys.executable, name, *rest]
    command = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if command is None:
        raise ValueError(
            f"There is no command {name!r}, neither beside {sys.executable} nor on the PATH. Modules are run with `-m`."
        )
    return [command, *rest]


def main(command: str, arguments: Sequence[str]) -> int:
    """`run` replaces this process with the tool; `env` prints the settings and returns 0. Both return 2 after an error."""
    parser = argparse.ArgumentParser(
        prog=f"python -m peft_instance_prompt {command}",
        description={
            "run": "Run a tool that does not import peft_instance_prompt, with its methods.",
            "env": "Print settings for a shell's `eval`, under which every Python imports peft_instance_prompt right after PEFT.",
        }[command],
    )
    parser.add_argument(
        "--peft-config",
        metavar="PATH",
        help="what `trl.get_peft_config` returns: a YAML or JSON file with a config's fields, or an adapter's folder",
    )
    parser.add_argument(
        "--import", dest="imports", action="append", metavar="MODULE", help="another package that registers methods"
    )
    if command == "run":
        parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module to run, with its arguments")
        parser.add_argument("tool", nargs=argparse.REMAINDER, help="a script or a command to run, with its arguments")
    options = parser.parse_args(arguments)
    try:
        found = settings(options)
        line = find_tool(options.tool, options.module) if command == "run" else []
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if command == "env":
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in found.items()))
        return 0
    os.environ.update(found)
    sys.stdout.flush()
    os.execv(line[0], line)
