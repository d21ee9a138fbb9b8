# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""examples/axolotl, by axolotl's own commands: train, save, resume, load, generate. `make test-axolotl` installs what it needs."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from frameworks import ROOT, answer, make_base, run, same


pytestmark = pytest.mark.skipif(find_spec("axolotl") is None, reason="needs axolotl: make test-axolotl")
QUESTION = "Review: Fine."
# By the adapter, its fields: the first stands in the example's YAML.
ADAPTERS = {"iapt": {"num_virtual_tokens": 4, "bottleneck_dim": 16}, "preft": {"r": 4}}
SETTINGS = {"PYTHONPATH": "examples/axolotl", "AXOLOTL_DO_NOT_TRACK": "1"}

# What `axolotl inference` does, greedily: it samples, and has no option for that.
GENERATE = """
import sys
from axolotl.cli.config import load_cfg
from axolotl.cli.utils import load_model_and_tokenizer
cfg = load_cfg(sys.argv[1], lora_model_dir=sys.argv[2])
model, tokenizer, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
chat = [{"role": "user", "content": sys.argv[3]}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)
print("ANSWER " + repr(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
"""


def config(base: Path, out: Path, **changes) -> Path:
    """The example's YAML with a tiny model, fewer steps, and the rows in their order: axolotl draws another one when it resumes."""
    given = yaml.safe_load((ROOT / "examples/axolotl/iapt.yaml").read_text())
    brief = {"curriculum_sampling": True, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.05}
    folders = {"base_model": str(base), "output_dir": str(out), "dataset_prepared_path": str(out / "prepared")}
    file = out / "config.yaml"
    file.write_text(yaml.safe_dump({**given, **brief, **folders, **changes}))
    return file


def train(file: Path, fails: bool = False) -> str:
    return run(sys.executable, "-m", "axolotl.cli.train", file, fails=fails, **SETTINGS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def changes(adapter: str) -> dict:
    """What of the example's YAML is another one for this adapter."""
    return {} if adapter == "iapt" else {"adapter": adapter, "instance_prompt": ADAPTERS[adapter]}


@pytest.fixture(scope="module")
def trained(base: Path, changes: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(config(base, out, **changes))
    return out


def test_train_and_save(adapter: str, trained: Path) -> None:
    saved = json.loads((trained / "adapter_config.json").read_text())
    assert saved["peft_type"] == adapter.upper() and ADAPTERS[adapter].items() <= saved.items()
    assert not same(trained / "checkpoint-2", trained), "training moves the adapter"
    assert same(trained / "checkpoint-4", trained)


def test_resume(base: Path, changes: dict, trained: Path, tmp_path: Path) -> None:
    train(config(base, tmp_path, resume_from_checkpoint=str(trained / "checkpoint-2"), **changes))
    assert same(tmp_path, trained), "an interrupted run is the run"


def test_load_and_generate(base: Path, changes: dict, trained: Path, tmp_path: Path) -> None:
    """In a new process, by `lora_model_dir`: the answer is PEFT's own."""
    file = config(base, tmp_path, **changes)
    out = run(sys.executable, "-c", GENERATE, file, trained, QUESTION, **SETTINGS)
    assert f"ANSWER {answer(base, trained, QUESTION)!r}" in out
    assert answer(base, trained, QUESTION) != answer(base, None, QUESTION)


def test_a_misspelt_field_is_told(base: Path, tmp_path: Path) -> None:
    out = train(config(base, tmp_path, instance_prompt={"num_virtual_token": 4}), fails=True)
    assert "IAPTConfig" in out and "num_virtual_tokens" in out
