# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters that cannot be attached: refused by name, and the model is as before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from folders import assert_unchanged, picture
from methods import METHODS
from peft import get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from tiny import adapted, batch, causal_lm

from peft_instance_prompt.attaching import check_adapter_name


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
