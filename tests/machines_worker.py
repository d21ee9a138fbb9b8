# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What `accelerate launch` runs in `test_machines.py`, in each process: `machines_worker.py {ddp,fsdp2,...} MODEL FOLDER KIND...`.

A training script: the `Trainer` trains an adapter, saves it and its checkpoints, and goes on from one of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import transformers as tf
from methods import METHODS
from peft import PeftModel, get_peft_model
from tiny import VOCAB, perturb


STEPS, SAVED, BATCH = 4, 2, 4


def on_cpus() -> None:
    """Let accelerate run FSDP on the processes of a CPU, over gloo: it asks for a GPU, and FSDP does not."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def arguments(folder: Path, processes: int) -> tf.TrainingArguments:
    return tf.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // processes,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=SAVED,
        report_to="none",
        disable_tqdm=True,
        ddp_backend="gloo",
    )


def rows(number: int = 4 * BATCH) -> list[dict]:
    """Rows of one length, with as many labels each."""
    ids = torch.randint(3, VOCAB, (number, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.where(torch.arange(9) > 4, -100)} for row in ids]


def trainer(kind: str, model: str, args: tf.TrainingArguments, seed: int = 0) -> tf.Trainer:
    """Made after the arguments, so that ZeRO-3 takes the base model apart while it is loaded."""
    tf.set_seed(seed)
    base = tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = get_peft_model(base, METHODS[kind](task_type="CAUSAL_LM"))
    moved(made, seed)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):  # which also switches drawing off
            module.p = 0.0
    return tf.Trainer(model=made, args=args, train_dataset=rows())


def moved(model: PeftModel, seed: int) -> None:
    """Weights far from their start, under ZeRO-3, too, where each process holds a part of the base model's."""
    perturb(model, seed)


def losses(trained: tf.Trainer) -> list[float]:
    return [float(entry["loss"]) for entry in trained.state.log_history if "loss" in entry]


def run(kind: str, model: str, folder: Path, processes: int) -> dict:
    """The losses of a run, and those of one that begins with other weights and goes on from the first one's checkpoint."""
    whole = trainer(kind, model, arguments(folder, processes))
    whole.train()
    whole.save_model(str(folder / "adapter"))
    again = trainer(kind, model, arguments(folder, processes), seed=9)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))
    again.save_model(str(folder / "resumed"))
    return {"losses": losses(whole), "resumed": losses(again)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    way, base, folder, *kinds = sys.argv[1:]
    if way == "fsdp2":
        on_cpus()
    for kind in kinds:
        result = run(kind, base, Path(folder, kind), processes=2)
        if os.environ["RANK"] == "0":
            torch.save(result, Path(folder, f"{kind}.pt"))
    torch.distributed.destroy_process_group()
