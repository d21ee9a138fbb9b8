# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Prompt embeddings for engines that know nothing of adapters."""

from __future__ import annotations

import base64
import io

import pytest
import tiny
import torch
from methods import METHODS, WITHOUT_SLOTS
from peft import get_peft_model

from peft_instance_prompt import encode_prompt_embeds, to_prompt_embeds
from peft_instance_prompt.engine.forward import current_pass
from peft_instance_prompt.generator import INPUT
from peft_instance_prompt.tools.inspection import active_generator


def adapted(method: str, family: str = "llama"):
    torch.manual_seed(1)
    return get_peft_model(tiny.causal_lm(family), METHODS[method](task_type="CAUSAL_LM", init_weights=False)).eval()


def at_input(method: str) -> bool:
    return active_generator(adapted(method))[1].depths == (INPUT,)


AT_INPUT = [method for method in METHODS if method not in WITHOUT_SLOTS and at_input(method)]
IDS = torch.randint(3, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 5 + [1] * 4])
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("method", AT_INPUT)
def test_the_bare_model_writes_the_same(method, family):
    """Left-padded rows by the adapter in a batch; each row's embeddings alone by the bare model."""
    model = adapted(method, family)
    wanted = model.generate(input_ids=IDS, attention_mask=MASK, **NEW)[:, 9:]
    embeds = to_prompt_embeds(model, IDS, MASK)
    assert current_pass.get() is None
    bare = model.unload()
    for row, own, tokens in zip(embeds, wanted, MASK.sum(dim=1)):
        assert row.dim() == 2 and tokens <= len(row) <= tokens + 6 and not row.requires_grad
        written = bare.generate(inputs_embeds=row[None], attention_mask=torch.ones(1, len(row)), **NEW)
        assert torch.equal(written[0], own)


def test_there_are_methods_that_can_be_served():
    assert {type(METHODS[method]()).__name__ for method in AT_INPUT} == {
        "DynamicPromptConfig",
        "IDPGConfig",
        "IPTConfig",
    }


@pytest.mark.parametrize("method", AT_INPUT)
def test_the_model_is_left_as_it_was(method):
    model = adapted(method)
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    before = model(IDS).logits
    to_prompt_embeds(model, IDS)
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert torch.equal(model(IDS).logits, before)


def test_no_layer_is_run():
    """With an instance vector from the embeddings, the pass ends before the first layer."""
    model, runs = adapted("idpg_single"), []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *args: runs.append(1))
    to_prompt_embeds(model, IDS)
    assert not runs


def test_refusals():
    with pytest.raises(ValueError, match="layer 0, layer 1, layer 2.*input only"):
        to_prompt_embeds(adapted("iapt"), IDS)
    with pytest.raises(ValueError, match="layer 1"):
        to_prompt_embeds(adapted("lpt"), IDS)
    with pytest.raises(ValueError, match="training mode"):
        to_prompt_embeds(adapted("ipt").train(), IDS)
    with pytest.raises(ValueError, match="active"):
        to_prompt_embeds(tiny.causal_lm(), IDS)


def test_encoding_holds_one_prompt():
    prompts = torch.randn(100, 3, 8)
    text = encode_prompt_embeds(prompts[7])
    read = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    assert torch.equal(read, prompts[7])
    assert len(text) < 4000  # and not the whole batch behind the view
    with pytest.raises(ValueError, match="embeddings \\(positions, e\\) of one prompt"):
        encode_prompt_embeds(prompts)
