# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Packed rows: what tells where a sequence begins, and rows that contradict themselves."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS
from packed_rows import LENGTHS, boundaries, labels_of, packed, texts
from tiny import adapted, assert_same, causal_lm

from peft_instance_prompt.engine.tokens import find_packing


@pytest.mark.parametrize("how", ["cu_seq_lens", "seq_idx", "all", "position_ids of all rows"])
@torch.no_grad()
def test_what_tells_sequences(how: str) -> None:
    model = adapted(causal_lm(), METHODS["lpt"](task_type="CAUSAL_LM"))
    batch = packed([texts(*LENGTHS)])
    expected = model(**batch).logits
    ends, numbers = boundaries(*LENGTHS), torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    if how == "position_ids of all rows":
        twice = {name: torch.cat([value, value]) for name, value in batch.items()}
        twice["position_ids"] = batch["position_ids"]  # (1, S) for two rows
        assert_same(model(**twice).logits, torch.cat([expected, expected]))
        return
    plain = {name: value for name, value in batch.items() if name != "position_ids"}
    told = {"cu_seq_lens": lengths, "seq_idx": {"seq_idx": numbers}, "all": {**batch, **lengths, "seq_idx": numbers}}
    assert_same(model(**plain, **{k: v for k, v in told[how].items() if k not in plain}).logits, expected)
    assert (model(**plain).logits - expected).abs().max() > 1e-2, "the rows of one sequence are no other"


@torch.no_grad()
def test_a_row_of_one_sequence_is_no_packed_row() -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    (ids,) = texts(6)
    expected = model(ids, labels=labels_of(ids), use_cache=True)
    ends = boundaries(6)
    told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    out = model(ids, labels=labels_of(ids), position_ids=torch.arange(6)[None], seq_idx=torch.zeros_like(ids), **told)
    assert torch.equal(out.logits, expected.logits)
    assert find_packing({"position_ids": torch.arange(5, 9)[None]}, 1, 4) is None, "rows may begin anywhere"
    assert find_packing({"position_ids": torch.zeros(1, 4), "attention_mask": torch.ones(1, 4)}, 1, 4) is None


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"cu_seq_lens_q": boundaries(7, 4, 8)}, "must go up from 0 to the number of tokens, 20"),
        ({"cu_seq_lens_q": torch.tensor([0, 11, 11, 20])}, "must go up from 0"),
        ({"cu_seq_lens_q": torch.tensor([1, 11, 20])}, "must go up from 0"),
        ({"cu_seq_lens_k": boundaries(7, 5, 8)}, "by `cu_seq_lens_k` a sequence begins at token 12.*by `position_ids` none|by `position_ids`"),
        ({"cu_seq_lens_q": boundaries(7, 4, 9), "cu_seq_lens_k": boundaries(11, 9)}, "contradict each other: by `cu_seq_lens_q`"),
        ({"seq_idx": torch.zeros(1, 20)}, "by `position_ids` a sequence begins at token 7 of row 0, by `seq_idx` none"),
        ({"seq_idx": torch.zeros(1, 19)}, "`seq_idx` must have the shape of the tokens"),
        ({"cu_seq_lens_q": boundaries(7, 4, 9), "max_length_q": 8}, "`max_length_q` is 8, but a sequence has 9 tokens"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6, *range(16)]])}, "token 0 of row 0 has position 3.*inside a text"),
        ({"position_ids": torch.tensor([[*range(10), *range(30, 40)]])}, "token 10 of row 0 has position 30"),
        (
            {"cu_seq_lens_q": boundaries(7, 4, 9), "attention_mask": torch.tensor([[0, *[1] * 19]])},
            "`attention_mask` hides tokens of rows that `cu_seq_lens_q` says",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_rows_that_contradict_themselves(told: dict, complaint: str) -> None:
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    batch = packed([texts(*LENGTHS)])
    with pytest.raises(ValueError, match=complaint):
        model(**{**batch, **told})
    assert model(**batch).loss.isfinite()


def test_lengths_of_several_rows() -> None:
    two = {"cu_seq_lens_q": torch.tensor([0, 3, 6, 8, 12])}
    assert find_packing(two, 2, 6).sequence.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="lies in two of the rows"):
        find_packing({"cu_seq_lens_q": torch.tensor([0, 3, 8, 12])}, 2, 6)
    assert find_packing({"cu_seq_lens_q": torch.tensor([0, 6, 12])}, 2, 6) is None
