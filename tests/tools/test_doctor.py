# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`python -m peft_instance_prompt doctor`: all is well here, and what is broken is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from peft import mapping

from peft_instance_prompt import IAPTConfig, IDPGConfig, InstancePromptConfig, registry
from peft_instance_prompt.__main__ import main
from peft_instance_prompt.engine import adapters, calls, layer, scope, widen
from peft_instance_prompt.engine.slots import SlotTable
from peft_instance_prompt.methods.iapt import IAPTGenerator
from peft_instance_prompt.model import InstancePromptModel
from peft_instance_prompt.tools import doctor
from peft_instance_prompt.tools.doctor import MODELS, registered_methods, run_doctor


CAUSAL = {"llama", "bloom", "gpt2"}
COUNTING = {"llama", "gpt2"}  # they tell positions by ids
ALL = {*CAUSAL, "t5"}


def failures(results: list[doctor.Result]) -> dict[str, set[str]]:
    """The models on which each check fails."""
    found: dict[str, set[str]] = {}
    for result in results:
        if result.error is not None:
            found.setdefault(result.check, set()).add(result.model)
    return found


def test_all_is_well_here(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("transformers", "peft", "torch", "accelerate", "peft-instance-prompt"):
        assert f"{name:22}{metadata.version(name)}" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["method", "inject", "effect", "batch", "cache", "save", "leak"] in lines
    assert {"IAPT", "LPT", "IDPG", "IPT", "DYNAMIC_PROMPT"} <= registered_methods().keys()
    for method in registered_methods():
        assert [method, *["ok"] * 6] in lines
    assert f"{len(registered_methods()) * 24} checks on llama, bloom, gpt2, t5, 0 failed" in out
    # The page Tools shows the lines of this package's methods.
    own = {name for name, cls in registered_methods().items() if cls.__module__.startswith("peft_instance_prompt.")}
    page = (Path(__file__).parents[2] / "docs/tools.md").read_text(encoding="utf-8")
    *table, last = re.search(r"```\n(method +inject[^`]*), 0 failed, \d+ s\n```", page)[1].splitlines()
    assert set(table) <= set(out.splitlines()) and {line.split()[0] for line in table[1:]} == own
    assert last == f"{24 * len(own)} checks on {', '.join(MODELS)}"


def labels_are_read(patch: pytest.MonkeyPatch) -> None:
    """The whole row is the instance, the response with it."""
    patch.setattr(scope, "from_labels", lambda labels, tokens, *_: tokens)


def slots_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    """The position ids of new tokens do not go on from the slots'."""
    real = SlotTable.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.num_counted = torch.zeros_like(self.num_counted)

    patch.setattr(SlotTable, "__init__", init)


def slots_are_not_stripped(patch: pytest.MonkeyPatch) -> None:
    real = adapters.arrange

    def arrange(*args, **kwargs):
        layout = real(*args, **kwargs)
        return replace(layout, output_index=torch.arange(layout.order.shape[1]).expand(layout.order.shape))

    patch.setattr(adapters, "arrange", arrange)


def another_output_is_read(patch: pytest.MonkeyPatch) -> None:
    """As many positions as there are tokens are left, but the wrong ones."""
    real = adapters.arrange

    def arrange(*args, **kwargs):
        layout = real(*args, **kwargs)
        return replace(layout, output_index=torch.arange(layout.num_tokens).expand(layout.token_index.shape))

    patch.setattr(adapters, "arrange", arrange)


def columns_are_counted(patch: pytest.MonkeyPatch) -> None:
    """Padding on the left moves the positions of the tokens."""

    def insert_positions(position_ids, first, layout, *others):
        return torch.arange(layout.order.shape[1]).expand(layout.order.shape)

    patch.setattr(widen, "insert_positions", insert_positions)


def padding_is_attended_to(patch: pytest.MonkeyPatch) -> None:
    """By a decoder in its cache and in the encoder's output."""
    patch.setattr(SlotTable, "widen_mask", lambda *args: None)


def adapter_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layer, "group_rows", lambda *args: [])


def weights_are_not_found(patch: pytest.MonkeyPatch) -> None:
    """The adapter's name stays in the names of its tensors."""
    patch.setattr(InstancePromptModel, "_remove_adapter_name_from_key", classmethod(lambda cls, key, name: key))


def cache_has_another_name(patch: pytest.MonkeyPatch) -> None:
    """A release of transformers calls the cache in a way that the file on its calls does not know."""
    patch.setattr(calls, "CACHE_ARGUMENTS", ("memory",))


# What each breaks, of IDPG, whose slots stand before the text in every layer: checks and models.
BREAKAGES: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, set[str]]]] = [
    (cache_has_another_name, {"inject": CAUSAL}),
    (labels_are_read, {"leak": CAUSAL}),
    (slots_are_not_counted, {"cache": COUNTING}),
    (slots_are_not_stripped, {"effect": CAUSAL, "batch": CAUSAL, "leak": CAUSAL}),
    (another_output_is_read, {"effect": CAUSAL, "cache": CAUSAL}),
    (columns_are_counted, {"batch": {"gpt2"}, "cache": COUNTING}),  # RoPE tells distances only
    (padding_is_attended_to, {"batch": {"t5"}, "cache": CAUSAL}),
    (adapter_is_ignored, {"effect": ALL, "batch": {"gpt2"}}),  # a bare GPT-2 counts padding on the left
    (weights_are_not_found, {"save": ALL}),
]


