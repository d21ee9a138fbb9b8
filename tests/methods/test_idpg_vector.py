# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Where IDPG's vector of the instance comes from: the frozen pass, and vectors that the caller gives."""

from __future__ import annotations

import pytest
import torch
from idpg_models import INPUTS, LABELS, VECTORS, L, config, count, d, given, logits
from peft import get_peft_model
from tiny import adapted, assert_same, causal_lm, generator_of, perturb

from peft_instance_prompt.engine.intercept import intercept


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({}, 1),
        ({"depth_input": "instance"}, 1),
        ({"multi_layer": False, "bottleneck_dim": 8}, 1),
        ({"instance_source": "embeddings"}, 0),
        ({"condition": "constant"}, 0),
    ],
)
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_frozen_pass_runs_once(fields: dict, extra: int, how: dict) -> None:
    model = adapted(causal_lm(), config(**fields))
    calls = []
    model.base_model.model.model.layers[0].register_forward_hook(lambda *_: calls.append(None))
    model.generate(**INPUTS, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0, **how)
    assert len(calls) == 5 + extra
    calls.clear()
    model.train()(**INPUTS, labels=LABELS).loss.backward()
    assert len(calls) == 1 + extra


def test_frozen_pass_has_no_dropout_and_no_gradient() -> None:
    model, seen = get_peft_model(causal_lm(attention_dropout=0.5), config()), []
    for train in (False, True, True):
        model.train(train)
        modes = [module.training for module in model.modules()]
        with intercept(lambda made: seen.append(made.values) if made.depth is None else None):
            model(**INPUTS, labels=LABELS)
        assert modes == [module.training for module in model.modules()]
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])
    assert not seen[1].requires_grad


def test_dropout_in_training_only() -> None:
    model = adapted(causal_lm(), config(dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model, labels=LABELS), logits(model, labels=LABELS))
    model.add_adapter("later", config(dropout=0.5))
    model.eval().add_adapter("latest", config(dropout=0.5))
    assert generator_of(model, "latest").training is False


def test_constant_condition() -> None:
    """All instances get one prompt, the constant is trained, and nothing else of the generator changes."""
    model, seen = adapted(causal_lm(), config(condition="constant", init_weights="paper")), []
    with intercept(lambda made: seen.append(made.values)):
        model(**INPUTS, labels=LABELS).loss.backward()
    assert len(seen) == L and all(torch.equal(made[0], made[1]) for made in seen)
    generator = generator_of(model)
    assert generator.constant.grad.any()
    assert count(generator) == count(generator_of(get_peft_model(causal_lm(), config()))) + d


# -------------------------------------------------------------------------------------------------------- given vectors


def test_given_vectors_in_generate() -> None:
    """Beams included; another vector gives another text; and it is what forward says with the same vectors."""
    model = adapted(causal_lm(), given())
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = [model.generate(**INPUTS, instance_embeds=v, num_beams=2, **how) for v in (VECTORS, VECTORS, -VECTORS)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    text = model.generate(**INPUTS, instance_embeds=VECTORS, **how)
    mask = torch.cat([INPUTS["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    instruction = mask.clone()
    instruction[:, 9:] = 0
    kwargs = {"attention_mask": mask, "instruction_mask": instruction, "instance_embeds": VECTORS}
    assert torch.equal(model(text[:, :-1], **kwargs).logits[:, 8:].argmax(-1), text[:, 9:])


@pytest.mark.parametrize(
    ("vectors", "error", "says"),
    [
        (None, ValueError, r"needs `instance_embeds`.*\(2, 12\)"),
        (torch.randn(2, 13), ValueError, r"`instance_embeds`.*\(2, 12\).*\(2, 13\)"),
        (torch.randn(3, 12), ValueError, r"`instance_embeds`.*\(2, 12\).*\(3, 12\)"),
        (torch.randn(12), ValueError, r"`instance_embeds`.*\(2, 12\).*\(12,\)"),
        (torch.ones(2, 12, dtype=torch.long), TypeError, "`instance_embeds` must be a tensor of floats.*int64"),
        ([[0.0] * 12] * 2, TypeError, "`instance_embeds` must be a tensor of floats.*list"),
    ],
)
def test_bad_instance_embeds(vectors, error: type, says: str) -> None:
    model = get_peft_model(causal_lm(), given()).eval()
    with pytest.raises(error, match=says):
        model(**INPUTS, instance_embeds=vectors)
    if not isinstance(vectors, list):
        with pytest.raises(error, match="`instance_embeds`"):
            model.generate(**INPUTS, instance_embeds=vectors, max_new_tokens=2, pad_token_id=0)
    assert model(**INPUTS, instance_embeds=VECTORS).logits.isfinite().all()


def test_instance_embeds_that_are_not_used() -> None:
    model = get_peft_model(causal_lm(), config()).eval()
    expected = logits(model)
    with pytest.warns(UserWarning, match="`instance_embeds` are not used.*'frozen'"):
        assert torch.equal(logits(model, instance_embeds=VECTORS), expected)


def test_mixed_batch_of_sources() -> None:
    """One row's adapter takes the vectors, the other's makes its own."""
    model = adapted(causal_lm(), given())
    model.add_adapter("own", config())
    perturb(model, 1, adapter="own")
    rows = {}
    for name in ("default", "own"):
        model.set_adapter(name)
        rows[name] = logits(model, instance_embeds=VECTORS)
    mixed = logits(model, instance_embeds=VECTORS, adapter_names=["own", "default"])
    assert_same(mixed[0], rows["own"][0])
    assert_same(mixed[1, 3:], rows["default"][1, 3:])
