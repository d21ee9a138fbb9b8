# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The command `peft-instance-prompt`: what it says of good folders, and how it refuses broken ones."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import runpy
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny
import torch
from folders import change_config, change_weights
from methods import METHODS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from peft_instance_prompt import IAPTConfig, __version__
from peft_instance_prompt.__main__ import COMMANDS, main


def save(folder: Path, method: str = "iapt", family: str = "llama", **changes):
    model = get_peft_model(tiny.causal_lm(family), METHODS[method](task_type="CAUSAL_LM", **changes))
    model.save_pretrained(folder)
    return model


def inspect(folder: Path, capsys) -> dict:
    assert main([str(folder), "--json"]) in (0, 1)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", ["llama", "opt"])  # of one width, and with embeddings narrower than the layers
def test_every_method_is_known(tmp_path, capsys, method, family):
    model = save(tmp_path, method, family)
    assert main([str(tmp_path)]) == 0
    assert f"type           {model.peft_config['default'].peft_type.value}, for CAUSAL_LM" in capsys.readouterr().out
    found = inspect(tmp_path, capsys)
    own = [p for name, p in model.named_parameters() if f".{model.base_model.prefix}generator." in name]
    assert found["parameters"] >= sum(p.numel() for p in own)  # a shared parameter is saved under each of its names
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert found["bytes"] == len(data) and found["sha256"] == hashlib.sha256(data).hexdigest()
    layer = next(module for _, module in model.base_model._layers())
    assert found["generated_at"] == ["input" if d < 0 else d for d in layer.generators["default"].depths]
    assert found["stacks"] == [layer.info.name]
    assert found["hidden_size"] == 32 and found["num_layers"] == 3


def test_iapt_in_full(tmp_path, capsys):
    save(tmp_path)
    found = inspect(tmp_path, capsys)
    assert found["parameters"] == 2 * 32 * 8 * 3 + 2 * 4 * 8 * 3 + 12 * 3
    assert found["activation_coefficients"] == 36 and found["coefficients_out_of_range"] == {}
    assert found["dtypes"] == ["float32"] and found["num_virtual_tokens"] == 4
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "36 coefficients, 0 of them outside [-1, 1]" in text and f"{found['parameters']:,} parameters" in text


def first_number(end: str, value: float, place: int = 0):
    """Sets the first number of the tensor whose name ends so."""

    def edit(weights):
        (key,) = (key for key in weights if key.endswith(end))
        weights[key].view(-1)[place] = value

    return edit


last_number = functools.partial(first_number, place=-1)


def test_what_should_not_be_trusted(tmp_path, capsys):
    save(tmp_path)
    change_weights(tmp_path, first_number("generator.activation", 1.5))
    change_weights(tmp_path, last_number("generator.activation", -1.01))
    assert main([str(tmp_path)]) == 1
    out = [line for line in capsys.readouterr().out.splitlines() if "OUT OF RANGE" in line]
    assert len(out) == 1 and "2 value(s) of" in out[0] and "generator.activation" in out[0]
    assert sum(inspect(tmp_path, capsys)["coefficients_out_of_range"].values()) == 2


