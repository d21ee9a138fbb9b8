# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The invariants of state: what configs, folders, failing calls and threads leave in a model."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cases import DECODER_NAMES, any_model, attach, attach_second, damage, make_config, refusal_names
from folders import assert_unchanged, picture
from hypothesis import assume
from hypothesis import strategies as st
from methods import METHODS
from peft import PeftConfig, PeftModel
from tiny import VOCAB, adapted, batch, causal_lm, native_refuses

from peft_instance_prompt.engine.forward import current_pass
from peft_instance_prompt.engine.request import Request, current_request
from peft_instance_prompt.tools import promises
from peft_instance_prompt.tools.promises import GREEDY, Probe, outputs


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 12),
    st.sampled_from(
        [2**31 - 1, 2**31, 10**30, "", "first", "mean", "layers(", [], [0], [0, 0], [3, -1], ["lm_head"], [""]]
    ),
    st.floats(width=16),  # with those that float32 cannot hold, any model overflows
    st.lists(st.integers(-1, 4), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)


def fields_of(method: str) -> list[str]:
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    return [field.name for field in dataclasses.fields(METHODS[method]()) if field.name not in inherited]


def config_is_refused_by_name_or_works(data: st.DataObject) -> None:
    """A config either works, or is refused with a ValueError or TypeError that names the field."""
    method = data.draw(st.sampled_from(list(METHODS)), "method")
    names = data.draw(st.lists(st.sampled_from(fields_of(method)), min_size=1, max_size=2, unique=True), "fields")
    values = {name: data.draw(JUNK, name) for name in names}
    base = causal_lm()
    before = picture(base)
    try:
        model = adapted(base, METHODS[method](task_type="CAUSAL_LM", **values))
    except (ValueError, TypeError) as error:
        assert refusal_names(error, names), f"the message names none of {names}: {error}"
        assert_unchanged(base, before)
        return
    try:
        logits = model(**batch(9, 6)).logits
    except (ValueError, TypeError) as error:
        assert refusal_names(error, names), f"the message names none of {names}: {error}"
        return
    assert logits.shape == (2, 9, VOCAB) and logits.isfinite().all()


@torch.no_grad()
def saved_and_loaded_gives_the_same(data: st.DataObject) -> None:
    """An adapter that is saved and loaded gives the same logits, bit for bit."""
    base, task = any_model(data)
    again = base.__class__(base.config).eval()
    again.load_state_dict(base.state_dict())
    promises.saved(Probe(attach(base, make_config(data, task)), tolerance=0), again, batch(9, 6, side="right"))


@torch.no_grad()
def damaged_folder_is_refused_whole_or_loads_right(data: st.DataObject) -> None:
    """A damaged folder is refused with an error that says what is wrong and leaves the model as it was, or it loads right."""
    config = make_config(data)
    good, inputs = attach(causal_lm(), config), batch(9, 6)
    routes = ["from_pretrained", "load_adapter", *([] if native_refuses() else ["native"])]
    route = data.draw(st.sampled_from(routes), "route")
    model = (
        attach(causal_lm(), make_config(data, cls=type(config)), "resident")
        if route == "load_adapter"
        else causal_lm()
    )
    before = picture(model)
    with tempfile.TemporaryDirectory() as name:
        good.save_pretrained(name)
        changed = damage(data, Path(name))
        try:
            if route == "from_pretrained":
                loaded = PeftModel.from_pretrained(model, name)
            else:
                loaded = model
                model.load_adapter(name, adapter_name="loaded")
        except (ValueError, TypeError) as error:
            assert isinstance(error, ValueError) or (changed and refusal_names(error, [changed])), error
            assert_unchanged(model, before)
            return
    if route != "from_pretrained":
        loaded.set_adapter("loaded")
    found = loaded.eval()(**inputs).logits
    # Another value of a field may make another adapter of the same tensors.
    assert found.isfinite().all() if changed else torch.equal(found, good(**inputs).logits)


@torch.no_grad()
def base_model_comes_back(data: st.DataObject) -> None:
    """`disable_adapter` and `unload` give the base model back, bit for bit and without a hook left."""
    base, task = any_model(data)
    inputs, before = batch(9, 6, side="right"), picture(base)
    expected = outputs(base, **inputs)
    model = attach(base, make_config(data, task))
    if data.draw(st.booleans(), "second adapter"):
        attach_second(model, make_config(data, task, cls=type(model.active_peft_config)))
    outputs(model, **inputs)
    promises.disabled(Probe(model), inputs, expected)
    base = model.unload().eval()
    assert torch.equal(outputs(base, **inputs), expected)
    after = picture(base)
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (kind, _, _, hooks, _) in after["modules"].items():
        assert (kind, hooks) == (before["modules"][name][0], before["modules"][name][3]), f"hooks left on {name!r}"


@torch.no_grad()
def failing_call_changes_nothing_for_the_next(data: st.DataObject) -> None:
    """A call that is interrupted or fails changes nothing for the next one."""
    base, task = any_model(data)
    model, inputs = attach(base, make_config(data, task)), batch(9, 6, side="right")
    expected = outputs(model, **inputs)
    error = data.draw(st.sampled_from([KeyboardInterrupt, ValueError, RuntimeError]), "error")
    where = data.draw(st.sampled_from([name for name, m in base.named_modules() if name]), "where")
    wait, generates = (
        data.draw(st.integers(0, 3), "passes before"),
        task != "FEATURE_EXTRACTION" and data.draw(st.booleans()),
    )

    def interrupt(*args: Any) -> None:
        nonlocal wait
        wait -= 1
        if wait < 0:
            raise error("stop")

    module = base.get_submodule(where)
    handle = (module.register_forward_hook if data.draw(st.booleans(), "after") else module.register_forward_pre_hook)(
        interrupt
    )
    stopped = False
    try:
        model.generate(**inputs, **GREEDY) if generates else outputs(model, **inputs)
    except (KeyboardInterrupt, ValueError, RuntimeError) as raised:
        assert str(raised) == "stop", raised
        stopped = True
    finally:
        handle.remove()
    assert current_pass.get() is None and current_request() == Request()
    assert torch.equal(outputs(model, **inputs), expected)
    assume(stopped)


@torch.no_grad()
def threads_get_right_texts_while_adapters_come_and_go(data: st.DataObject) -> None:
    """Threads that generate get the right texts while other adapters are added and deleted."""
    first = make_config(data)
    model = attach(causal_lm(data.draw(st.sampled_from(DECODER_NAMES), "family")), first, "a")
    attach_second(model, second := make_config(data, cls=type(first)))
    each = st.lists(st.sampled_from(["a", "b", "__base__"]), min_size=2, max_size=2)
    mixes = data.draw(st.lists(each, min_size=2, max_size=4), "adapter_names")
    inputs, done = batch(9, 6), threading.Event()

    def text(names: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return model.generate(**inputs, **GREEDY, adapter_names=names)

    def come_and_go() -> None:
        while not done.is_set():
            model.add_adapter("passing", second)
            model.delete_adapter("passing")

    expected = [text(names) for names in mixes]
    with ThreadPoolExecutor(4) as pool:
        going = pool.submit(come_and_go)
        try:
            found = list(pool.map(text, mixes))
        finally:
            done.set()
        going.result()
    assert all(map(torch.equal, found, expected))
