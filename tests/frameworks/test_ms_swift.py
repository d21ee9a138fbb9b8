# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""examples/ms_swift, by ms-swift's own commands: train, save, resume, load, generate. `make test-swift` installs what it needs."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from frameworks import ROOT, answer, make_base, run, same, script


pytestmark = pytest.mark.skipif(find_spec("swift") is None, reason="needs ms-swift: make test-swift")
QUESTION = "Review: Fine."
# By the file that names it, what the adapter's config has. The first is the one in sft.yaml.
ADAPTERS = {"iapt": {"num_virtual_tokens": 4}, "preft": {"r": 16}}


def sft(base: Path, out: Path, *options: str | Path, adapter: str = "iapt", fails: bool = False) -> str:
    """The README's command on a tiny model, whose type ms-swift does not find by itself."""
    settings = yaml.safe_load((ROOT / "examples/ms_swift/sft.yaml").read_text())
    assert settings["ENV"] == {"PEFT_INSTANCE_PROMPT_CONFIG": "examples/ms_swift/iapt.yaml"}
    settings["ENV"]["PEFT_INSTANCE_PROMPT_CONFIG"] = f"examples/ms_swift/{adapter}.yaml"
    file = out.with_suffix(".yaml")  # ms-swift copies it into its output folder
    file.write_text(yaml.safe_dump(settings))
    own = ["--model", base, "--model_type", "llama", "--template", "chatml", "--output_dir", out]
    brief = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--learning_rate", "0.05"]
    return run(script("swift"), "sft", file, *own, *brief, *options, fails=fails)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(base: Path, adapter: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    sft(base, out, adapter=adapter)
    return out


def test_train_and_save(adapter: str, trained: Path) -> None:
    config = json.loads((trained / "checkpoint-4/adapter_config.json").read_text())
    assert config["peft_type"] == adapter.upper() and config["task_type"] == "CAUSAL_LM"
    assert ADAPTERS[adapter].items() <= config.items()
    assert not same(trained / "checkpoint-2", trained / "checkpoint-4"), "training moves the adapter"


def test_resume(base: Path, adapter: str, trained: Path, tmp_path: Path) -> None:
    sft(base, tmp_path, "--resume_from_checkpoint", trained / "checkpoint-2", adapter=adapter)
    assert same(tmp_path / "checkpoint-4", trained / "checkpoint-4"), "an interrupted run is the run"


def test_load_and_generate(base: Path, trained: Path, tmp_path: Path) -> None:
    """In a new process, which learns of plugin and tuner from the checkpoint's args.json: the answer is PEFT's own."""
    questions, answers, saved = tmp_path / "q.jsonl", tmp_path / "a.jsonl", trained / "checkpoint-4"
    questions.write_text(json.dumps({"messages": [{"role": "user", "content": QUESTION}]}))
    greedy = ["--temperature", "0", "--max_new_tokens", "8"]
    run(script("swift"), "infer", "--adapters", saved, "--val_dataset", questions, "--result_path", answers, *greedy)
    said = json.loads(answers.read_text().splitlines()[-1])["response"]
    assert said == answer(base, saved, QUESTION) != answer(base, None, QUESTION)


def test_labels_that_are_cut_are_refused(base: Path, tmp_path: Path) -> None:
    """ms-swift's default cuts labels to their end; without the line in sft.yaml training stops and says what is missing."""
    out = sft(base, tmp_path, "--use_logits_to_keep", "true", fails=True)
    assert "cannot tell instruction from response without `labels`" in out
