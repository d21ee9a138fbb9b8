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
from methods import FEW, KINDS, METHODS, SKIPS, SPANNING, WITHOUT_SLOTS  # noqa: E402
from peft import mapping  # noqa: E402
from tiny import native_refuses  # noqa: E402


# One: the models are so small that threads cost more than they give.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-methods", action="store_true", help="run the shared tests over all methods, in all combinations"
    )
    parser.addoption("--few-methods", action="store_true", help="run the shared tests over three methods")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `method` runs for each entry of SPANNING, with `--all-methods` of METHODS and with `--few-methods` of FEW; one
    that takes `kind` runs for one entry per config class, with `--few-methods` for those of FEW. If it is marked `slots`, it runs for
    methods with slots."""
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    own = [name for names in named for name in (names.split(",") if isinstance(names, str) else names)]
    option = metafunc.config.getoption
    methods = METHODS if option("--all-methods") else FEW if option("--few-methods") else SPANNING
    few = {type(METHODS[name]()) for name in FEW}
    kinds = [kind for kind in KINDS if type(METHODS[kind]()) in few or not option("--few-methods")]
    for name, values in (("method", methods), ("kind", kinds)):
        if name in metafunc.fixturenames and name not in own:
            about_slots = metafunc.definition.get_closest_marker("slots") is not None
            metafunc.parametrize(name, [value for value in values if not (about_slots and value in WITHOUT_SLOTS)])


def shared_tests(items: list[pytest.Item]) -> dict[str, dict[str, list[pytest.Item]]]:
    """The items that run over methods, by their functions and by the values of their other parameters. Pairs of a method and something
    else that were chosen by hand are not among them."""
    found: dict[str, dict[str, list[pytest.Item]]] = {}
    for item in items:
        by_hand = any("," in str(mark.args[0]) for mark in item.iter_markers("parametrize"))
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if not by_hand and {"method", "kind"} & params.keys():
            others = str([(name, id(value)) for name, value in params.items() if name not in ("method", "kind")])
            found.setdefault(item.nodeid.partition("[")[0], {}).setdefault(others, []).append(item)
    return found


def surplus(by_others: dict[str, list[pytest.Item]]) -> set[pytest.Item]:
    """The items of a shared test that run with `--all-methods` only. Of a test with other parameters, each combination of these runs with a
    third of the methods (two at least), in turn, so that each method meets each value of each parameter."""
    left_out: set[pytest.Item] = set()
    for number, same in enumerate(by_others.values()):
        kept = max(2, -(-len(same) // min(3, len(by_others))))
        turn = kept * (
            number + number // 3
        )  # a Latin square: neighbours, and rows of three, begin at a different method
        left_out.update(item for i, item in enumerate(same) if (i - turn) % len(same) >= kept)
    return left_out


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is surplus, what methods.py declares not to hold, and transformers' own `add_adapter` where it refuses this PEFT."""
    left_out: set[pytest.Item] = set()
    for by_others in shared_tests(items).values():
        for item in (item for same in by_others.values() for item in same):
            item.add_marker("shared")
        if not config.getoption("--all-methods"):
            left_out |= surplus(by_others)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]
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
