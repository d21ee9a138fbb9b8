# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The command `peft-instance-prompt`, which is `python -m peft_instance_prompt`, too.

`inspect ADAPTER_FOLDER [--json]` looks into an adapter's folder, without its base model; the folder alone does the same. It makes the
checks of loading that need no base model. For tensors that are not the method's own, it checks the names only. The exit status is 0 if
all is well; 1 if the adapter can be loaded but should not be trusted (activation coefficients out of range); 2, with one sentence, if
it cannot be loaded.

The other commands are `doctor` (tools/doctor.py), and `run` and `env` (commands.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file

from . import __version__, commands
from .adapter_files import check_files, check_tensors, read_kind
from .attaching import PREFIX, expected_tensors, make_generator
from .config import InstanceConfig
from .engine.stack import StackInfo
from .generator import InstanceGenerator
from .nn.rational import GELU_FITS
from .tools import doctor


COMMANDS = ("inspect", "doctor", "run", "env", "--version", "--help")
SYNONYMS = {"show": "inspect", "info": "inspect", "check": "doctor", "help": "--help"}
SCRIPT = "peft-instance-prompt"  # of [project.scripts]
HELP = """Soft prompts that are generated from the input instance, as PEFT adapters.

commands:
  inspect ADAPTER_FOLDER  what an adapter's folder holds, and whether it can be loaded; `inspect` may be left out
  doctor                  check this package with the libraries that are installed
  run TOOL ...            run a tool that does not import this package, with its methods
  env                     print what to set in a shell for that"""

# A rational activation starts as a fit of GELU whose coefficients lie within 0.5 of zero. A coefficient multiplies x^j, and values in
# the bottleneck reach well beyond 1, so that from a coefficient of 1 on, high powers explode. Training went wrong, or the file is
# damaged.
COEFFICIENT_RANGE = (-1.0, 1.0)


def inspect_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """The facts about an adapter's folder, as a dict for JSON.

    Args:
        folder (`str`): The folder, as `save_pretrained` writes it.

    Returns:
        `dict`: Type, base model, sizes, stacks, depths, counts and digests, and the activation coefficients out of range.

    Raises:
        ValueError: The adapter cannot be loaded: a file is missing or corrupt, is of no method of this package, or config and
            weights do not fit. The message is one sentence.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_files(folder)
    weights_file = folder / SAFETENSORS_WEIGHTS_NAME
    if not weights_file.exists():
        raise ValueError(
            f"{folder} holds its weights as {WEIGHTS_NAME}, a pickle, which can run any code when it is read; save it as "
            f"{SAFETENSORS_WEIGHTS_NAME} first."
        )
    weights = load_file(weights_file)
    stacks = check_weights(config, weights, str(folder))
    generator = guess(config)
    learned = generator.activation_coefficients
    ends = tuple(f"generator.{name}" for name, parameter in generator.named_parameters() if parameter is learned)
    coefficients = {key: w.float() for key, w in weights.items() if key.endswith(ends)}
    low, high = COEFFICIENT_RANGE
    outside = {key: int(((w < low) | (w > high)).sum()) for key, w in coefficients.items()}
    return {
        "type": config.peft_type.value,
        "base_model": config.base_model_name_or_path,
        "task_type": getattr(config.task_type, "value", config.task_type),
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "stacks": stacks,
        "generated_at": ["input" if depth < 0 else depth for depth in generator.depths],
        **{name: getattr(config, name) for name in config.sized_by},
        "parameters": sum(w.numel() for w in weights.values() if w.is_floating_point()),
        "dtypes": sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()}),
        "bytes": weights_file.stat().st_size,
        "sha256": hashlib.sha256(weights_file.read_bytes()).hexdigest(),
        "activation_coefficients": sum(w.numel() for w in coefficients.values()),
        "coefficient_range": list(COEFFICIENT_RANGE),
        "coefficients_out_of_range": {key: number for key, number in outside.items() if number},
    }


def check_folder(folder: str) -> None:
    """Raise a ValueError if a folder is none, or holds adapters in its subfolders only.

    Args:
        folder (`str`): The word of the command line that should be an adapter's folder.
    """
    path = Path(folder)
    if path.is_dir():
        inside = sorted(path.glob(f"*/{CONFIG_NAME}"))
        if inside and not (path / CONFIG_NAME).is_file():
            raise ValueError(f"{folder} holds no {CONFIG_NAME}. Did you mean {inside[0].parent}?")
        return
    if path.exists():
        raise ValueError(f"{folder} is a file. Name the folder that {CONFIG_NAME} lies in.")
    meant = SYNONYMS.get(folder) or next(iter(get_close_matches(folder, COMMANDS, n=1)), None)
    cure = f"Did you mean `{meant}`?" if meant else f"The commands are {', '.join(COMMANDS)}."
    raise ValueError(f"There is neither a folder nor a command {folder!r}. {cure}")


def read_config(folder: Path) -> InstanceConfig:
    """The config in a folder. Raises a ValueError if there is none, or its method is none of this package's."""
    file = folder / CONFIG_NAME
    kind = read_kind(folder)
    if kind is None:
        raise ValueError(
            f"{folder} is no adapter's folder: it holds no {CONFIG_NAME}. Name what `save_pretrained` wrote."
        )
    own = doctor.registered_methods()
    if kind not in own:
        raise ValueError(f"{folder} holds an adapter of the type {kind!r}, which is none of {sorted(own)}.")
    try:
        config = own[kind].from_pretrained(str(folder))
    except TypeError as error:
        raise ValueError(f"{file} does not hold: {error}") from error
    for name in ("hidden_size", "num_layers", "target_modules"):
        if getattr(config, name) is None:
            raise ValueError(
                f"{file} does not say `{name}`, as the config of an adapter that was once in a model does."
            )
    return config


# The folder does not tell the widths e of the input embeddings and o of the last hidden states, here in units of the layers' width.
# Nearly always both are 1. Otherwise a generator is made for each of two values, and a shape that differs between them is not checked.
WIDTHS = (((1, 1), (1, 1)), ((2, 2), (3, 3)), ((2, 1), (3, 1)), ((1, 2), (1, 3)))


def guess(config: InstanceConfig, e: int = 1, o: int = 1, vocab_size: int = 64) -> InstanceGenerator:
    """The adapter's generator, without values, for a stack that is known from the config only."""
    d = config.hidden_size
    sizes = {"hidden_size": d, "embedding_size": d * e, "output_size": d * o, "vocab_size": vocab_size}
    known: dict[str, Any] = {"name": "", "layers_name": "", "num_layers": config.num_layers, "causal": True}
    return make_generator(config, StackInfo(**{**{f.name: None for f in fields(StackInfo)}, **known, **sizes}))


def check_weights(config: InstanceConfig, weights: dict[str, torch.Tensor], source: str) -> list[str]:
    """The names of the stacks that the weights are for. Raises a ValueError if the weights do not fit the config."""
    mark = f".{PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix}generator."
    stacks = sorted({key.removeprefix(PREFIX).partition(mark)[0].rpartition(".")[0] for key in weights if mark in key})
    if len(stacks) != len(config.target_modules):
        raise ValueError(
            f"The weights in {source} are for {len(stacks)} stack(s), the config is for {config.target_modules}."
        )
    beside = {key for key in weights if mark not in key and is_declared(config, key)}
    complaints = []
    for widths in WIDTHS:
        guesses = [guess(config, *pair, vocab_size=64 * n) for n, pair in enumerate(widths, 1)]
        expected = expected_tensors(config, dict.fromkeys(stacks, guesses))
        try:
            check_tensors(source, expected, weights, config.weights_digest, beside, needs_prefix=False)
        except ValueError as error:
            complaints.append(error)
        else:
            return stacks
    raise complaints[0]


def is_declared(config: InstanceConfig, key: str) -> bool:
    """Whether a tensor belongs to one of the config's `modules_to_save`, which are ends of names, or `saved_embedding_layers`."""
    parts = key.removeprefix(PREFIX).split(".")
    modules = [".".join(parts[:n]) for n in range(1, len(parts))]
    ends = tuple(config.modules_to_save or ())
    return any(module.endswith(ends) or module in (config.saved_embedding_layers or ()) for module in modules)


def as_text(found: dict[str, Any]) -> str:
    """The dict of [`inspect_folder`] as text, a line for each fact."""
    low, high = found["coefficient_range"]
    sized_by = PEFT_TYPE_TO_CONFIG_MAPPING[found["type"]].sized_by
    lines = [
        f"type           {found['type']}, for {found['task_type'] or 'no particular task'}",
        f"base model     {found['base_model'] or 'not named'}: {found['num_layers']} layers, hidden size {found['hidden_size']}",
        f"size           {', '.join(f'{name} {found[name]}' for name in sized_by)}",
        f"generated at   {', '.join(map(str, found['generated_at']))} of {', '.join(name or 'the model' for name in found['stacks'])}",
        f"weights        {found['parameters']:,} parameters, {', '.join(found['dtypes'])}, {found['bytes']:,} bytes",
        f"sha256         {found['sha256']}",
    ]
    if found["activation_coefficients"]:
        lines.append(
            f"activations    {found['activation_coefficients']} coefficients, "
            f"{sum(found['coefficients_out_of_range'].values())} of them outside [{low:g}, {high:g}]"
        )
    widest = max(abs(c) for fit in GELU_FITS.values() for part in fit for c in part)
    lines += [
        f"OUT OF RANGE   {n} value(s) of {key}, where the GELU that they start from lies within {widest:g}"
        for key, n in found["coefficients_out_of_range"].items()
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["doctor"]:
        return doctor.main(arguments[1:])
    if arguments[:1] in (["run"], ["env"]):
        return commands.main(arguments[0], arguments[1:])
    program = SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m peft_instance_prompt"
    named = arguments[:1] == ["inspect"]
    parser = argparse.ArgumentParser(
        prog=f"{program} inspect" if named else program,
        usage="%(prog)s ADAPTER_FOLDER [--json]" if named else "%(prog)s COMMAND ...",
        description="Look into an adapter's folder, without its base model." if named else HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="ADAPTER_FOLDER", help="as `save_pretrained` writes it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--version", action="version", version=f"peft_instance_prompt {__version__}")
    options, rest = parser.parse_known_args(arguments[1:] if named else arguments)
    warnings.simplefilter("ignore")
    try:
        check_folder(options.folder)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        found = inspect_folder(options.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a path that is too long, or a file that may not be read
        print(f"error: {options.folder[:200]} cannot be read: {error.strerror}.", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=2) if options.json else as_text(found))
    return int(bool(found["coefficients_out_of_range"]))


if __name__ == "__main__":
    sys.exit(main())
