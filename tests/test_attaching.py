# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters that cannot be attached: refused by name, and the model is as before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from folders import assert_unchanged, picture
from methods import METHODS
from peft import get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from tiny import adapted, batch, causal_lm, pair

from peft_instance_prompt.attaching import check_adapter_name
from peft_instance_prompt.generator import PromptGenerator


def config(kind: str = "iapt", **fields):
    return METHODS[kind](**{"task_type": "CAUSAL_LM", **fields})


def first_native() -> torch.nn.Module:
    model = causal_lm()
    model.add_adapter(config(), adapter_name="first")
    return model


WAYS: dict[str, tuple[Callable, Callable]] = {
    "get_peft_model": (causal_lm, lambda model, name, config: get_peft_model(model, config, adapter_name=name)),
    "add_adapter": (
        lambda: adapted(causal_lm(), config(), "first"),
        lambda model, name, config: model.add_adapter(name, config),
    ),
    "native": (causal_lm, lambda model, name, config: model.add_adapter(config, adapter_name=name)),
    "native second": (first_native, lambda model, name, config: model.add_adapter(config, adapter_name=name)),
    "inject": (causal_lm, lambda model, name, config: inject_adapter_in_model(config, model, name)),
}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.native if "native" in name else ()) for name in WAYS])
def way(request: pytest.FixtureRequest) -> tuple[Callable, Callable]:
    return WAYS[request.param]


def refuse(way: tuple[Callable, Callable], says: str, name: str = "new", kind: str = "iapt", **fields) -> None:
    model = way[0]()
    before = picture(model)
    with pytest.raises((ValueError, TypeError), match=says):
        way[1](model, name, config(kind, **fields))
    assert_unchanged(model, before)
    way[1](model, "good", config())
    with torch.no_grad():
        assert model(**batch(5)).logits.isfinite().all()


LARGE = 2 * 10**9


@pytest.mark.slots
def test_too_large(kind: str) -> None:
    refuse(
        WAYS["get_peft_model"], f"`num_virtual_tokens` {LARGE}, `bottleneck_dim`", kind=kind, num_virtual_tokens=LARGE
    )


def test_too_large_in_every_way(way: tuple[Callable, Callable]) -> None:
    refuse(way, rf"cannot be made \(`num_virtual_tokens` {LARGE}.*takes .* GiB", num_virtual_tokens=LARGE)
    refuse(way, f"cannot be made .*`bottleneck_dim` {LARGE}", bottleneck_dim=LARGE)
    refuse(way, f"cannot be made .*`bottleneck_dim` {LARGE}", bottleneck_dim=LARGE, num_virtual_tokens=LARGE)


@pytest.mark.parametrize(
    "names",
    [["layers"], ["model"], ["model.layers"], ["layers.0"], ["0"], ["lm_head", "layers.2"], ["l"], ["new"], ["iapt"]],
    ids=str,
)
def test_modules_to_save_that_cannot_be_copied(way: tuple[Callable, Callable], names: list[str]) -> None:
    refuse(way, "modules_to_save|ModulesToSaveWrapper", modules_to_save=names)


@pytest.mark.parametrize("way", ["get_peft_model", pytest.param("native", marks=pytest.mark.native)])
def test_modules_to_save_within_an_adapter(kind: str, way: str) -> None:
    model = get_peft_model(causal_lm(), config(kind))
    modules = {
        name.rpartition(".default.")[2]: module for name, module in model.named_modules() if ".default." in name
    }
    parts = [name for name, module in modules.items() if any(True for _ in module.parameters())]
    for part in sorted(parts, key=len)[-3:]:
        refuse(WAYS[way], "modules_to_save", kind=kind, modules_to_save=[part])


def test_parts_of_layers_can_be_saved(way: tuple[Callable, Callable]) -> None:
    model = way[0]()
    way[1](model, "new", config(modules_to_save=["layers.1.mlp", "norm", "lm_head"]))
    assert any("layers.1.mlp.modules_to_save.new" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    "name", ["a.b", "keys", "training", "../up", "a/b", "a\\b", "__base__", "model", "base_model"]
)
def test_names_that_no_adapter_can_have(way: tuple[Callable, Callable], name: str) -> None:
    refuse(way, "cannot be named '.*'", name=name)


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800", "x" * 256, "ä" * 128], ids=ascii)
def test_names_of_which_no_folder_can_be_made(way: tuple[Callable, Callable], name: str) -> None:
    refuse(way, "An adapter('s name can have up to 255 bytes| cannot be named)", name=name)


