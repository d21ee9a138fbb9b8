# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Each example runs in its short form, prints what its README says, and leaves an adapter that does something. One test per folder."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_instance_prompt.engine import scope
from smollm2 import load_smollm2


# An example shows correct code, of which this package has nothing to warn.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::UserWarning:peft_instance_prompt")]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path) -> Run:
    """Run a script of examples/ as its command line does, in a folder of its own; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scope, "_SAID", dict.fromkeys(scope._SAID, False))
    # What the scripts start inherits this package and not the one that is installed, if the two differ.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))

    def run(script: str, *args: str) -> str:
        # A script has to find the loaders itself: pytest's `pythonpath`, and what other tests have imported, are not there.
        monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder) != ROOT / "realdata"])
        for name in ("reviews", *(file.stem for file in (ROOT / "realdata").glob("*.py"))):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "argv", [script, *args])
        capfd.readouterr()
        start = time.perf_counter()
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        out, errors = capfd.readouterr()
        assert not re.search(r"peft_instance_prompt/\S+: \w*Warning", errors), errors  # of processes that it starts
        with Path("printed.txt").open("a") as file:  # beside what was written, for whoever looks into a failed test
            file.write(f"{script} {' '.join(args)}, {time.perf_counter() - start:.0f} s\n{out}\n")
        return out

    return run


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in an adapter's folder, all of them finite."""
    weights = load_file(folder / "adapter_model.safetensors")
    assert weights and all(bool(value.isfinite().all()) for value in weights.values())
    return weights


def moved(folder: Path, name: str = "up") -> bool:
    """Whether what starts at zero is zero no longer."""
    (value,) = (value for key, value in trained(folder).items() if key.rpartition(".")[2] == name)
    return bool(value.abs().max() > 0)


def test_finetune(run: Run, tmp_path: Path) -> None:
    out = run("finetune/finetune_iapt.py", "--short")
    assert re.search(r"accuracy on 16 held-out sentences without an adapter: 0\.\d{3}\n", out)
    assert re.search(r"accuracy on 16 held-out sentences with the adapter: \d\.\d{3} \(without: 0\.\d{3}\)\n", out)
    assert re.search(r"adapter: 556,800 trained parameters, [\d,]+ bytes \(\d+ KB\) in outputs/iapt\n", out)
    table = out.partition("human        with adapter             without adapter          text\n")[2]
    assert len(table.splitlines()) == 3, "a new process has loaded the adapter and generated"
    assert moved(tmp_path / "outputs/iapt")


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "args", "said"),
    [
        ("lpt", ["--generator", "mppg", "--layer", "20"], ""),
        ("dynamic_prompt", ["--preset", "adap_pos_ins_vec", "--tokens", "4"], "the first stage puts"),
        ("preft", ["--rank", "4"], ""),
    ],
)
def test_methods(run: Run, tmp_path: Path, method: str, args: list[str], said: str) -> None:
    out = run("methods/train.py", "--method", method, "--short", "--n-test", "4", *args)
    after = re.search(r"accuracy on 4 held-out sentences: \S+ without the adapter, (\S+) with it", out)[1]
    assert re.search(r"(\S+) after loading the adapter from outputs/" + method, out)[1] == after
    assert said in out
    config = json.loads((tmp_path / "outputs" / method / "adapter_config.json").read_text())
    assert config["peft_type"] == method.upper()
    expected = {
        "lpt": {"generator_type": "mppg", "insertion_layer": 20},
        "dynamic_prompt": {"num_virtual_tokens": 4},
        "preft": {"r": 4},
    }[method]
    assert expected.items() <= config.items()
    trained(tmp_path / "outputs" / method)


@pytest.mark.long
def test_methods_start_from_a_file(run: Run, tmp_path: Path) -> None:
    out = run("methods/pretrain_ipt.py", "--encoder", "mlp", "--short")
    assert re.search(r"[\d,]+ parameters in outputs/ipt-pretrained/mlp.safetensors", out)
    start = load_file(tmp_path / "outputs/ipt-pretrained/mlp.safetensors")
    run(
        "methods/train.py",
        *["--method", "ipt", "--strategy", "encoder", "--encoder", "mlp", "--steps", "1", "--lr", "1e-9"],
        *["--init-file", "outputs/ipt-pretrained/mlp.safetensors", "--n-test", "2"],
    )
    found = trained(tmp_path / "outputs/ipt")
    assert {"table.weight", "table.up", "encoder_hidden"} <= start.keys()
    for name, value in start.items():
        (same,) = (x for key, x in found.items() if key.endswith(f".{name}"))
        assert torch.allclose(same, value, atol=1e-6), name


