# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The fields that all methods have."""

from __future__ import annotations

import json

import pytest
from methods import METHODS
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import adapted, causal_lm

from peft_instance_prompt.config import check_weights


BAD = [
    ("num_virtual_tokens", 0, ValueError, "at least 1, got 0"),
    ("num_virtual_tokens", -3, ValueError, "at least 1, got -3"),
    ("num_virtual_tokens", 2.0, TypeError, "integer, got 2.0"),
    ("num_virtual_tokens", True, TypeError, "integer, got True"),
    ("num_virtual_tokens", None, TypeError, "integer, got None"),
    ("prompt_position", "behind", ValueError, "'before'.*'behind'"),
    ("prompt_position", None, ValueError, "'before'.*None"),
    ("init_weights", "papers", ValueError, "'paper'.*'papers'"),
    ("init_weights", 1, ValueError, "got 1"),
    ("condition", "shuffled", ValueError, "'instance', 'constant'.*'shuffled'"),
    ("layers_to_transform", [], ValueError, r"got \[\]"),
    ("layers_to_transform", [0, -1], ValueError, r"got \[0, -1\]"),
    ("layers_to_transform", -1, ValueError, "got -1"),
    ("layers_to_transform", ["0"], ValueError, r"\['0'\]"),
    ("layers_to_transform", "all", ValueError, "'all'"),
    ("response_template", "", ValueError, "got ''"),
    ("response_template", [], ValueError, r"got \[\]"),
    ("response_template", [3, -4], ValueError, r"\[3, -4\]"),
    ("response_template", ["a"], ValueError, r"\['a'\]"),
    ("response_template", 7, ValueError, "got 7"),
    ("target_modules", 3, TypeError, "got 3"),
    ("target_modules", [3], TypeError, r"\[3\]"),
    ("exclude_modules", [None], TypeError, r"\[None\]"),
    ("modules_to_save", "score", TypeError, "list of names.*'score'"),
    ("hidden_size", 0, ValueError, "at least 1, got 0"),
    ("num_layers", "3", TypeError, "integer, got '3'"),
    ("layers_to_transform", True, ValueError, "got True"),
    ("dropout", "x", TypeError, "number, got 'x'"),
    ("dropout", 1.0, ValueError, "got 1.0"),
    ("dropout", -0.1, ValueError, "got -0.1"),
    ("instance_scale", "x", TypeError, "number, got 'x'"),
]


@pytest.mark.parametrize(("name", "value", "error", "says"), BAD, ids=[f"{row[0]}={row[1]!r}" for row in BAD])
def test_bad_field(kind: str, name: str, value, error: type, says: str) -> None:
    if not hasattr(METHODS[kind](), name):
        pytest.skip(f"{kind} has no field {name}")
    with pytest.raises(error, match=f"`{name}`.*{says}"):
        METHODS[kind](**{name: value})


@pytest.mark.parametrize("name", ["bottleneck_dimension", "num_virtual_token", "inner_dim"])
def test_unknown_field(kind: str, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        METHODS[kind](**{name: 3})


def test_json_round_trip(method: str, tmp_path) -> None:
    fields = {
        "num_virtual_tokens": 3,
        "response_template": [5, 6],
        "target_modules": {"model.layers"},
        "exclude_modules": ("vision",),
        "modules_to_save": ["lm_head"],
        "task_type": "CAUSAL_LM",
    }
    config = METHODS[method](**fields)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == config.peft_type.name
    assert saved["target_modules"] == ["model.layers"] and saved["exclude_modules"] == ["vision"]
    save_file({}, tmp_path / "adapter_model.safetensors")
    for loaded in (PeftConfig.from_pretrained(tmp_path), type(config).from_pretrained(str(tmp_path))):
        assert type(loaded) is type(config)
        assert {**loaded.to_dict(), "inference_mode": False} == {**config.to_dict(), "inference_mode": False}


def test_ranges_and_tuples_become_lists(kind: str) -> None:
    if not hasattr(METHODS[kind](), "layers_to_transform"):
        pytest.skip(f"{kind} has no field layers_to_transform")
    assert METHODS[kind](layers_to_transform=range(1, 3)).layers_to_transform == [1, 2]
    assert METHODS[kind](layers_to_transform=(2, 0)).layers_to_transform == [2, 0]
    assert METHODS[kind](layers_to_transform=2).layers_to_transform == 2


@pytest.fixture
def saved(kind: str, tmp_path):
    adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    return tmp_path


def assert_refused(folder, says: str) -> None:
    base = causal_lm()
    before = {name for name, _ in base.named_modules()}
    with pytest.raises(ValueError, match=says):
        PeftModel.from_pretrained(base, folder)
    assert {name for name, _ in base.named_modules()} == before, "the base model was changed"


def test_sizes_are_filled_in(saved) -> None:
    config = PeftConfig.from_pretrained(saved)
    assert (config.hidden_size, config.num_layers) == (32, 3)
    assert config.target_modules == ["model.layers"]
    check_weights(saved)


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "not a readable"), (b"no tensors here", "not a readable"), (None, "is missing")]
)
def test_broken_weights(saved, content: bytes | None, says: str) -> None:
    file = saved / "adapter_model.safetensors"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert_refused(saved, f"{says}.*" if content is None else f"adapter_model.safetensors.*{says}")


def test_truncated_weights(saved) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert_refused(saved, "not a readable")


def test_weights_of_another_shape(saved) -> None:
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(causal_lm(), saved)
