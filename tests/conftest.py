# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What all tests share: `TEST_THREADS` threads, little logging, no hub, and the parameters `method` and `kind`."""

from __future__ import annotations

import os
from collections.abc import Iterator


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402


# An assertion that fails in one of these shows its values, as in a test.
pytest.register_assert_rewrite(
    "cases", "decoder_calls", "folders", "hub", "invariants_outputs", "invariants_state", "late_prompts", "llama_calls"
)

import torch  # noqa: E402
import transformers  # noqa: E402
from methods import KINDS, METHODS, SKIPS, SPANNING, WITHOUT_SLOTS  # noqa: E402
from peft import mapping  # noqa: E402
from tiny import native_refuses  # noqa: E402


# One: the models are so small that threads cost more than they give.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-methods", action="store_true", help="run the shared tests over all methods, not over five")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `method` runs for each entry of SPANNING, with `--all-methods` of METHODS, and has the marker `shared`;
    one that takes `kind` runs for one entry per config class. If it is marked `slots`, it runs for methods with slots."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    own = [name for names in named for name in (names.split(",") if isinstance(names, str) else names)]
    methods = METHODS if metafunc.config.getoption("--all-methods") else SPANNING
    for name, values, marks in (("method", methods, pytest.mark.shared), ("kind", KINDS, ())):
        if name in metafunc.fixturenames and name not in own:
            about_slots = metafunc.definition.get_closest_marker("slots") is not None
            values = [value for value in values if not (about_slots and value in WITHOUT_SLOTS)]
            metafunc.parametrize(name, [pytest.param(value, marks=marks) for value in values])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what methods.py declares not to hold, and transformers' own `add_adapter` where it refuses this PEFT."""
    for item in items:
        if item.get_closest_marker("native") and (reason := native_refuses()):
            item.add_marker(pytest.mark.skip(reason=reason))
        params = getattr(getattr(item, "callspec", None), "params", {})
        if item.get_closest_marker("slots") and not WITHOUT_SLOTS.isdisjoint(map(str, params.values())):
            item.add_marker(pytest.mark.skip(reason="it is about slots"))
        for name in ("method", "kind"):
            if reason := SKIPS.get((params.get(name), getattr(item, "originalname", ""))):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_mappings() -> Iterator[None]:
    """What is registered in a test is forgotten after it."""
    mappings = [value for name, value in vars(mapping).items() if name.startswith("PEFT_TYPE_TO_")]
    before = [dict(value) for value in mappings]
    yield
    for value, kept in zip(mappings, before):
        value.clear()
        value.update(kept)
