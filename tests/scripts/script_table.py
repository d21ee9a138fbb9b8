# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Which script runs with which method, found out by running it: `python tests/scripts/script_table.py --write`.

Each cell of the tables in docs/scripts.md is one script of this folder with one config. LoRA, as PEFT has it, runs through the
same scripts. An error that a library raises on purpose is a refusal, with its message; any other exception is a failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import linecache
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in (str(HERE), str(HERE.parent)) if folder not in sys.path]

import datasets  # noqa: E402
import peft_loops  # noqa: E402
import peft_trainer  # noqa: E402
import torch  # noqa: E402
import transformers as tf  # noqa: E402
import trl_preference  # noqa: E402
import trl_sft  # noqa: E402
from common import Job, check, load  # noqa: E402
from methods import METHODS, WITHOUT_SLOTS  # noqa: E402
from peft import LoraConfig, PeftConfig  # noqa: E402
from table_cells import Cell, footnotes, parsed, reasons, written  # noqa: E402

from peft_instance_prompt import InstanceConfig  # noqa: E402


ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "scripts.md"
COLUMNS = ["lora", *METHODS]


@dataclasses.dataclass
class Script:
    """One script, and what its config says.

    Attributes:
        run (`Callable`): Takes a config and a folder for the trainer, and returns the `Job`.
        base (`Callable`): The base model anew.
        task_type (`str`): Of the config.
        words (`dict`): What a config of ours says beside the method and the task; LoRA's says nothing more.
    """

    run: Callable[[PeftConfig, Path], Job]
    base: Callable[[], torch.nn.Module] = functools.partial(load, tf.AutoModelForCausalLM, "llama")
    task_type: str = "CAUSAL_LM"
    words: dict[str, Any] = dataclasses.field(default_factory=dict)


CHAT = {"response_template": "chat"}
COMMON = {
    field.name for field in dataclasses.fields(InstanceConfig)
}  # what a config of a method without slots can say
PLAIN = {"instruction_length": trl_sft.TEXT_LENGTH, "prompt_position": "end"}


def classifier(kind: str, auto: type, **kwargs: Any) -> Callable[[], torch.nn.Module]:
    return functools.partial(load, auto, kind, **kwargs)


GROUPS: dict[str, dict[str, Script]] = {
    "TRL: supervised fine-tuning": {
        "SFT, prompt and completion": Script(trl_sft.prompt_completion),
        "SFT, `messages`": Script(trl_sft.messages, words=CHAT),
        "SFT, `assistant_only_loss`": Script(
            functools.partial(trl_sft.messages, assistant_only_loss=True), words=CHAT
        ),
        "SFT, `text`": Script(trl_sft.text, words=PLAIN),
        "SFT, `packing`": Script(functools.partial(trl_sft.prompt_completion, packing=True, max_length=32)),
        "SFT, `padding_free`": Script(
            functools.partial(trl_sft.prompt_completion, padding_free=True, max_length=None)
        ),
    },
    "TRL: preferences and rewards": {
        "DPO": Script(trl_preference.dpo),
        "KTO": Script(trl_preference.kto),
        "GRPO": Script(trl_preference.grpo),
        "RLOO": Script(trl_preference.rloo),
        "reward model": Script(
            trl_preference.reward,
            classifier("llama", tf.AutoModelForSequenceClassification, num_labels=1),
            "SEQ_CLS",
        ),
    },
    "PEFT": {
        "causal": Script(peft_loops.causal),
        "seq2seq": Script(peft_loops.seq2seq, classifier("t5", tf.AutoModelForSeq2SeqLM), "SEQ_2_SEQ_LM"),
        "classification": Script(
            peft_loops.classification,
            classifier("bert", tf.AutoModelForSequenceClassification, num_labels=3),
            "SEQ_CLS",
        ),
        "tokens": Script(
            peft_trainer.token_classification,
            classifier("bert", tf.AutoModelForTokenClassification, num_labels=3),
            "TOKEN_CLS",
        ),
        "questions": Script(
            peft_trainer.question_answering, classifier("bert", tf.AutoModelForQuestionAnswering), "QUESTION_ANS"
        ),
        "several adapters": Script(peft_loops.several_adapters),
    },
}
SCRIPTS = {name: script for group in GROUPS.values() for name, script in group.items()}


def config(method: str, script: Script) -> PeftConfig:
    if method == "lora":
        return LoraConfig(task_type=script.task_type, r=4)
    words = script.words if method not in WITHOUT_SLOTS else {k: v for k, v in script.words.items() if k in COMMON}
    return METHODS[method](task_type=script.task_type, **words)


def run(name: str, method: str) -> Cell:
    """The outcome of one cell."""
    script = SCRIPTS[name]
    torch.manual_seed(0)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            check(script.run(config(method, script), Path(folder)), script.base)
        except Exception as error:
            return outcome(error)
    return Cell("works")


