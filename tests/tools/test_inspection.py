# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the tools say of vectors, tokens read and places, against what can be told without them."""

from __future__ import annotations

import pytest
import tiny
import torch
from methods import METHODS
from peft import get_peft_model

from peft_instance_prompt import IAPTConfig, record_choices
from peft_instance_prompt.tools.inspection import (
    active_generator,
    generated_parts,
    placements,
    prompt_vectors,
    readings,
    record,
    token_texts,
    token_weights,
)


IDS = torch.randint(3, tiny.VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
PADDED = {
    "input_ids": IDS.masked_fill(torch.tensor([[False] * 8, [True] * 3 + [False] * 5]), 0),
    "attention_mask": torch.tensor([[1] * 8, [0] * 3 + [1] * 5]),
    "instruction_mask": torch.tensor([[1] * 6 + [0] * 2, [0] * 3 + [1] * 4 + [0]]),
}


def adapted(method: str, **changes):
    fields = {"task_type": "CAUSAL_LM", "init_weights": False, **changes}
    return get_peft_model(tiny.causal_lm(), METHODS[method](**fields)).eval()


def test_iapt_reads_with_its_pooling_softmax():
    """Layer 0 reads the input embeddings: softmax over the instruction of the pool's scores, with the slots taken out."""
    model = adapted("iapt_after_first")  # slots stand in the middle of the instruction
    generator = active_generator(model)[1]
    weights = token_weights(model, PADDED, depth=0)
    assert weights.shape == (2, 4, 8)
    embeds = model.get_input_embeddings()(PADDED["input_ids"])
    with torch.no_grad():
        z = embeds @ (generator.down[0] * generator.down_factor) / embeds.square().mean(dim=-1, keepdim=True).sqrt()
        scores = z @ generator.pool[0]  # (B, S, l)
    for row in range(2):
        inside = PADDED["instruction_mask"][row].bool()
        torch.testing.assert_close(weights[row][:, inside], scores[row][inside].softmax(dim=0).T, atol=1e-5, rtol=1e-4)
        assert not weights[row][:, ~inside].any()


def test_lpt_reads_its_bins():
    model = adapted("lpt_pooled", num_virtual_tokens=2, prompt_position="before")
    weights = token_weights(model, PADDED)
    half = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]) / 3
    torch.testing.assert_close(weights[0], half)
    torch.testing.assert_close(weights[1][0], torch.tensor([0, 0, 0, 0.5, 0.5, 0, 0, 0]))
    last = token_weights(adapted("lpt"), PADDED)  # its MLP reads the last instruction token
    assert torch.equal(last[0], torch.eye(8)[5].expand(5, -1)) and torch.equal(last[1], torch.eye(8)[6].expand(5, -1))


def test_methods_that_read_no_weighted_mean_say_so():
    for model in (adapted("iapt", condition="constant"), adapted("idpg_single"), adapted("dynamic_prompt")):
        with pytest.raises(ValueError, match="no weighted means"):
            token_weights(model, PADDED)


def test_prompt_vectors_are_what_a_layer_gets():
    model, read = adapted("iapt", prompt_position="before"), []
    hook = lambda module, args, kwargs: read.append((args[0] if args else kwargs["hidden_states"])[:, :4])  # noqa: E731
    model.get_base_model().model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
    vectors = prompt_vectors(model, [{"input_ids": IDS}, {"input_ids": IDS[:1]}])
    assert vectors.shape == (3, 4, 32) and torch.equal(vectors, torch.cat(read))
    assert not torch.equal(prompt_vectors(model, [{"input_ids": IDS}], depth=2), vectors[:2])


@pytest.mark.parametrize("fields", [{"init_weights": True}, {"init_weights": True, "init_text": [7, 20, 9]}])
@pytest.mark.slots
def test_generated_parts(method, fields):
    """What `generate` returns for the instances: the start is taken out, and its size, in which the vectors are measured."""
    model = tiny.perturb(adapted(method, **fields))
    generator, batch = active_generator(model)[1], {"input_ids": IDS}
    made = record(model, batch)
    parts = generated_parts(model, [batch, {"input_ids": IDS[:1]}])
    assert tuple(parts) == generator.depths
    for depth, part in parts.items():
        with torch.no_grad():
            wanted = generator.generate(made[depth].instances, depth, generator.weights(depth))
        wanted = wanted.expand(2, -1, -1)  # (2, l, d)
        assert part.abs().max() > 0
        torch.testing.assert_close(part, torch.cat([wanted, wanted[:1]]), atol=1e-4, rtol=1e-3)
    last = generator.depths[-1]
    assert tuple(generated_parts(model, [batch], [last])) == (last,)
    with pytest.raises(ValueError, match="`depth`"):
        generated_parts(model, [batch], [7])