@pytest.mark.parametrize(("break_it", "expected"), BREAKAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_broken_is_named(monkeypatch, break_it, expected):
    break_it(monkeypatch)
    assert failures(run_doctor(["IDPG"])) == expected


@pytest.mark.parametrize(
    ("break_it", "check", "models"), [(labels_are_read, "leak", CAUSAL), (weights_are_not_found, "save", ALL)]
)
def test_no_method_is_blind(monkeypatch, break_it, check, models):
    """Each method's adapter is such that a response that is read, and weights that are lost, make a difference."""
    monkeypatch.setattr(doctor, "CHECKS", {check: doctor.CHECKS[check]})  # what the others say of it is tested above
    break_it(monkeypatch)
    failed = {(r.method, r.model, r.check) for r in run_doctor() if r.error is not None}
    # An edit of a token reads this token only, and what stands behind all that it has read cannot leak.
    blameless = {"PREFT", "IAPT"} if check == "leak" else set()
    seeing = registered_methods().keys() - blameless
    assert failed == {(method, model, check) for method in seeing for model in models}


def test_the_command_fails_and_says_why(monkeypatch, capsys):
    labels_are_read(monkeypatch)
    monkeypatch.setattr(doctor, "registered_methods", lambda: {"IDPG": IDPGConfig})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert ["IDPG", *["ok"] * 5, "FAILED"] in [line.split() for line in out.splitlines()]
    for model, positions in (("llama", "RoPE"), ("bloom", "ALiBi"), ("gpt2", "learned positions")):
        assert f"FAILED IDPG on {model} ({positions}), leak: leak in evaluation: off by " in out
    assert "24 checks on llama, bloom, gpt2, t5, 3 failed" in out


def test_wrong_shapes_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "MODELS", {"llama": MODELS["llama"]})
    slots_are_not_stripped(monkeypatch)
    (error,) = (r.error for r in run_doctor(["IAPT"]) if (r.model, r.check) == ("llama", "effect"))
    assert error == "the output has the shape (1, 11, 96) and not (1, 7, 96)"


def test_an_exception_stops_no_other_check(monkeypatch):
    real = doctor.CHECKS["batch"]

    def check(model):
        if model.get_base_model().config.model_type == "gpt2":
            raise KeyError("cache")
        real(model)

    monkeypatch.setitem(doctor.CHECKS, "batch", check)
    results = run_doctor(["IAPT"])
    assert len(results) == 24
    assert [tuple(r) for r in results if r.error is not None] == [("IAPT", "gpt2", "batch", "KeyError: 'cache'")]


@dataclass
class SeventhConfig(IAPTConfig):
    pass


class SeventhGenerator(IAPTGenerator):
    pass


@dataclass
class RefusedConfig(InstancePromptConfig):
    def __post_init__(self):
        raise ValueError("`task_type` is not\nknown.")


def test_a_method_from_outside_is_checked_too(own_mappings):
    registry.register_method("seventh", SeventhConfig, SeventhGenerator)
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[registry.add_peft_type("REFUSED")] = RefusedConfig
    results = run_doctor(["REFUSED", "SEVENTH"])
    assert [tuple(r) for r in results if r.method == "REFUSED"] == [
        ("REFUSED", model, "inject", "ValueError: `task_type` is not known.") for model in MODELS
    ]
    assert len(results) == 4 + 24 and failures(results) == {"inject": ALL}
    assert doctor.as_table(results)[1].split() == ["REFUSED", "FAILED", *["not", "run"] * 5]


def test_versions_out_of_range_stand_out(monkeypatch):
    asked = ["transformers<5", "peft>=0.1", "torch>=99; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    lines = {line.split()[0]: line for line in doctor.versions()}
    assert lines["transformers"].endswith("requires <5, WHICH THIS IS NOT")
    assert lines["peft"].endswith("requires >=0.1") and lines["torch"].endswith(metadata.version("torch"))


def test_versions_without_an_installed_package(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert doctor.versions()[0].startswith("python ")


def test_nothing_of_the_process_is_changed(monkeypatch):
    monkeypatch.setattr(doctor, "MODELS", {"llama": MODELS["llama"]})
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_doctor(["IAPT"])
        assert torch.get_num_threads() == 2 and torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)


def test_bad_arguments(capsys):
    with pytest.raises(ValueError, match=r"`methods` must be some of \[.*'IAPT'.*\], got \['LORA'\]"):
        run_doctor(["IAPT", "LORA"])
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--json"])
    assert "peft_instance_prompt doctor: error: unrecognized arguments: --json" in capsys.readouterr().err