def test_names_that_are_no_text() -> None:
    for name in ("", None, 3):
        with pytest.raises(ValueError, match=f"cannot be named {name!r}"):
            check_adapter_name(name)
    for name in ("default", "a_b-c", "0", "ä b"):
        check_adapter_name(name)


def test_names_that_are_parts_of_tensors_names(kind: str) -> None:
    """PEFT would leave these tensors out of the file of the adapter beside, in silence."""
    model = get_peft_model(causal_lm(), config(kind))
    whole = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    parts = {part for key in whole for part in key.split(".")}
    for part in sorted(parts):
        before = picture(model)
        with pytest.raises(ValueError, match=f"cannot be named '{part}'"):
            model.add_adapter(part, config(kind))
        assert_unchanged(model, before)
    model.add_adapter("other", config(kind))
    assert get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False).keys() == whole.keys()


# ---------------------------------------------------------------------------------------------- what fails in the midst


@contextmanager
def stopped_at(number: int) -> Iterator[list[str]]:
    """Raise a KeyboardInterrupt at a call of a function of peft or of this package's tuner; the list names the calls."""
    files, calls = ("/peft/", "peft_instance_prompt/model.py", "peft_instance_prompt/generator.py"), []

    def trace(frame, event, argument):
        # Not a generator expression, which is also called when it is thrown away: there an error is only printed.
        if any(part in frame.f_code.co_filename for part in files) and "<genexpr>" not in frame.f_code.co_qualname:
            calls.append(frame.f_code.co_qualname)
            if len(calls) == number + 1:
                sys.settrace(None)
                raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield calls
    finally:
        sys.settrace(before)


def head_config(kind: str = "iapt"):
    return config(kind, modules_to_save=["lm_head"])


def with_two() -> torch.nn.Module:
    model = adapted(causal_lm(), head_config(), "first")
    model.add_adapter("second", head_config())
    model.set_adapter("second")
    return model


MIDST: dict[str, tuple[Callable, Callable]] = {
    "inject": (causal_lm, lambda model: inject_adapter_in_model(head_config(), model, "new")),
    "get_peft_model": (causal_lm, lambda model: get_peft_model(model, head_config(), adapter_name="new")),
    "add_adapter": (with_two, lambda model: model.add_adapter("new", head_config())),
}


@pytest.mark.parametrize("what", MIDST)
def test_an_interrupt_in_the_midst(what: str) -> None:
    """Of attaching: the adapter is out again, with its layer, hooks and copies, and the rest is as before."""
    make, attach = MIDST[what]
    for _ in range(2):  # what is imported or kept at first makes calls of its own
        model = make()
        with stopped_at(10**9) as calls:
            attach(model)
    begin, end = calls.index("InstancePromptModel.inject_adapter"), len(calls)
    if what == "inject":
        end = calls.index("BaseTuner._post_injection_hook")  # the end of attaching; PEFT then asks for the model
    for number in range(begin, end, max(1, (end - begin) // 60)):
        model = make()
        before = picture(model)
        with pytest.raises(KeyboardInterrupt), stopped_at(number):
            attach(model)
        assert_unchanged(model, before)
    attach(model)
    with torch.no_grad():
        assert model(**batch(5)).logits.isfinite().all()


def test_an_error_in_the_midst_of_a_second_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no memory is left for the generator of the second stack, the first has none either."""
    model = pair()
    before = picture(model)
    settings = METHODS["iapt"](task_type="SEQ_2_SEQ_LM", target_modules=["encoder", "decoder"])
    begin, calls = PromptGenerator.begin, []

    def no_memory(self, embed):
        calls.append(self)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory is left")
        return begin(self, embed)

    monkeypatch.setattr(PromptGenerator, "begin", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        get_peft_model(model, settings)
    assert_unchanged(model, before)
    monkeypatch.undo()
    get_peft_model(model, settings)
