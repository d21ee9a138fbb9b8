# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The invariants hold in the cases that are drawn, the search finds what is broken, and the page lists them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any

import fuzz
import pytest
import torch
from fuzz import PAGE, SECONDS, SEED, Found, search
from invariants import INVARIANTS

from peft_instance_prompt.engine import request
from peft_instance_prompt.engine.adapters import group_rows


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant(name: str) -> None:
    print(f"seed {SEED}")
    found = search(INVARIANTS[name], SEED, None if SECONDS is None else SECONDS / len(INVARIANTS))
    print(f"{found.tried} cases, up to seed {found.seed}")
    if found.failure is not None:
        raise found.failure


@contextmanager
def forgotten_without_an_error_only(model: torch.nn.Module | None = None, **fields: Any) -> Iterator[None]:
    """`request.note` without its `finally`."""
    before = request.notes.get()
    request.notes.set((*before, request.Note(model, fields)))
    yield
    request.notes.set(before)


# What breaks an invariant, and how.
BROKEN: dict[str, tuple[str, Any]] = {
    "config_is_refused_by_name_or_works": ("peft_instance_prompt.config.check_int", lambda *args, **kwargs: None),
    "row_of_a_padded_batch_equals_the_row_alone": (
        "peft_instance_prompt.engine.open.count_positions",
        lambda text, groups, info: torch.arange(text.tokens.shape[1]).expand_as(text.tokens) + info.position_offset,
    ),
    "packed_sequence_equals_the_sequence_alone": (
        "peft_instance_prompt.engine.tokens.Packing.widen",
        lambda packing, layout: torch.zeros_like(layout.order),
    ),
    "mixed_batch_equals_each_adapter_alone": (
        "peft_instance_prompt.engine.layer.group_rows",
        lambda generators, active, num_rows, said, device: group_rows(
            generators,
            active,
            num_rows,
            replace(said, adapter_names=(said.adapter_names or ())[::-1] or None),
            device,
        ),
    ),
    "logits_do_not_depend_on_later_response_tokens": (
        "peft_instance_prompt.engine.open.find_scope",
        lambda tokens, *args, **kwargs: tokens,
    ),
    "damaged_folder_is_refused_whole_or_loads_right": (
        "peft_instance_prompt.adapter_files.check_tensors",
        lambda *args, **kwargs: None,
    ),
    "failing_call_changes_nothing_for_the_next": (
        "peft_instance_prompt.engine.wrap.note",
        forgotten_without_an_error_only,
    ),
    "base_model_comes_back": ("peft.PeftModel.disable_adapter", lambda self: nullcontext()),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, broken = BROKEN[name]
    monkeypatch.setattr(where, broken)
    # In a context of its own: a call that is not forgotten must not reach other tests.
    found = copy_context().run(partial(search, INVARIANTS[name], seed=0, seconds=60, shrink=False))
    assert found.failure is not None


def test_the_same_cases_for_the_same_seed() -> None:
    def drawn(seed: int) -> list:
        cases: list = []
        search(lambda data: cases.append(data.draw(fuzz.st.integers())), seed)
        return cases

    assert drawn(3) == drawn(3) != drawn(4)


def test_a_failure_says_how_to_see_it_again() -> None:
    def never_large(data) -> None:
        assert data.draw(fuzz.st.integers(), "number") < 1000

    found = search(never_large, seed=7, seconds=60)
    assert isinstance(found.failure, AssertionError) and found.seed >= 7
    notes = "\n".join(found.failure.__notes__)
    assert "(number): 1000" in notes, "the smallest one"
    assert f"FUZZ_SEED={found.seed} python -m pytest tests/test_fuzz.py -k never_large" in notes


def test_the_page_lists_all_invariants() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(INVARIANTS) == 11
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [line[0] for line in lines] == [invariant.__doc__ for invariant in INVARIANTS.values()]
    for _, tried, failures in lines:
        assert int(tried) > 0 and failures == "0"
    results = {name: Found(int(tried), None, 0) for name, (_, tried, _) in zip(INVARIANTS, lines)}
    # The releases and the seed are those of the run that wrote the page.
    assert fuzz.page(results).partition("| invariant")[2] == text.partition("| invariant")[2]
