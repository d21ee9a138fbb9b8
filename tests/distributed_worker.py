# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0


"""What each process of `test_distributed.py` runs: `distributed_worker.py {ddp,fsdp2} FOLDER KIND...`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from methods import METHODS
from peft import PeftModel
from tiny import adapted, batch, causal_lm
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard


STEPS, LEARNING_RATE = 3, 0.05


def start(kind: str) -> tuple[PeftModel, torch.optim.Optimizer]:
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))  # in eval mode: no dropout, nothing is sampled
    return model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def rows(step: int) -> dict[str, torch.Tensor]:
    """The global batch of a step: four rows, of which each has as many tokens to learn, so that means can be averaged."""
    inputs = batch(9, 6, 8, 9, seed=step)
    return {**inputs, "labels": inputs["input_ids"].where(torch.arange(9) > 5, -100)}


def part(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[dist.get_rank() :: dist.get_world_size()] for name, value in inputs.items()}


def train(model, optimizer, backward) -> dict:
    """The steps, on this process's part of the batches, and what the first gradients and all losses were."""
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**part(rows(step))).loss
        backward(loss)
        losses.append(loss.detach())
        if step == 0:
            whole = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
            gradients = {n: getattr(g, "full_tensor", g.clone)() for n, g in whole.items()}
        optimizer.step()
    dist.all_reduce(losses := torch.stack(losses))
    return {"losses": losses / dist.get_world_size(), "gradients": gradients}


def ddp(folder: Path, kind: str) -> dict:
    accelerator = Accelerator()
    model, optimizer = start(kind)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel) and accelerator.num_processes == 2
    result = train(model, optimizer, accelerator.backward)
    accelerator.unwrap_model(model).save_pretrained(folder / kind, is_main_process=accelerator.is_main_process)
    return result


def fsdp2(folder: Path, kind: str) -> dict:
    model, optimizer = start(kind)
    # As accelerate and PEFT do it: around each layer, around each trainable leaf, and around the rest.
    leaves = [m for m in model.modules() if not list(m.children()) and getattr(m, "weight", None) is not None]
    for module in (*model.get_base_model().model.layers, *(leaf for leaf in leaves if leaf.weight.requires_grad)):
        fully_shard(module)
    fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    assert all(hasattr(p, "full_tensor") for p in model.parameters())
    result = train(model, optimizer, torch.Tensor.backward)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(folder / kind, state_dict=state, is_main_process=dist.get_rank() == 0)
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    way, folder, *kinds = sys.argv[1:]
    if way == "ddp":
        Accelerator()
    else:
        dist.init_process_group("gloo")
    assert dist.get_world_size() == 2 and dist.get_backend() == "gloo"
    for kind in kinds:
        result = {"ddp": ddp, "fsdp2": fsdp2}[way](Path(folder), kind)
        if dist.get_rank() == 0:
            torch.save(result, Path(folder) / f"{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()
