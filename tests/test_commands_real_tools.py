# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`python -m peft_instance_prompt run` with tools that never import the package, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from methods import METHODS
from peft import PeftConfig, PeftModel
from tiny import adapted, causal_lm, tokenizer

from peft_instance_prompt import IAPTConfig


ROOT = Path(__file__).parent.parent
IDS = torch.arange(3, 9)[None]


def start(*line: str, **env: str) -> subprocess.CompletedProcess:
    """Run a command with the package on the path, as it is for whoever installs it."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return subprocess.run(line, env={**os.environ, **own, **env}, capture_output=True, text=True, check=False)


def run(*line: str) -> subprocess.CompletedProcess:
    done = start(sys.executable, "-m", "peft_instance_prompt", "run", *map(str, line))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def test_trl_still_has_the_function() -> None:
    done = start(sys.executable, "-c", "import trl; assert 'get_peft_config' in dir(trl)")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def base(tmp_path: Path) -> str:
    causal_lm().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


SCRIPT = """
import multiprocessing, sys, torch
from peft import AutoPeftModelForCausalLM

def logits(folder):
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    return model(torch.arange(3, 9)[None]).logits.tolist()

if __name__ == "__main__":
    folder, out = sys.argv[1:]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        torch.save([logits(folder), pool.apply(logits, [folder])], out)
"""


@pytest.mark.slow
@pytest.mark.long
def test_accelerate_launch_and_its_workers(base: str, tmp_path: Path) -> None:
    """A launcher starts a script, which starts workers anew: no line of them knows of this package."""
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    rest = ["--cpu", "--num_processes", "1", script, tmp_path / "adapter", tmp_path / "out.pt"]
    run("accelerate", "launch", *rest)
    for found in torch.load(tmp_path / "out.pt"):
        torch.testing.assert_close(torch.tensor(found), model(IDS).logits, rtol=0, atol=1e-6)
    done = start(sys.executable, script, str(tmp_path / "adapter"), "x")
    assert done.returncode == 1 and "KeyError: 'IAPT'" in done.stderr, "without us it stays PEFT's error"


MESSAGES = [
    {"messages": [{"role": "user", "content": f"w{5 + i} w{6 + i}"}, {"role": "assistant", "content": f"w{8 + i}"}]}
    for i in range(8)
]


@pytest.mark.slow
@pytest.mark.long
def test_trl_sft(base: str, tmp_path: Path) -> None:
    """`trl sft` goes through accelerate to a script of TRL's, on chat data, with a YAML that chooses the method."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MESSAGES))
    config = {"peft_type": "IAPT", "num_virtual_tokens": 3, "response_template": "chat"}
    (tmp_path / "iapt.yaml").write_text(yaml.safe_dump(config))
    options = {
        "model_name_or_path": base,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "learning_rate": 0.1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "assistant_only_loss": True,
    }
    line = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = run("--peft-config", tmp_path / "iapt.yaml", "trl", "sft", *line)
    assert "the adapter is a IAPTConfig from" in done.stderr
    found = PeftConfig.from_pretrained(tmp_path / "out")
    assert isinstance(found, IAPTConfig) and found.num_virtual_tokens == 3 and found.task_type == "CAUSAL_LM"
    assert found.response_template == [5], "`w1`, which the tokenizer's chat template writes before an answer"
    model = PeftModel.from_pretrained(causal_lm(), tmp_path / "out").eval()
    with model.disable_adapter():
        bare = model(IDS).logits
    assert not torch.allclose(model(IDS).logits, bare, atol=1e-3)
