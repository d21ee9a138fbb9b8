# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What `accelerate launch` runs in each process of `test_machines.py`: `machines_worker.py WAY MODELS FOLDER KIND...`.

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

from peft_instance_prompt import IPTConfig


STEPS, SAVED, BATCH = 4, 2, 4


def on_cpus() -> None:
    """Let accelerate run FSDP on processes without a GPU, over gloo. It takes FSDP for a GPU's, which FSDP2 is not."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def arguments(folder: Path, processes: int) -> tf.TrainingArguments:
    """Of a run on the same batches, whatever the number of processes is."""
    return tf.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // processes,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=SAVED,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **({"ddp_backend": "gloo"} if processes > 1 else {"use_cpu": True}),
    )


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCAB, (4 * BATCH, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.where(torch.arange(9) > 4, -100)} for row in ids]


def trainer(kind: str, model: Path, args: tf.TrainingArguments, seed: int = 0) -> tf.Trainer:
    """The arguments are made before the model, so that ZeRO-3 takes its weights apart while they are loaded."""
    tf.set_seed(seed)  # as many starts as there are processes would be none: FSDP2 and ZeRO-3 take a part from each
    base = tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = perturb(get_peft_model(base, METHODS[kind](task_type="CAUSAL_LM")), seed)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):  # processes drop and draw differently
            module.p = 0.0
    return tf.Trainer(model=made, args=args, train_dataset=rows())


def losses(trained: tf.Trainer) -> list[float]:
    return [float(entry["loss"]) for entry in trained.state.log_history if "loss" in entry]


def train(kind: str, model: Path, folder: Path, processes: int) -> dict[str, list[float]]:
    """The losses of a run, and those of one that begins with other weights and goes on from the checkpoint of the first."""
    whole = trainer(kind, model, arguments(folder, processes))
    whole.train()
    whole.save_model(str(folder / "adapter"))
    again = trainer(kind, model, arguments(folder, processes), seed=9)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))
    again.save_model(str(folder / "resumed"))
    return {"losses": losses(whole), "resumed": losses(again)}


def attach(model: Path, folder: Path) -> torch.Tensor:
    """A fresh adapter that copies the embeddings of a model, which has to be run before it is known to be causal."""
    args = arguments(folder, 2)
    base = tf.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made: PeftModel = get_peft_model(base, IPTConfig(task_type="CAUSAL_LM", init="embeddings"))
    tables = {name: value for name, value in made.named_parameters() if name.endswith("table.weight")}
    assert len(tables) == 1 and args.output_dir
    return next(iter(tables.values())).detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    way, models, folder, *kinds = sys.argv[1:]
    if way == "fsdp2":
        on_cpus()
    results = {kind: train(kind, Path(models, "llama"), Path(folder, kind), processes=2) for kind in kinds}
    results["table"] = attach(Path(models, "bloom"), Path(folder))
    if os.environ["RANK"] == "0":
        torch.save(results, Path(folder, "results.pt"))
    torch.distributed.destroy_process_group()