def test_a_classifier_with_its_head(tmp_path, capsys):
    base = AutoModelForSequenceClassification.from_config(tiny.configure("llama", num_labels=3))
    get_peft_model(base, IAPTConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert "for SEQ_CLS" in capsys.readouterr().out


def missing_config(folder):
    (folder / "adapter_config.json").unlink()


def corrupt_config(folder):
    (folder / "adapter_config.json").write_text("{")


def config_field(**fields):
    return lambda folder: change_config(folder, **fields)


def missing_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def cut_weights(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled_weights(folder):
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


def pipe_as_weights(folder):
    missing_weights(folder)
    os.mkfifo(folder / "adapter_model.safetensors")


def config_text(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def weights(edit):
    return lambda folder: change_weights(folder, lambda found: edit(found, min(found)))


BROKEN = {
    "holds no adapter_config.json": missing_config,
    "is no adapter's config": corrupt_config,
    "of the type 'XYZ', which is none of": config_field(peft_type="XYZ"),
    "`num_virtual_tokens` must be at least 1, got 0": config_field(num_virtual_tokens=0),
    "`bottleneck_dim` must be an integer": config_field(bottleneck_dim="8"),
    "does not say `hidden_size`": config_field(hidden_size=None),
    "no weights": missing_weights,
    "not a readable safetensors file": cut_weights,
    "a pickle, which can run any code": pickled_weights,
    "lack 1 tensor": weights(lambda found, key: found.pop(key)),
    "hold 1 tensor(s) that the config does not know, such as": weights(
        lambda found, key: found.update({f"{key}_more": found[key].clone()})
    ),
    "hold 1 tensor(s) that the config does not know": weights(
        lambda found, key: found.update({"base_model.model.q_proj.lora_A": found[key].clone()})
    ),
    "'base_model.model.lm_head.weight'": weights(
        lambda found, key: found.update({"base_model.model.lm_head.weight": torch.ones(tiny.VOCAB, 32)})
    ),
    "of another shape": weights(lambda found, key: found.update({key: found[key][:-1].clone()})),
    "with NaN or infinity": weights(lambda found, key: found[key].view(-1)[0].fill_(torch.nan)),
    "of this size cannot be made": config_field(num_virtual_tokens=2 * 10**9, bottleneck_dim=2 * 10**9),
    "is being rewritten": config_field(weights_digest="0"),
    "no regular file": pipe_as_weights,
    "is no adapter's config: RecursionError": config_text("[" * 100_000 + "]" * 100_000),
    "`peft_type` must be a text, got ['IAPT']": config_field(peft_type=["IAPT"]),
    "`peft_type` must be a text, got None": config_text("[]"),
    "where (3, 32, 6) is asked for": config_field(bottleneck_dim=6),
    "where (4, 32, 8) is asked for": config_field(num_layers=4),
    "for 1 stack(s)": config_field(target_modules=["model.layers", "other.layers"]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_folders_are_refused_in_one_sentence(tmp_path, capsys, message):
    save(tmp_path)
    BROKEN[message](tmp_path)
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and message in said.err
    assert said.err.count("\n") == 1 and said.err.endswith(".\n")


def refused(capsys, *words: str) -> str:
    """What is said on a command line that is refused: one sentence, and what to do."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1 and len(said.err) < 300
    return said.err.removeprefix("error: ").strip()


def test_words_that_are_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("outputs/iapt"))
    for word, meant in {
        "doctr": "doctor",
        "docter": "doctor",
        "rum": "run",
        "envs": "env",
        "version": "--version",
        "inspct": "inspect",
        "show": "inspect",
        "help": "--help",
    }.items():
        assert refused(capsys, word) == f"There is neither a folder nor a command {word!r}. Did you mean `{meant}`?"
    nothing = refused(capsys, "some/where")
    assert nothing.startswith(
        "There is neither a folder nor a command 'some/where'. The commands are inspect, doctor, run, env"
    )
    assert refused(capsys, "inspect", "outputs") == refused(capsys, "outputs")
    assert refused(capsys, "outputs") == "outputs holds no adapter_config.json. Did you mean outputs/iapt?"
    assert "is a file. Name the folder" in refused(capsys, "outputs/iapt/adapter_config.json")
    assert (
        "outputs/iapt/more is no adapter's folder"
        in (Path("outputs/iapt/more").mkdir(), refused(capsys, "outputs/iapt/more"))[1]
    )


@pytest.mark.parametrize(
    "words", [["FOLDER", "more"], ["FOLDER", "--jsn"], ["inspect"], ["inspect", "FOLDER", "more"], []]
)
def test_other_arguments_are_refused(tmp_path, capsys, words):
    save(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path) if word == "FOLDER" else word for word in words])
    assert end.value.code == 2 and "usage: python -m peft_instance_prompt" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"peft_instance_prompt {__version__}\n"


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_numbers_of_another_type_are_refused(tmp_path, capsys, dtype):
    save(tmp_path)
    change_weights(tmp_path, lambda found: found.update({key: w.to(dtype) for key, w in found.items()}))
    assert main([str(tmp_path)]) == 2
    assert "tensor(s) of another type of numbers, such as 'base_model." in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_floating_point_numbers_of_any_size_are_read(tmp_path, capsys, dtype):
    save(tmp_path)
    change_weights(tmp_path, lambda found: found.update({key: w.to(dtype) for key, w in found.items()}))
    assert inspect(tmp_path, capsys)["dtypes"] == [str(dtype).removeprefix("torch.")]


def test_other_folders_are_refused(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    get_peft_model(tiny.causal_lm(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "of the type 'LORA'" in capsys.readouterr().err


def test_inspect_is_what_a_folder_alone_says(tmp_path, capsys):
    save(tmp_path)
    said = [
        (main([*words, str(tmp_path), *flags]), capsys.readouterr())
        for flags in ([], ["--json"])
        for words in ([], ["inspect"])
    ]
    assert said[0] == said[1] and said[2] == said[3] and said[0][0] == 0 and said[0] != said[2]


def test_the_installed_command(capsys, monkeypatch):
    """What pip writes for `[project.scripts]`: a program that calls this function, under the name that its usage shows."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, target),) = project["scripts"].items()
    command = EntryPoint(name, target, "console_scripts").load()
    for words, usage in ([], "COMMAND ..."), (["inspect"], "inspect ADAPTER_FOLDER [--json]"):
        monkeypatch.setattr(sys, "argv", [f"/env/bin/{name}", *words])
        with pytest.raises(SystemExit):
            command()
        assert f"usage: peft-instance-prompt {usage}\n" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(f"\n  {one} " in shown for one in COMMANDS if not one.startswith("--"))


def test_as_a_module(tmp_path, capsys, monkeypatch):
    """What `python -m peft_instance_prompt` does."""
    save(tmp_path)
    monkeypatch.setattr(sys, "argv", ["peft_instance_prompt", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("peft_instance_prompt", run_name="__main__", alter_sys=True)
    assert end.value.code == 0 and capsys.readouterr().out.startswith("type           IAPT")
