# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
A few tasks of BIG-bench, from the source distribution of the PyPI package `bigbench` (Apache-2.0, 358 MB, read once).

The data are those of A. Srivastava et al., "Beyond the Imitation Game", TMLR 2023, and of the authors that its task cards name: T.
Schuster et al. for vitaminc, and S. Mishra et al. for natural_instructions. They are not to be in a training corpus of a language
model, and their files say so with a canary string: do not republish what lies in the cache folder.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable

from pypi_assets import asset_folder, create_once, pip_download
from splits import three_splits


# Folder of the task in the distribution.
FOLDERS = {
    "vitaminc": "vitaminc_fact_verification",
    "intent": "intent_recognition",
    "question_type": "natural_instructions/subtask046_miscellaenous_question_typing",
    "answerable": "natural_instructions/subtask050_multirc_answerability",
    "overlap": "natural_instructions/subtask039_qasc_find_overlapping_words",
}
MAX_CHARS = 300  # of a text: longer ones, above all of vitaminc, are left out
INTENTS = {
    "add_to_playlist": "playlist",
    "book_restaurant": "restaurant",
    "get_weather": "weather",
    "play_music": "music",
    "search_screening_event": "screening",
    "search_creative_work": "creative",
    "rate_book": "rating",
}
TYPES = ("humans", "entity", "date", "quantity", "location", "organization")


def load_task(name: str, cache_dir: str | os.PathLike | None = None) -> list[dict]:
    """
    The examples of a task, in the order of the file, without those that are longer than 300 characters.

    Args:
        name (`str`): `"vitaminc"` (is a claim true, false or neither, given a sentence), `"intent"` (7 intents of utterances),
            `"question_type"` (the 6 commonest types of questions, of questions with one type), `"answerable"` (does a sentence answer
            a question; as many that it does as that it does not), or `"overlap"` (a word that two sentences share: the one
            task whose answer is free text).
        cache_dir (`str`, *optional*): See [`pypi_assets.asset_folder`].

    Returns:
        `list[dict]`: `{"text": ..., "label": ...}`; of `"overlap"` also `"answers"`, all that are right, of which `label` is the first.
    """
    if name not in FOLDERS:
        raise ValueError(f"name={name!r} is unknown, choose one of {', '.join(FOLDERS)}.")
    folder = asset_folder("bigbench", cache_dir)
    if not folder.is_dir():
        with create_once(folder) as scratch, pip_download("bigbench==1.0.0", source=True) as sdist:
            wanted = {
                f"bigbench-1.0.0/bigbench/benchmark_tasks/{path}/task.json": key for key, path in FOLDERS.items()
            }
            with tarfile.open(sdist) as archive:
                for member in archive:
                    if member.name in wanted:
                        (scratch / f"{wanted[member.name]}.json").write_bytes(archive.extractfile(member).read())
            if missing := set(wanted.values()) - {path.stem for path in scratch.iterdir()}:
                raise RuntimeError(f"The distribution of bigbench has no {', '.join(sorted(missing))}.")
    raw = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["examples"]
    examples = [example for item in raw if (example := READERS[name](item))]
    if name == "answerable":  # 95 of 100 are not
        yes = sum(example["label"] == "yes" for example in examples)
        no = [example for example in examples if example["label"] == "no"]
        keep = {id(example) for example in no[:: max(1, len(no) // yes)][:yes]}
        examples = [example for example in examples if example["label"] == "yes" or id(example) in keep]
    return [example for example in examples if len(example["text"]) <= MAX_CHARS]


def _choice(item: dict) -> str:
    return max(item["target_scores"], key=item["target_scores"].get)


def _vitaminc(item: dict) -> dict:
    return {"text": item["input"], "label": _choice(item).lower()}


def _intent(item: dict) -> dict:
    return {"text": item["input"].removeprefix("Utterance: "), "label": INTENTS[_choice(item)]}


def _question_type(item: dict) -> dict | None:
    label = item["target"][0].lower().rstrip(".")
    return {"text": item["input"], "label": label} if len(item["target"]) == 1 and label in TYPES else None


def _answerable(item: dict) -> dict:
    return {"text": item["input"], "label": item["target"][0].lower().rstrip(".")}


def _overlap(item: dict) -> dict | None:
    answers = list(dict.fromkeys(answer.strip().lower() for answer in item["target"] if answer.strip()))
    return {"text": item["input"], "label": answers[0], "answers": answers} if answers else None


READERS: dict[str, Callable[[dict], dict | None]] = {
    "vitaminc": _vitaminc,
    "intent": _intent,
    "question_type": _question_type,
    "answerable": _answerable,
    "overlap": _overlap,
}


# What decides which split an example goes to: the page of a claim, the question, the sentence. Others go by their whole text.
GROUPS: dict[str, Callable[[dict], str]] = {
    "vitaminc": lambda example: example["text"].split(":")[0],
    "question_type": lambda example: example["text"].split("(Answer")[0],
    "answerable": lambda example: example["text"].split("\n")[0],
}


def splits(name: str, most: tuple[int, int] = (200, 400), cache_dir: str | os.PathLike | None = None) -> dict:
    """Train, dev and test examples of a task, see [`splits.three_splits`]. No page of vitaminc stands in two of them."""
    examples = load_task(name, cache_dir)
    return three_splits(examples, **({"group": GROUPS[name]} if name in GROUPS else {}), most=most)


if __name__ == "__main__":
    for name in FOLDERS:
        parts = splits(name)
        print(f"{name}: " + ", ".join(f"{len(part)} {key}" for key, part in parts.items()))
        for example in parts["dev"][:2]:
            print(f"  {example['label']}: {example['text']!r}")
