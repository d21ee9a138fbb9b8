# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`accelerate launch` with the configs of examples/launch_configs: two processes on one machine, and one on each of two.

A machine is a launcher of its own here; they meet over the loopback. One launch serves all methods, since it is the imports that take
time. `make test-machines` runs this file, in an environment with DeepSpeed; elsewhere it is skipped.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import machines_worker
import pytest
import torch
from methods import KINDS
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import assert_same, causal_lm


pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="`make test-machines` has DeepSpeed"),
]
TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "launch_configs"
WAYS = {"ddp": {"ACCELERATE_USE_CPU": "true"}, "fsdp2": {}, "deepspeed_zero3": {"DS_ACCELERATOR": "cpu"}}
TIMEOUT = 1500  # of a launch; DeepSpeed compiles its operators when it runs for the first time


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "bloom"):
        causal_lm(family).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What one process makes of the same batches."""
    folder = tmp_path_factory.mktemp("alone")
    results = {kind: machines_worker.train(kind, models / "llama", folder / kind, processes=1) for kind in KINDS}
    return {kind: {**result, "weights": weights(folder, kind, "adapter")} for kind, result in results.items()}


def weights(folder: Path, kind: str, which: str) -> dict[str, torch.Tensor]:
    return load_file(folder / kind / which / "adapter_model.safetensors")


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def launch(way: str, machines: int, models: Path, folder: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
    command += ["--config_file", str(CONFIGS / f"{way}.yaml"), "--main_process_port", free_port()]
    script = [str(TESTS / "machines_worker.py"), way, str(models), str(folder), *KINDS]
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        **WAYS[way],
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    launchers = []
    for rank in range(machines):
        place = ["--num_machines", str(machines), "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        if way == "deepspeed_zero3":
            place += ["--deepspeed_multinode_launcher", "standard"]
        with (folder / f"{rank}.log").open("w") as log:
            launchers.append(
                subprocess.Popen(
                    [*command, *(place if machines > 1 else []), *script],
                    env=env,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        codes = [launcher.wait(timeout=TIMEOUT) for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGTERM)  # the launcher and its processes
    assert codes == [0] * machines, "\n".join(log.read_text()[-5000:] for log in sorted(folder.glob("*.log")))


@pytest.fixture(scope="module", params=[1, 2], ids=["one_machine", "two_machines"])
def machines(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module", params=WAYS)
def launched(
    request: pytest.FixtureRequest, machines: int, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp(f"{request.param}-{machines}")
    launch(request.param, machines, models, folder)
    return folder


def test_processes_are_as_one(kind: str, launched: Path, alone: dict[str, dict], models: Path) -> None:
    found = torch.load(launched / "results.pt")[kind]
    assert len(found["losses"]) == machines_worker.STEPS
    assert found["losses"] == pytest.approx(alone[kind]["losses"], rel=1e-4)
    # What the processes saved together is the adapter that one would have trained. Adam makes a whole step of what is rounding
    # where there is no gradient, so it is not weights that are compared, but what they do.
    ids = torch.stack([row["input_ids"] for row in machines_worker.rows()])
    trained = PeftModel.from_pretrained(causal_lm(), launched / kind / "adapter")
    start = machines_worker.trainer(kind, models / "llama", machines_worker.arguments(launched, 1)).model
    with torch.no_grad():
        together, before = trained.eval()(ids).logits, start.eval()(ids).logits
        set_peft_model_state_dict(trained, alone[kind]["weights"])
        assert_same(together, trained(ids).logits, 1e-3)
    assert (together - before).abs().max() > 1e-2, "nothing was learned"


def test_resuming_goes_on_as_if_never_stopped(kind: str, launched: Path) -> None:
    found = torch.load(launched / "results.pt")[kind]
    assert found["resumed"] == pytest.approx(found["losses"], rel=1e-5)  # those up to the checkpoint are read from it
    whole, resumed = (weights(launched, kind, which) for which in ("adapter", "resumed"))
    assert whole.keys() == resumed.keys() and whole
    for name, value in whole.items():
        assert_same(resumed[name], value, 1e-5)


def test_an_adapter_is_attached_to_weights_that_were_taken_apart(launched: Path) -> None:
    assert torch.load(launched / "results.pt")["table"].equal(causal_lm("bloom").get_input_embeddings().weight)
