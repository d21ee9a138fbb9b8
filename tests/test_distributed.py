# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0


"""Two processes do what one does with the same batches. One launch per way, for all methods: it is the imports that take time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
import yaml
from methods import KINDS
from peft import PeftModel
from tiny import assert_same, causal_lm


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "launch_configs"
WAYS = ("ddp", "fsdp2")


@pytest.fixture(scope="module", params=WAYS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(TESTS / "distributed_worker.py"), request.param, str(folder), *KINDS]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_are_as_one(kind: str, results: Path) -> None:
    model, optimizer = distributed_worker.start(kind)
    losses = []
    for step in range(distributed_worker.STEPS):
        optimizer.zero_grad()
        loss = model(**distributed_worker.rows(step)).loss
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    found = torch.load(results / f"{kind}.pt")
    assert_same(found["losses"], torch.stack(losses))
    assert found["gradients"].keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert_same(found["gradients"][name], gradient)
    # What rank 0 saved is the adapter that one process would have trained.
    again = PeftModel.from_pretrained(causal_lm(), results / kind)
    with torch.no_grad():
        inputs = distributed_worker.rows(9)
        assert_same(again.eval()(**inputs).logits, model(**inputs).logits, 1e-4)
    start, _ = distributed_worker.start(kind)
    with torch.no_grad():
        assert (again(**inputs).logits - start(**inputs).logits).abs().max() > 1e-2, "nothing was learned"


@pytest.mark.parametrize("name,kind_of", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero3", "DEEPSPEED")])
def test_the_configs_are_what_accelerate_reads(name: str, kind_of: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(file))  # it refuses keys that it does not know
    assert config.distributed_type == kind_of and config.num_processes == 2
    inner = {"ddp": {}, "fsdp2": config.fsdp_config, "deepspeed_zero3": config.deepspeed_config}[name]
    parser = __import__("accelerate.commands.launch", fromlist=["x"]).launch_command_parser()
    known = {action.dest for action in parser._actions}
    assert set(inner) <= known, "the launcher has no such option"
    assert yaml.safe_load(file.read_text())