@pytest.mark.long
def test_chat_sft(run: Run, tmp_path: Path) -> None:
    out = run("chat_sft/chat_sft.py", "--short")
    assert "right answers on 3 held-out sentences without an adapter: " in out
    assert "saved in outputs/chat_sft and loaded again" in out
    assert len(re.findall(r"humans: (?:positive|negative); with the adapter: .*; without: ", out)) == 3
    assert moved(tmp_path / "outputs/chat_sft")
    config = json.loads((tmp_path / "outputs/chat_sft/adapter_config.json").read_text())
    tokenizer = load_smollm2()[1]
    assert tokenizer.decode(config["response_template"]) == "<|im_start|>assistant\n"


@pytest.mark.long
def test_encoder(run: Run, tmp_path: Path) -> None:
    out = run("encoder/train.py", "--short")
    after = re.search(r"accuracy on 50 held-out sentences, 4 classes: \S+ before, (\S+) after\n", out)[1]
    assert f"{after} after loading adapter and head from outputs/encoder again" in out
    assert any("classifier" in key for key in trained(tmp_path / "outputs/encoder"))


@pytest.mark.long
@pytest.mark.parametrize("documents", ["adapter", "base"])
def test_retrieval(run: Run, tmp_path: Path, documents: str) -> None:
    pytest.importorskip("sentence_transformers")
    out = run("retrieval/train.py", "--short", "--steps", "2", "--n-test", "20", "--documents", documents)
    after = re.search(r"the right one of 20 second halves comes first: \S+ before, (\S+) after\n", out)[1]
    sides = ["query", "document"] if documents == "adapter" else ["query"]
    assert f"{after} after loading {' and '.join(sides)} from outputs/retrieval again" in out
    assert sorted(path.parent.name for path in Path("outputs/retrieval").glob("*/adapter_config.json")) == sorted(
        sides
    )
    found = [trained(tmp_path / "outputs/retrieval" / side) for side in sides]
    assert all(moved(tmp_path / "outputs/retrieval" / side, "b2") for side in sides)
    assert len(found) == 1 or any(not torch.equal(found[0][key], found[1][key]) for key in found[0]), (
        "each has its own"
    )


@pytest.mark.long
def test_seq2seq(run: Run, tmp_path: Path) -> None:
    out = run("seq2seq/train.py", "--short")
    assert "making a base model: a random T5 learns to copy and to reverse, 20 steps" in out
    after = re.search(r"as the rule wants: \S+ without the adapter, (\S+) with it", out)[1]
    assert f"{after} after loading the adapter from outputs/seq2seq again" in out
    assert "making a base model" not in run("seq2seq/train.py", "--short"), "it is kept"
    assert moved(tmp_path / "outputs/seq2seq")


@pytest.mark.long
def test_multitask(run: Run, tmp_path: Path) -> None:
    out = run("multitask/train.py", "--short")
    first, second = re.findall(
        r"accuracy on 25 held-out sentences, of 6 labels, .*: sentiment (\S+), domain (\S+)\n", out
    )
    assert first == second, "the loaded adapter does what the trained one does"
    config = json.loads((tmp_path / "outputs/multitask/adapter_config.json").read_text())
    assert config["num_tasks"] == 2
    (logits,) = (x for key, x in trained(tmp_path / "outputs/multitask").items() if key.endswith("representation"))
    assert logits.shape == (2, 4) and not torch.equal(*logits), "each task has a mixture of its own"


