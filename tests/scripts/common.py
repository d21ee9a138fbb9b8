# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the scripts of this folder share: a model folder to load from, small data, and what is checked of every run."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import torch
import transformers as tf
from peft import PeftModel
from tiny import causal_lm, encoder, pair, tokenizer

from peft_instance_prompt.engine.intercept import Generated, intercept


# What every trainer is told.
TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


@functools.cache
def hub(kind: str) -> str:
    """A folder with a tiny checkpoint and its tokenizer, as a script downloads one: "llama", "bert", or "t5"."""
    folder = tempfile.TemporaryDirectory(prefix=f"tiny-{kind}-")
    _folders.append(folder)
    model = {"llama": causal_lm, "bert": encoder, "t5": pair}[kind](kind)
    model.save_pretrained(folder.name)
    tokenizer().save_pretrained(folder.name)
    return folder.name


_folders: list[tempfile.TemporaryDirectory] = []  # which are removed when the process ends


def words(start: int, number: int) -> str:
    return " ".join(f"w{5 + (3 * start + 7 * i) % 80}" for i in range(number))


# Eight rows, with prompts of three to five words: `prompt` is answered by `good` rather than by `bad`.
ROWS = [
    {"prompt": words(i, 3 + i % 3), "good": " " + words(i + 5, 2 + i % 2), "bad": " " + words(40 + i, 2)}
    for i in range(8)
]
LONGEST = 5  # tokens of a prompt


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content.strip()}


def load(auto: type, kind: str, **kwargs) -> tf.PreTrainedModel:
    return auto.from_pretrained(hub(kind), dtype=torch.float32, **kwargs)


@dataclass
class Job:
    """A script between its set-up and its training.

    Attributes:
        model (`PeftModel`): The model with its adapter.
        train (`Callable`): Trains it, and returns the loss of each step.
        save (`Callable`): Takes a folder and saves the adapter there, in the way of the script.
        inputs (`dict`): The batch on which models are compared.
        instruction (`int`, *optional*): The number of tokens in the longest instruction; None: the whole row is the instance.
        trained (`set[str]`): The names of the weights that are to move. Defaults to those that require gradients now.
    """

    model: PeftModel
    train: Callable[[], list[float]]
    save: Callable[[Path], None]
    inputs: dict[str, torch.Tensor]
    instruction: int | None = None
    trained: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.trained = self.trained or trainable(self.model)


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def of_trainer(trainer: tf.Trainer, inputs: dict[str, torch.Tensor], instruction: int | None = None) -> Job:
    def train() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]

    return Job(trainer.model, train, lambda folder: trainer.save_model(str(folder)), dict(inputs), instruction)


def prompts(*texts: str) -> dict[str, torch.Tensor]:
    """Prompts as they are generated from: padded on the left."""
    return dict(tokenizer(side="left")(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False))


def must(condition: bool, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


@torch.no_grad()
def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The last states of the stack, which a head that is trained along does not touch, and what the head says."""
    model.eval()
    config = model.config
    if config.is_encoder_decoder:
        out = model(**inputs, decoder_input_ids=torch.full((len(inputs["input_ids"]), 3), 7))
        return [out.logits, out.logits]
    out = model(**inputs, output_hidden_states=True)
    return [out.hidden_states[-1], out.start_logits if "start_logits" in out else out.logits]


def text(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval().generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)


def distance(some: torch.Tensor, others: torch.Tensor) -> float:
    return float((some - others).abs().max() / others.abs().max().clamp(min=1))


@contextlib.contextmanager
def longest_instance(found: list[int]) -> Iterator[None]:
    """Note how many tokens each prompt is generated from, in all passes."""

    def note(made: Generated) -> None:
        if made.instances is not None:
            found.append(int(made.instances.mask.sum(1).max()))

    with intercept(note):
        yield


def check(job: Job, base: Callable[[], torch.nn.Module]) -> None:
    """Train, save, load, compare: what a user of the script would notice.

    Raises:
        AssertionError: A loss is not finite, weights did not move or those of the base model did, a prompt was generated from
            more than the instruction, the loaded adapter gives something else, or the adapter has no effect.
    """
    model = job.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = job.trained
    read: list[int] = []
    with longest_instance(read):
        losses = job.train()
    must(bool(losses) and all(map(isfinite, losses)), f"the losses are {losses}")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    must(moved <= wanted, f"training moved weights of the base model: {sorted(moved - wanted)[:2]}")
    must(bool(moved) and moved == wanted, f"training did not move {sorted(wanted - moved)[:2]}")
    if job.instruction is not None and read:
        must(max(read) <= job.instruction, f"a prompt was generated from {max(read)} tokens, not {job.instruction}")

    after = outputs(model, job.inputs)
    with tempfile.TemporaryDirectory() as folder:
        job.save(Path(folder))
        again = PeftModel.from_pretrained(base(), folder)
    must(max(map(distance, outputs(again, job.inputs), after)) < 1e-5, "what is loaded gives other outputs")
    if model.can_generate():
        must(torch.equal(text(again, job.inputs), text(model, job.inputs)), "what is loaded gives another text")
    bare = outputs(base(), job.inputs)
    must(distance(after[0], bare[0]) > 1e-3, "the adapter has no effect")
    with model.disable_adapter():
        must(distance(outputs(model, job.inputs)[0], bare[0]) < 1e-6, "disable_adapter leaves something")
