# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""The tasks, by name; each has three splits that are always the same."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path


# The loaders of the data.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "realdata"))

import bigbench
import vader
from splits import three_splits


MAX_TRAIN = 2000  # "full" is this many at most, or half as many of each task of a mixture
QUESTIONS = {  # what a model that was not trained is asked
    **dict.fromkeys(vader.FILES, "Is this text positive or negative?"),
    "vitaminc": "Is the claim true, false or neither?",
    "intent": "Is this about a playlist, restaurant, weather, music, screening, creative work or rating?",
    "question_type": "Is the answer of the type humans, entity, date, quantity, location or organization?",
    "answerable": "Does the sentence answer the question, yes or no?",
    "overlap": "Which word do both sentences have?",
}
MIXTURE = ("movie", "tweet", "vitaminc", "intent", "question_type", "answerable", "overlap")
CLASSIFICATION = ("movie", "vitaminc", "intent", "question_type", "tweet", "answerable", "product", "editorial")


@dataclass(frozen=True)
class Task:
    """One task, or several that are learned together.

    Attributes:
        name: Its name.
        splits: Examples `{"text", "label"}`, and `"answers"` where any of several is right, by `"train"`, `"dev"`, `"test"`.
        labels: All labels, in alphabetic order; none of a task whose answers are free text.
        choices: What a classification head chooses from: in a mixture, the labels of all its tasks.
        parts: The tasks of a mixture, in order; of a task, itself.
    """

    name: str
    splits: dict[str, list[dict]]
    labels: tuple[str, ...]
    choices: tuple[str, ...] = ()
    parts: tuple[Task, ...] = ()

    @property
    def question(self) -> str:
        return QUESTIONS[self.name]

    def each(self) -> tuple[Task, ...]:
        return self.parts or (self,)

    def batches(self, steps: int, size: int, seed: int) -> Iterator[list[dict]]:
        """The training batches, the same for each method. Every row of a mixture is of each task with the same chance."""
        rng = random.Random(seed)
        streams = [_endless(part.splits["train"], rng) for part in self.each()]
        for _ in range(steps):
            yield [next(rng.choice(streams)) for _ in range(size)]


def _endless(examples: list[dict], rng: random.Random) -> Iterator[dict]:
    while True:
        yield from rng.sample(examples, len(examples))


def is_mixture(name: str) -> bool:
    return name == "mixture" or "+" in name


def load(name: str, size: str = "full", most: tuple[int, int] = (200, 400), free_text: bool = True) -> Task:
    """
    Load a task.

    Args:
        name (`str`): A domain of VADER, a task of `bigbench`, or `"mixture"`. A mixture of others is `"a+b"`.
        size (`str`, *optional*, defaults to `"full"`): How many training examples: a number, or `"full"` for at most 2,000.
        most (`tuple[int, int]`, *optional*): The most examples in dev and test, of each task.
        free_text (`bool`, *optional*): Whether `"mixture"` has tasks whose answers are free text.
    """
    if is_mixture(name):
        names = MIXTURE if name == "mixture" else name.split("+")
        parts = [_cut(load(part, size, most), MAX_TRAIN // 2) for part in names]
        parts = [part for part in parts if part.labels or free_text]
        choices = tuple(sorted({label for part in parts for label in part.labels}))
        return Task(name, {}, (), choices, tuple(replace(part, choices=choices) for part in parts))
    splits = _cached(name)
    labels = () if name == "overlap" else tuple(sorted({example["label"] for example in splits["train"]}))
    splits = {**splits, "dev": splits["dev"][: most[0]], "test": splits["test"][: most[1]]}
    return _cut(Task(name, splits, labels, labels), MAX_TRAIN if size == "full" else int(size))


def _cut(task: Task, n: int) -> Task:
    return replace(task, splits={**task.splits, "train": task.splits["train"][:n]})


def _cached(name: str) -> dict[str, list[dict]]:
    if name not in _SPLITS:
        _SPLITS[name] = _vader(name) if name in vader.FILES else bigbench.splits(name)
    return _SPLITS[name]


_SPLITS: dict[str, dict] = {}  # reading vitaminc takes seconds


def _vader(domain: str) -> dict[str, list[dict]]:
    """Ratings between -0.5 and 0.5 are neither and are left out, as are texts of more than 300 characters."""
    examples = [
        {"text": text, "label": "positive" if rating > 0 else "negative"}
        for text, rating in vader.load_sentences(domain)
        if abs(rating) >= 0.5 and len(text) <= bigbench.MAX_CHARS
    ]
    return three_splits(examples)