def test_adapters(run: Run, tmp_path: Path) -> None:
    """What the folder holds is looked at in test_trained_adapters.py."""
    out = run("adapters/make.py", "source", "--short", "--steps", "2", "--n-test", "4")
    assert re.search(r"^source: accuracy on 4 held-out texts: \S+ with the adapter, \S+ without, ", out, re.MULTILINE)
    assert moved(tmp_path / "outputs/adapters/source")
    card = (tmp_path / "outputs/adapters/source/README.md").read_text()
    assert re.search(r"examples/adapters/make\.py source --steps 2 .*--seed 0 --n-test 4`", card)
    assert "[More Information Needed]" not in card
    out = run("adapters/load_both.py", "A tender, funny film.")
    assert re.fullmatch(
        r"A tender, funny film\.\n    sentiment  'positive'\n    source     'movie'\n    __base__   '.+'\n", out
    )


@pytest.mark.long
def test_tenants(run: Run) -> None:
    out = run("tenants/tenants.py", "--short", "--steps", "2", "--tenants", "4")
    assert re.search(r"4 tenants of \d\.\d MB beside one base model", out)
    assert re.findall(r"^    (\S+) +\[", out, flags=re.MULTILINE) == ["mood-0", "thumbs-1", "stars-2", "__base__"]
    assert "each row says what it says alone: True" in out
    assert "while another thread loads a tenant and deletes it: True" in out


@pytest.mark.long
def test_stored_vectors(run: Run, tmp_path: Path) -> None:
    args = ["--short", "--n-test", "4", "--steps", "2", "--vectors"]
    out = run("stored_vectors/train.py", *args, "model")
    assert re.search(r"outputs/vectors/model-2-4-0: 20 vectors, computed in ", out)
    after = re.search(r"accuracy on 4 held-out sentences: \S+ without the adapter, (\S+) with it", out)[1]
    assert f"{after} after loading the adapter" in out
    assert (
        json.loads((tmp_path / "outputs/stored_vectors/adapter_config.json").read_text())["instance_embeds_dim"] == 576
    )
    assert "outputs/vectors/model-2-4-0: the vectors are there already" in run(
        "stored_vectors/train.py", *args, "model"
    )


@pytest.mark.long
def test_instance_report(run: Run, tmp_path: Path) -> None:
    out = run("instance_report/report.py", "--short")
    assert "16 instances, 95% intervals of 1000 bootstrap resamples" in out
    assert re.search(r"^loss, own - shuffled [+-]\d\.\d{4} \[", out, flags=re.MULTILINE)
    values = json.loads((tmp_path / "outputs/instance_report/report.json").read_text())["values"]["loss"]
    assert {name: len(value) for name, value in values.items()} == dict.fromkeys(
        ["own", "shuffled", "mean", "none"], 16
    )
    # The pictures of the same adapter.
    pytest.importorskip("matplotlib")
    args = ["--adapter", "outputs/instance_report", "--n-test", "8", "--output", "pictures"]
    out = run("instance_report/pictures.py", *args)
    for theme in ("light", "dark"):
        assert f"pictures/prompts-{theme}.png: " in out
        assert (tmp_path / f"pictures/prompts-{theme}.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (tmp_path / "outputs/report.html").read_text()


@pytest.mark.long
def test_launch_configs(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port]
    command += ["--config_file", str(EXAMPLES / "launch_configs/ddp.yaml"), str(EXAMPLES / "launch_configs/train.py")]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command += ["--short", "--steps", "2", "--n-test", "4"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"peft_instance_prompt/\S+: \w*Warning", done.stderr), done.stderr
    (tmp_path / "printed.txt").write_text(done.stdout)
    assert "2 process(es), whose trained weights are the same: True" in done.stdout
    assert "accuracy on 4 held-out sentences with the adapter from outputs/launched: " in done.stdout
    assert moved(tmp_path / "outputs/launched")


@pytest.mark.long
def test_serve_vllm(run: Run, tmp_path: Path) -> None:
    """What is trained here is served in tests/vllm_plugin."""
    out = run("serve_vllm/train.py", "served", "--short")
    for name, kind in (("sentiment", "IAPT"), ("source", "IDPG")):
        assert f"{name}={tmp_path / 'served' / name}" in out
        adapter = PeftModel.from_pretrained(load_smollm2()[0], tmp_path / "served" / name)
        assert adapter.peft_config["default"].peft_type == kind
