# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The fields that all methods have."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from folders import assert_unchanged, picture
from mean_prompt import MeanPromptConfig, MeanPromptGenerator
from methods import METHODS, WITHOUT_SLOTS
from peft import PeftConfig, PeftModel
from tiny import adapted, batch, causal_lm

from peft_instance_prompt import register_method


BAD = [
    ("num_virtual_tokens", 0, ValueError, "at least 1, got 0"),
    ("num_virtual_tokens", -3, ValueError, "at least 1, got -3"),
    ("num_virtual_tokens", 10**12, ValueError, "at most 2147483647, got 1000000000000"),
    ("bottleneck_dim", 10**30, ValueError, "at most 2147483647, got 1000"),
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
    ("instance_scale", float("nan"), ValueError, "finite, got nan"),
    ("instance_scale", float("-inf"), ValueError, "finite, got -inf"),
    ("temperature", 10**400, ValueError, "finite, got 1000"),
    ("min_temperature", float("nan"), ValueError, "finite, got nan"),
    ("dropout", float("nan"), ValueError, "finite, got nan"),
    ("layers_to_transform", [0, 0], ValueError, r"each once.*\[0, 0\]"),
    ("response_template", [10**30], ValueError, "must be token ids.*1000"),
    ("response_template", [True], ValueError, r"must be token ids.*\[True\]"),
    ("target_modules", "layers(", ValueError, r"regular expression.*'layers\('"),
    ("exclude_modules", "a{99999999999}", ValueError, r"regular expression.*'a\{99999999999}'"),
    ("modules_to_save", ["score", ""], ValueError, r"not empty, got \['score', ''\]"),
    ("saved_embedding_layers", "lm_head", TypeError, "list of names.*'lm_head'"),
    ("weights_digest", 7, TypeError, "a text or None, got 7"),
]


@pytest.mark.parametrize(("name", "value", "error", "says"), BAD, ids=[f"{row[0]}={row[1]!r:.20}" for row in BAD])
def test_bad_field(kind: str, name: str, value, error: type, says: str) -> None:
    if not hasattr(METHODS[kind](), name):
        pytest.skip(f"{kind} has no field {name}")
    if "paper" in says and kind in WITHOUT_SLOTS:
        pytest.skip(f"{kind} has no form of its paper's")
    if value is None and getattr(METHODS[kind](), name) is None:
        pytest.skip(f"{kind} fills {name} in")
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
    for loaded in (PeftConfig.from_pretrained(tmp_path), type(config).from_pretrained(str(tmp_path))):
        assert type(loaded) is type(config)
        assert {**loaded.to_dict(), "inference_mode": False} == {**config.to_dict(), "inference_mode": False}


def test_ranges_and_tuples_become_lists(kind: str) -> None:
    if not hasattr(METHODS[kind](), "layers_to_transform"):
        pytest.skip(f"{kind} has no field layers_to_transform")
    assert METHODS[kind](layers_to_transform=range(1, 3)).layers_to_transform == [1, 2]
    assert METHODS[kind](layers_to_transform=(2, 0)).layers_to_transform == [2, 0]
    assert METHODS[kind](layers_to_transform=2).layers_to_transform == 2


def test_sizes_are_filled_in(kind: str, tmp_path) -> None:
    adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_layers) == (32, 3)
    assert config.target_modules == ["model.layers"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "RecursionError"),
        ("{", "JSONDecodeError"),
        ("[]", "`peft_type` must be a text, got None"),
        ('{"peft_type": ["IAPT"]}', r"`peft_type` must be a text, got \['IAPT'\]"),
    ],
    ids=["nested", "cut", "list", "list as type"],
)
def test_file_that_is_no_config(kind: str, content: str, says: str, tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"adapter_config.json is no adapter's config.*{says}"):
        type(METHODS[kind]()).from_pretrained(tmp_path)


def test_whole_numbers_are_floats() -> None:
    """A tensor cannot be multiplied by a whole number beyond 64 bits, and the largest that is allowed overflows nowhere."""
    with pytest.raises(ValueError, match="`instance_scale` must lie between -10000 and 10000, got 1000"):
        METHODS["ipt_deep"](instance_scale=10**30)
    model = adapted(causal_lm(), METHODS["ipt_deep"](task_type="CAUSAL_LM", instance_scale=10**4))
    assert isinstance(model.active_peft_config.instance_scale, float)
    assert model(**batch(9)).logits.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- versions


@dataclass
class ChangedConfig(MeanPromptConfig):
    """A method whose fields came, and changed their defaults, over three forms of the file."""

    old_defaults: ClassVar[dict] = {0: {"scale": "off", "form": "first"}, 2: {"form": "second"}}
    scale: str = field(default="on", metadata={"help": "Came after form 0, which did without it."})
    form: str = field(default="third", metadata={"help": "Had another default in each form."})


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> type:
    register_method("changed_defaults", ChangedConfig, MeanPromptGenerator)
    monkeypatch.setattr("peft_instance_prompt.config.FORMAT_VERSION", 3)
    return ChangedConfig


@pytest.mark.parametrize("read", [PeftConfig.from_pretrained, lambda folder: ChangedConfig.from_pretrained(folder)])
@pytest.mark.parametrize(
    ("version", "scale", "form"), [(None, "off", "first"), (2, "on", "second"), (3, "on", "third")]
)
def test_defaults_of_an_older_file(changed: type, read, version, scale: str, form: str, tmp_path) -> None:
    changed(num_virtual_tokens=3).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["format_version"] == 3
    old = {key: value for key, value in saved.items() if key not in ("scale", "form", "format_version")}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(old if version is None else {**old, "format_version": version})
    )
    found = read(str(tmp_path))
    assert (found.scale, found.form, found.num_virtual_tokens) == (scale, form, 3)
    assert found.format_version == 3  # saved again, it says of itself what it holds
    (tmp_path / "adapter_config.json").write_text(json.dumps({**old, "form": "mine"}))
    assert read(str(tmp_path)).form == "mine"
    assert (changed().scale, changed().form) == ("on", "third")  # who makes one gets what is right now


def test_files_say_their_form(kind: str, tmp_path) -> None:
    adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["format_version"] == 2
    model = causal_lm()
    before = picture(model)
    for version, error, says in (
        (3, ValueError, "`format_version` is 3, and this release reads config files up to 2: install a newer release"),
        (-1, ValueError, "`format_version` must be at least 0, got -1"),
        ("1", TypeError, "`format_version` must be an integer, got '1'"),
    ):
        file.write_text(json.dumps({**saved, "format_version": version, "field_of_a_later_release": 1}))
        with warnings.catch_warnings(action="ignore"), pytest.raises(error, match=says):
            PeftModel.from_pretrained(model, tmp_path)
        assert_unchanged(model, before)