def test_generated_parts_without_a_base_state():
    model, batch = adapted("iapt", init_weights="paper"), {"input_ids": IDS}
    assert torch.equal(generated_parts(model, [batch], [1])[1], prompt_vectors(model, [batch], 1))


def test_readings():
    """One row's tokens, without padding, and the numbers of `token_weights` for them."""
    model = adapted("iapt")
    one, two = readings(model, PADDED, tiny.tokenizer())
    assert [len(r.tokens) for r in (one, two)] == [8, 5] and two.columns.tolist() == [3, 4, 5, 6, 7]
    assert two.inside.tolist() == [True] * 4 + [False] and tuple(two.weights) == (0, 1, 2)
    for depth in range(3):
        assert torch.equal(two.weights[depth], token_weights(model, PADDED, depth)[1][:, 3:])
        torch.testing.assert_close(two.ratios(depth).sum(dim=1), torch.full((4,), 4.0))  # a mean of 1 over 4 tokens
    for reading in readings(adapted("lpt"), PADDED, None):
        assert reading.tokens_read(next(iter(reading.weights))).tolist() == [1.0] * 5  # it reads the last token only
    pooled = readings(adapted("lpt_pooled", num_virtual_tokens=1), PADDED, None)[0]
    assert pooled.tokens_read(next(iter(pooled.weights))).tolist() == pytest.approx([6.0])  # and this one all alike
    assert pooled.tokens == [str(token) for token in IDS[0].tolist()]
    assert readings(adapted("idpg_single"), PADDED, None)[0].weights == {}


def test_tokens_have_their_spaces():
    """Joined they are the text, also where a tokenizer drops the space of a token that stands alone."""

    class Stripping:
        words = ["A", " fine", " film", "!"]

        def decode(self, ids):
            return "".join(self.words[token] for token in ids).strip(" ")

    assert token_texts(Stripping(), [0, 1, 2, 3]) == ["A", " fine", " film", "!"]

    class Rewriting(Stripping):  # whose text so far changes with the next token
        def decode(self, ids):
            return super().decode(ids) if len(ids) < 4 else "a different text"

    assert token_texts(Rewriting(), [0, 1, 2, 3]) == ["A", " fine", " film", "!"]


def test_placements():
    """Fixed places, and per row those that dynamic prompting chooses, against its own record of them."""
    lengths, behind = placements(adapted("iapt", prompt_position="before"), [PADDED, {"input_ids": IDS}])
    assert lengths.tolist() == [4] * 4 and behind.tolist() == [0] * 4
    lengths, behind = placements(adapted("idpg_single", prompt_position="end"), [PADDED])
    assert lengths.tolist() == behind.tolist() == [4, 4]
    many = {"input_ids": torch.randint(3, tiny.VOCAB, (20, 8))}
    for method in ("dynamic_prompt", "dynamic_prompt_all"):
        model = adapted(method)
        with record_choices() as record:
            lengths, behind = placements(model, [many])
        assert len(set(behind.tolist())) > 1
        if record[0].lengths is None:
            assert torch.equal(behind, record[0].positions) and (lengths == 4).all()
        else:
            assert torch.equal(lengths, record[0].lengths)
            assert (behind <= lengths).all()  # of those that are not used, none is counted


def test_training_mode_is_given_back():
    model = adapted("iapt").train()
    prompt_vectors(model, [{"input_ids": IDS}])  # in training, a causal model would need labels
    assert all(module.training for module in model.modules())


def test_bad_input():
    model = adapted("iapt")
    with pytest.raises(ValueError, match=r"`depth`.*\(0, 1, 2\), got 3"):
        prompt_vectors(model, [{"input_ids": IDS}], depth=3)
    with model.disable_adapter(), pytest.raises(ValueError, match="active"):
        active_generator(model)
    pair = get_peft_model(tiny.causal_lm(), IAPTConfig(task_type="CAUSAL_LM"))
    assert active_generator(pair)[0].info.num_layers == 3
