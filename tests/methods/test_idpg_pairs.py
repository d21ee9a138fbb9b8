# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Places for pairs of sentences: before the first separator, and before the second sentence."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import adapted, assert_same, causal_lm, encoder, pair, tokenizer
from torch import nn

from peft_instance_prompt import IAPTConfig, IDPGConfig
from peft_instance_prompt.engine.intercept import intercept


SEP, l = 2, 4
# BERT writes one separator between two sentences, RoBERTa two; both end with one.
ROWS = {
    "bert": [[1, 10, 11, 12, SEP, 20, 21, SEP], [1, 13, SEP, 22, SEP]],
    "roberta": [[0, 10, 11, SEP, SEP, 20, 21, 22, SEP], [0, 13, SEP, SEP, 23, SEP]],
}
PAD = {"bert": 0, "roberta": 1}
PLACES = {"before_separator", "after_separator"}


def config(position: str, **fields) -> IDPGConfig:
    fields = {"phm_n": 4, "num_virtual_tokens": l, "dropout": 0.0, "separator_id": SEP, **fields}
    return IDPGConfig(prompt_position=position, **fields)


def padded(rows: list[list[int]], pad: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """A batch of rows of different lengths."""
    longest = max(map(len, rows))
    fill = [[pad] * (longest - len(row)) for row in rows]
    ids = [row + more if side == "right" else more + row for row, more in zip(rows, fill)]
    kept = [[1] * len(row) + [0] * len(more) for row, more in zip(rows, fill)]
    mask = [row if side == "right" else row[::-1] for row in kept]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def place(row: list[int], position: str) -> int:
    """The token before which the slots of a row stand."""
    at = row.index(SEP, 1)
    if position == "after_separator":
        while row[at] == SEP:
            at += 1
    return at


@pytest.mark.parametrize("position", sorted(PLACES))
@pytest.mark.parametrize("multi_layer", [True, False])
@pytest.mark.parametrize("family", ROWS)
@torch.no_grad()
def test_against_the_base_model_row_by_row(family: str, multi_layer: bool, position: str) -> None:
    """Each row alone: its prompt is given to the bare model as embeddings in its place, and hooks add to it there."""
    fields = {} if multi_layer else {"multi_layer": False, "bottleneck_dim": 8}
    model, made = adapted(encoder(family), config(position, **fields)), {}
    inputs = padded(ROWS[family], PAD[family])
    with intercept(lambda generated: made.__setitem__(generated.depth, generated.values)):
        actual = model(**inputs).last_hidden_state
    assert set(made) == {None, -1, *(range(1, 4) if multi_layer else ())}
    for number, row in enumerate(ROWS[family]):
        base, at, n = encoder(family), place(row, position), len(row)

        def add(depth: int, number: int = number, at: int = at):
            def hook(layer: nn.Module, args: tuple) -> tuple:
                states = args[0].clone()  # (1, n + l, d)
                states[0, at : at + l] += made[depth][number]
                return (states, *args[1:])

            return hook

        for depth in sorted(set(made) - {None, -1}):
            base.encoder.layer[depth].register_forward_pre_hook(add(depth))
        embeds = base.get_input_embeddings()(torch.tensor(row))  # (n, d)
        embeds = torch.cat([embeds[:at], made[-1][number], embeds[at:]])  # (n + l, d)
        expected = base(inputs_embeds=embeds[None]).last_hidden_state[0]
        text = [*range(at), *range(at + l, n + l)]
        assert_same(actual[number, :n], expected[text])


@pytest.mark.parametrize("position", sorted(PLACES))
@torch.no_grad()
def test_causal_model(position: str) -> None:
    """The separator is looked for in the instruction: what stands in the response, or first in the row, is none."""
    rows = [[SEP, 10, 11, SEP, 20, 21, 30, SEP, 31], [SEP, 12, SEP, 22, 30, 31, 32]]
    lengths = (6, 4)  # of the instructions
    model, seen = adapted(causal_lm(), config(position, task_type="CAUSAL_LM")), []
    inputs = padded(rows, side="left")
    labels = inputs["input_ids"].clone()
    for number, (row, n) in enumerate(zip(rows, lengths)):
        labels[number, : labels.shape[1] - len(row) + n] = -100
    with intercept(lambda made: seen.append(made.layout)):
        together = model(**inputs, labels=labels).logits
    for number, (row, n) in enumerate(zip(rows, lengths)):
        offset = labels.shape[1] - len(row)
        assert seen[-1].before_token[number].tolist() == [place(row, position) + offset] * l
        scope = (torch.arange(len(row)) < n)[None]
        alone = model(input_ids=torch.tensor([row]), instruction_mask=scope).logits[0]
        assert_same(together[number, offset:], alone)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    prompts = padded([row[:n] for row, n in zip(rows, lengths)], side="left")
    text = model.generate(**prompts, **how)
    assert torch.equal(model.generate(**prompts, **how, use_cache=False), text)
    assert torch.equal(
        model.generate(**prompts, **how, num_beams=2, use_cache=False), model.generate(**prompts, **how, num_beams=2)
    )


@torch.no_grad()
def test_other_methods_and_adapters_of_one_batch() -> None:
    """The field is one that all methods have; each row of a batch has its own adapter's place."""
    fields = {"num_virtual_tokens": l, "bottleneck_dim": 8}
    model = adapted(encoder(), IAPTConfig(**fields, prompt_position="before_separator", separator_id=SEP))
    model.add_adapter(
        "b", IAPTConfig(**fields, init_weights=False, prompt_position="after_separator", separator_id=SEP)
    )
    model.add_adapter("c", IAPTConfig(**fields, init_weights=False))
    single = [1, 14, 15, 16, 17]  # no separator, and none is needed
    rows, names = [*ROWS["bert"], single], ["b", "default", "c"]
    together = model(**padded(rows), adapter_names=names).last_hidden_state
    for number, (row, name) in enumerate(zip(rows, names)):
        alone = model(input_ids=torch.tensor([row]), adapter_names=[name]).last_hidden_state[0]
        assert_same(together[number, : len(row)], alone)


# ----------------------------------------------------------------------------------------------------- the separator


def test_it_is_the_tokenizers(tmp_path) -> None:
    """`sep_token`, or `eos_token` where there is none; it is kept with the adapter, which then needs no tokenizer."""
    words = tokenizer()
    words.save_pretrained(tmp_path / "eos")
    words.sep_token = "w5"
    words.save_pretrained(tmp_path / "sep")
    for name, expected in (("eos", words.eos_token_id), ("sep", words.convert_tokens_to_ids("w5"))):
        made = config("before_separator", separator_id=None, tokenizer_name_or_path=str(tmp_path / name))
        model = get_peft_model(encoder(), made)
        assert model.peft_config["default"].separator_id == expected
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "sep").rename(tmp_path / "gone")
    loaded = PeftModel.from_pretrained(encoder(), tmp_path / "adapter")
    assert loaded.peft_config["default"].separator_id == expected