def outcome(error: Exception) -> Cell:
    """A refusal is what a `raise` of a library says; if it is not ours, its line is shown."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno).strip()
    if not line.startswith("raise") or isinstance(error, AssertionError):
        kind = "" if isinstance(error, AssertionError) else type(error).__name__ + ": "
        return Cell("fails", kind + sentence(error))
    file = Path(frame.filename).as_posix()
    upstream = re.search(r"/site-packages/((?!peft_instance_prompt/).*)", file)
    return Cell("refused", sentence(error) + (f" ({upstream[1]}, `{frame.name}`)" if upstream else ""))


def sentence(error: Exception) -> str:
    """The first sentence of a message, on one line."""
    line = " ".join(str(error).split()).replace(f"{ROOT}/", "")
    return line.split(". ")[0].rstrip(".") + "."


# ------------------------------------------------------------------------------------------------------------- the page


def title(method: str) -> str:
    """The method, and the words in its config that are not the defaults. Sizes are not told."""
    if method == "lora":
        return "LoRA"
    made = METHODS[method]()
    defaults = vars(type(made)())
    words = [f"{n}={v!r}" for n, v in vars(made).items() if isinstance(v, (str, bool)) and v != defaults[n]]
    return f"{type(made).__name__.removesuffix('Config')}{' `' + ', '.join(words) + '`' if words else ''}"


HEAD = """# Scripts of TRL and PEFT

`python tests/scripts/script_table.py --write` makes this page by running small scripts, written after TRL's and PEFT's, with each config
below, for four steps on a tiny model of random weights. From PEFT's LoRA to one of our methods only the config changes:

```diff
- peft_config = LoraConfig(task_type="CAUSAL_LM", r=4)
+ peft_config = IAPTConfig(task_type="CAUSAL_LM")
```

- *works* means all of this: each loss is finite; all weights of the adapter moved and none of the base model; no prompt read more
  tokens than the instruction has; saved and loaded, the adapter gives the same outputs and text; it has an effect on the states of the
  stack, and none when it is disabled.
- *refused*: a library raises an error on purpose. The sentence is below; if it is not ours, so are the file and the function.
- *fails*: another exception, or one of these does not hold.

`tests/scripts/test_script_table.py` runs some again. Trainers have their defaults (with gradient checkpointing), but bfloat16 is off.
"""
WORDS = {
    "`messages`, `assistant_only_loss`": '`response_template="chat"`',
    "`text`": f'`instruction_length={trl_sft.TEXT_LENGTH}`; with other methods than IAPT `prompt_position="end"`, too',
}


def page(results: dict[tuple[str, str], Cell]) -> str:
    """Each script and config, and a table of the pairs that do not work, with the numbers of their reasons."""
    notes: list[str] = []
    lines = [HEAD, "Three scripts need more than the method and the task in a config of ours:", ""]
    lines += ["| script | add |", "|---|---|", *(f"| {name} | {words} |" for name, words in WORDS.items()), ""]
    lines += ["## Scripts", "", "| library | scripts |", "|---|---|"]
    lines += [f"| {group} | {'; '.join(scripts)} |" for group, scripts in GROUPS.items()]
    lines += [
        "",
        "`several adapters` trains two adapters, loads both, switches between them, mixes them in one batch, and deletes one. PEFT's notebook",
        "then merges them (`add_weighted_adapter`), which prompts cannot.",
        "",
        "## Configs",
        "",
        *(f"- {title(method)}" for method in COLUMNS),
        "",
        "## Results",
        "",
        "Each script *works* with each config, but for these:",
        "",
        "| script | config | result |",
        "|---|---|---|",
    ]
    for (name, method), cell in results.items():
        if cell.what != "works":
            lines.append(f"| {name} | {title(method)} | {written(cell, notes)} |")
    return "\n".join([*lines, "", "## Reasons", "", *footnotes(notes), ""])


def read(text: str) -> dict[tuple[str, str], Cell]:
    """The cells of a page: each script that it lists with each config that it lists."""
    notes = reasons(text)
    methods = {title(method): method for method in COLUMNS}
    lines = text.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    names = [name for row in rows if row[0] in GROUPS for name in row[1].split("; ")]
    listed = [methods[line[2:]] for line in lines if line.startswith("- ") and line[2:] in methods]
    results = {(name, method): Cell("works") for name in names for method in listed}
    return results | {
        (row[0], methods[row[1]]): parsed(row[2], notes) for row in rows if len(row) == 3 and row[0] in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/scripts.md")
    parser.add_argument(
        "--only", default="", help="run the scripts only whose names contain this text, and print them"
    )
    parser.add_argument("--method", choices=COLUMNS, nargs="+", default=COLUMNS, help="with these methods only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in (name for name in SCRIPTS if args.only in name):
        for method in args.method:
            results[name, method] = run(name, method)
        print(f"{name:30}", *(results[name, method].what for method in args.method), flush=True)
        for why in sorted({results[name, method].why for method in args.method} - {""}):
            print(" " * 8 + why)
    if args.write and not args.only and args.method == COLUMNS:
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
