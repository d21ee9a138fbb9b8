# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Encoders under their heads."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from methods import KINDS, METHODS, WITHOUT_SLOTS
from peft import PeftModel
from tiny import ENCODERS, adapted, assert_same, batch, encoder

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.engine.layer import InstancePromptLayer
from peft_instance_prompt.nn.rational import rational


HEADS = {
    "FEATURE_EXTRACTION": tf.AutoModel,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
}
# Every method meets one family; the first of each kind meets all of them.
CASES = [(m, f) for m in METHODS for f in ENCODERS if m in KINDS or f == "bert"]
# The first method meets every head of every family, the others the heads of one.
HEADED = [(m, f, h) for i, m in enumerate(KINDS) for f in ENCODERS for h in HEADS if i == 0 or f == "roberta"]
LENGTHS = (9, 6, 4)


def prompted(method: str, family: str, task_type: str = "FEATURE_EXTRACTION", fields: dict | None = None, **changes):
    base = encoder(family, HEADS[task_type], **changes)
    return adapted(base, METHODS[method](task_type=task_type, **(fields or {})))


def injected(model: torch.nn.Module) -> InstancePromptLayer:
    (layer,) = (module for module in model.modules() if isinstance(module, InstancePromptLayer))
    return layer


def answer(output) -> torch.Tensor:
    """What a head says: (B, S, ...) of tokens or (B, ...) of rows."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)  # (B, S, 2)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize(("method", "family"), CASES)
@torch.no_grad()
def test_encoder(method: str, family: str) -> None:
    base = encoder(family, attn_implementation="eager").double()  # what is compared is equal but for rounding
    untouched = copy.deepcopy(base)
    left, right = batch(*LENGTHS, side="left"), batch(*LENGTHS, side="right")
    shown = {"output_hidden_states": True, "output_attentions": True}
    plain = untouched(**right, **shown)
    model = adapted(base, METHODS[method](task_type="FEATURE_EXTRACTION"))
    out, moved = model(**right, **shown), model(**left)

    # Whoever stands outside of the stack sees the tokens and nothing else.
    assert out.last_hidden_state.shape == plain.last_hidden_state.shape
    assert [x.shape for x in out.hidden_states] == [x.shape for x in plain.hidden_states]
    assert [x.shape for x in out.attentions] == [x.shape for x in plain.attentions]
    torch.testing.assert_close(out.hidden_states[-1], out.last_hidden_state, rtol=0, atol=0)
    assert (out.last_hidden_state - plain.last_hidden_state).abs().max() > 1e-2, "the adapter does nothing"
    if method not in WITHOUT_SLOTS:
        assert (1 - out.attentions[-1].sum(dim=-1)[0] > 1e-6).any(), "no attention goes to the prompt"

    # A row's numbers depend neither on the side of the padding nor on the rows beside it.
    for row, n in enumerate(LENGTHS):
        alone = model(right["input_ids"][row : row + 1, :n], **shown)
        assert_same(out.last_hidden_state[row, :n], alone.last_hidden_state[0])
        assert_same(moved.last_hidden_state[row, -n:], alone.last_hidden_state[0])
        for together, states in zip(out.hidden_states, alone.hidden_states):
            assert_same(together[row, :n], states[0])
        for together, maps in zip(out.attentions, alone.attentions):
            assert_same(together[row, :, :n, :n], maps[0])
        if out.get("pooler_output") is not None:
            assert_same(out.pooler_output[row], alone.pooler_output[0])

    # The pooler reads the first token, and not a slot that stands before it.
    if out.get("pooler_output") is not None:
        first = out.last_hidden_state[:, :1]  # (B, 1, d)
        stack = model.get_base_model()
        expected = stack.pooler(first[:, 0]).tanh() if family == "albert" else stack.pooler(first)
        assert_same(out.pooler_output, expected)
        assert (out.pooler_output - plain.pooler_output).abs().max() > 1e-3

    with model.disable_adapter():
        assert torch.equal(model(**right).last_hidden_state, plain.last_hidden_state)
    again = model.unload()
    assert torch.equal(again(**right).last_hidden_state, plain.last_hidden_state)
    assert not any(isinstance(module, InstancePromptLayer) for module in again.modules())
    for one, other in zip(again.modules(), untouched.modules()):
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)
        assert len(one._forward_hooks) == len(other._forward_hooks)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "electra", "albert"])  # the others have but one
@torch.no_grad()
def test_attention_implementations_agree(kind: str, family: str) -> None:
    inputs = batch(*LENGTHS, side="right")
    eager, sdpa = (prompted(kind, family, attn_implementation=name) for name in ("eager", "sdpa"))
    assert sdpa.get_base_model().config._attn_implementation == "sdpa"
    real = inputs["attention_mask"].bool()
    # The kernels round differently, and so do processors.
    assert_same(sdpa(**inputs).last_hidden_state[real], eager(**inputs).last_hidden_state[real], 5e-5)


@pytest.mark.parametrize(("method", "family", "task_type"), HEADED)
def test_head(method: str, family: str, task_type: str) -> None:
    model = prompted(method, family, task_type).double()  # what is compared is equal but for rounding
    right = batch(*LENGTHS, side="right")
    with torch.no_grad():
        out = answer(model(**right))
        with model.disable_adapter():
            plain = answer(model(**right))
        per_token = task_type != "SEQ_CLS"
        for row, n in enumerate(LENGTHS):
            alone = answer(model(right["input_ids"][row : row + 1, :n]))[0]
            assert_same(out[row, :n] if per_token else out[row], alone)
        if per_token:  # a classifier that reads the first column wants its padding on the right
            moved = answer(model(**batch(*LENGTHS, side="left")))
            assert_same(moved[0], out[0])
            assert_same(moved[2, -4:], out[2, :4])
    assert out.shape == plain.shape and (out - plain).abs().max() > 1e-3
    assert torch.equal(plain, answer(encoder(family, HEADS[task_type]).double()(**right)))
    # Its loss, and a gradient for all that is trained.
    row = torch.tensor([0, 1, 1])
    labels = {
        "SEQ_CLS": {"labels": row},
        "TOKEN_CLS": {"labels": (right["input_ids"] % 2).where(right["attention_mask"].bool(), -100)},
        "QUESTION_ANS": {"start_positions": row, "end_positions": row + 2},
    }.get(task_type)
    if labels is not None:
        model.train()(**right, **labels).loss.backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
@torch.no_grad()
@pytest.mark.slots
def test_prompt_positions(kind: str, task_type: str) -> None:
    right, outs = batch(*LENGTHS, side="right"), []
    for position in ("before", "after_first", "end"):
        try:
            METHODS[kind](prompt_position=position)
        except (TypeError, ValueError):
            continue  # the method knows no such place
        for family in ("bert", "roberta"):
            model = prompted(kind, family, task_type, {"prompt_position": position}).double()
            out = answer(model(**right))
            for row, n in enumerate(LENGTHS):
                alone = answer(model(right["input_ids"][row : row + 1, :n]))[0]
                assert_same(out[row, :n] if out.dim() == 3 else out[row], alone, 1e-10)
        outs.append(out)
    assert len(outs) > 1
    # Where the slots take no place in the count of positions, an encoder cannot tell one place from another.
    if not injected(model).generators["default"].first_visible_layer:
        assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(outs, 2))


def test_saved_head_and_prompt(kind: str, tmp_path: Path) -> None:
    model = prompted(kind, "bert", "SEQ_CLS")
    model.save_pretrained(tmp_path)
    inputs = batch(*LENGTHS, side="right")
    again = PeftModel.from_pretrained(encoder("bert", HEADS["SEQ_CLS"], seed=0), tmp_path, adapter_name="other").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


# ------------------------------------------------------------------------------ slots are embedded as any token would be


def first_layer_input(model: PeftModel, call: Callable) -> torch.Tensor:
    """What reaches the first layer (B, N, d)."""
    seen = []
    first = model.get_base_model().get_submodule(injected(model).info.layers_name)[0]

    def look(module, args, kwargs) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = first.register_forward_pre_hook(look, with_kwargs=True)
    call()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet", "electra", "albert"])
@pytest.mark.parametrize("where", ["before", "after_first"])
@torch.no_grad()
def test_slots_are_embedded_like_tokens(family: str, where: str) -> None:
    """A slot that nothing is written to is a copy of the first token, with a position of its own."""
    config = IAPTConfig(bottleneck_dim=8, prompt_position=where, layers_to_transform=[3], num_virtual_tokens=3)
    model = adapted(encoder(family), config)
    base, (ids, n) = model.get_base_model(), (batch(7)["input_ids"], 7)
    has_types = family not in ("roberta", "mpnet")
    types = torch.tensor([[1, 0, 0, 0, 1, 1, 1]])
    kwargs = {"token_type_ids": types} if has_types else {}
    found = first_layer_input(model, lambda: model(ids, **kwargs))

    # By hand: the first token three times more, and the positions counted through.
    at = int(where == "after_first")  # the slots stand before this token
    widened = torch.cat([ids[:, :at], ids[:, :1].expand(1, 3), ids[:, at:]], dim=1)  # (1, 10)
    word = base.get_input_embeddings()(widened)  # (1, 10, e)
    offset = {"roberta": 2, "mpnet": 2}.get(family, 0)  # they count on from the id of padding
    place = base.embeddings.position_embeddings.weight[offset : offset + n + 3]  # (10, e)
    total = word + place
    if hasattr(base.embeddings, "token_type_embeddings"):
        own = torch.cat([types[:, :at], types[:, at : at + 1].expand(1, 3), types[:, at:]], dim=1)
        own = own if has_types else torch.zeros_like(own)
        total = total + base.embeddings.token_type_embeddings(own)
    norm = base.embeddings.LayerNorm
    expected = torch.nn.functional.layer_norm(total, total.shape[-1:], norm.weight, norm.bias, norm.eps)
    if family == "electra":
        expected = base.embeddings_project(expected)
    if family == "albert":
        expected = base.encoder.embedding_hidden_mapping_in(expected)
    assert_same(found, expected)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@torch.no_grad()
def test_embeds_in_place_of_ids(kind: str, family: str) -> None:
    model, inputs = prompted(kind, family), batch(*LENGTHS, side="right")
    embeds = model.get_base_model().get_input_embeddings()(inputs["input_ids"])
    found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    real = inputs["attention_mask"].bool()
    assert_same(found[real], model(**inputs).last_hidden_state[real])


@torch.no_grad()
def test_shared_layers_have_prompts_of_their_own() -> None:
    """ALBERT against a loop over its layers: two, each run twice, with four sets of prompts."""
    model = adapted(
        encoder("albert", attn_implementation="eager"),
        IAPTConfig(bottleneck_dim=8, activation="rational", down_factor=0.5),
    )
    base, ids = model.get_base_model(), batch(7)["input_ids"]
    found = model(ids, output_hidden_states=True).hidden_states
    generator = injected(model).generators["default"]
    assert generator.depths == (0, 1, 2, 3) and generator.num_slots == 4

    embeds = base.get_input_embeddings()(torch.cat([ids[:, :1].expand(1, 4), ids], dim=1))  # (1, 11, e)
    states = base.encoder.embedding_hidden_mapping_in(base.embeddings(inputs_embeds=embeds))  # (1, 11, d)
    for depth in range(4):
        down, pool, up = generator.down[depth], generator.pool[depth], generator.up[depth]
        text, anchor = states[:, 4:], states[:, 4:5]  # (1, 7, d), (1, 1, d)
        size = text.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt()  # (1, 7, 1)
        z = (text @ down) * 0.5 / size  # (1, 7, m)
        pooled = (z @ pool).softmax(dim=1).transpose(1, 2) @ z + generator.slot[depth]  # (1, 4, m)
        made = rational(pooled, generator.activation[depth]) @ up  # (1, 4, d)
        made = anchor.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt() * made
        kept = anchor if depth == 0 else states[:, :4]  # later vectors are added to what the slots hold
        states = torch.cat([kept + made, text], dim=1)  # (1, 11, d)
        states = base.encoder.albert_layer_groups[depth // 2](states)
        states = states[0] if isinstance(states, tuple) else states
        assert_same(found[depth + 1], states[:, 4:])


# ---------------------------------------------------------------------------------------------- positions that run out


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@torch.no_grad()
@pytest.mark.slots
def test_sequence_that_does_not_fit(kind: str, family: str) -> None:
    model = prompted(kind, family)
    generator = injected(model).generators["default"]
    if generator.first_visible_layer:
        pytest.skip("slots that the first layers do not see take no positions")
    room = 64 - (2 if family == "roberta" else 0)  # RoBERTa counts on from the id of padding
    num_slots = generator.num_slots
    assert model(**batch(room - num_slots)).last_hidden_state.shape[1] == room - num_slots
    says = f"the model has {room} positions, and {room - num_slots + 1} tokens with {num_slots} prompt slots need {room + 1}"
    with pytest.raises(ValueError, match=says):
        model(**batch(room - num_slots + 1))
    # What counts is the longest row, not the columns of padding.
    assert model(**batch(room - num_slots, 5, side="left")).last_hidden_state.isfinite().all()
    with model.disable_adapter():
        assert model(**batch(room)).last_hidden_state.shape[1] == room