def test_no_tokenizer_is_known() -> None:
    base = encoder()
    names = set(base.state_dict())
    with pytest.raises(ValueError, match=r"`prompt_position='after_separator'` needs the separator.*`separator_id`"):
        get_peft_model(base, config("after_separator", separator_id=None))
    assert set(base.state_dict()) == names


def test_tokenizer_without_a_separator(tmp_path) -> None:
    words = tokenizer()
    words.eos_token = None
    words.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"neither a `sep_token` nor an `eos_token`: give the token's id as `separator_id`"
    ):
        get_peft_model(encoder(), config("before_separator", separator_id=None, tokenizer_name_or_path=str(tmp_path)))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("position", "rows", "says"),
    [
        (
            "before_separator",
            [[1, 10, SEP, 20], [1, 10, 11], [1, 12]],
            r"separator 2 .*row\(s\) \[1, 2\] have none\. ",
        ),
        ("before_separator", [[SEP, 10, 11]], r"row\(s\) \[0\] have none"),
        ("after_separator", [[1, 10, SEP, 20], [1, 10, SEP]], r"row\(s\) \[1\] have none with text behind it"),
        ("after_separator", [[1, 10, SEP, SEP]], r"row\(s\) \[0\] have none with text behind it"),
    ],
)
def test_row_without_a_separator(position: str, rows: list[list[int]], says: str) -> None:
    model = adapted(encoder(), config(position))
    with pytest.raises(
        ValueError, match=rf"`prompt_position='{position}'` needs .*{says}.*'before', 'after_first', 'end'"
    ):
        model(**padded(rows))


def test_rows_are_named_by_their_place_in_the_batch() -> None:
    model = adapted(encoder(), config("before_separator"))
    with pytest.raises(ValueError, match=r"row\(s\) \[2\] have none"):
        model(**padded([[1, 10], [1, 10, SEP, 20], [1, 11]]), adapter_names=["__base__", "default", "default"])


def test_separator_in_the_response_is_none() -> None:
    """Where the prompt stands must not tell what the response is."""
    model = adapted(causal_lm(), config("before_separator", task_type="CAUSAL_LM"))
    ids = torch.tensor([[1, 10, 11, 20, SEP, 21]])
    with pytest.raises(ValueError, match=r"row\(s\) \[0\] have none"):
        model(ids, instruction_mask=torch.arange(6)[None] < 4)
    assert model(ids, instruction_mask=torch.arange(6)[None] < 5).logits.isfinite().all()


def test_embeddings_in_place_of_ids() -> None:
    model = adapted(encoder(), config("before_separator"))
    with pytest.raises(
        ValueError, match=r"`prompt_position='before_separator'` looks .*`inputs_embeds`: pass `input_ids`"
    ):
        model(inputs_embeds=torch.randn(1, 5, 32))


def test_decoder_of_a_pair_has_no_sentences() -> None:
    """Its instance is its start token."""
    model = adapted(pair("t5"), config("before_separator", target_modules=["decoder"]))
    with pytest.raises(ValueError, match=r"row\(s\) \[0\] have none"):
        model(input_ids=torch.tensor([[5, 6, 2]]), decoder_input_ids=torch.tensor([[0, 7, 2, 8]]))


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"prompt_position": "before", "separator_id": 2}, ValueError, r"`separator_id` is for .*got 2 with 'before'"),
        (
            {"prompt_position": "before_separator", "separator_id": -1},
            ValueError,
            "`separator_id` must be at least 0, got -1",
        ),
        (
            {"prompt_position": "before_separator", "separator_id": "x"},
            TypeError,
            "`separator_id` must be an integer, got 'x'",
        ),
        (
            {"prompt_position": "separator"},
            ValueError,
            r"`prompt_position`.*'before_separator', 'after_separator'.*got 'separator'",
        ),
    ],
)
def test_bad_fields(fields: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        IDPGConfig(**fields)
