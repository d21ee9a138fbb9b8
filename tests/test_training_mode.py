# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Trainers that compare the probabilities of two passes switch dropout off, as TRL's `disable_dropout` does: then a pass in training
mode is that of evaluation, and nothing is drawn at random."""

from __future__ import annotations

import pytest
import torch
from methods import METHODS
from peft import PeftModel, get_peft_model
from tiny import adapted, assert_same, batch, causal_lm
from trl.trainer.utils import disable_dropout_in_model, selective_log_softmax

from peft_instance_prompt import DynamicPromptConfig, IDPGConfig, IPTConfig, LPTConfig


INPUTS = batch(9, 6, 8, 7)
RESPONSE = 3  # tokens
RANDOM = {
    "idpg": lambda: IDPGConfig(phm_n=4, dropout=0.5),
    "ipt": lambda: IPTConfig(num_virtual_tokens=4, strategy="encoder", bottleneck_dim=8, dropout=0.5),
    "lpt": lambda: LPTConfig(bottleneck_dim=8, dropout=0.5),
    "lpt_none": lambda: LPTConfig(generator_type="none", dropout=0.5),
    "dynamic_prompt": lambda: DynamicPromptConfig(num_virtual_tokens=4, position="task"),
    "dynamic_prompt_all": lambda: DynamicPromptConfig(
        num_virtual_tokens=4, length="instance", representation="instance"
    ),
}


def log_probabilities(model: PeftModel) -> torch.Tensor:
    """Those of the response's tokens, (B, T), in the mode that the model is in."""
    ids = INPUTS["input_ids"]
    instruction = INPUTS["attention_mask"].bool() & (torch.arange(9) < 9 - RESPONSE)
    logits = model(**INPUTS, instruction_mask=instruction).logits[:, -RESPONSE - 1 : -1]
    return selective_log_softmax(logits, ids[:, -RESPONSE:])


@pytest.mark.parametrize("name", RANDOM)
def test_two_passes_in_training_mode(name: str) -> None:
    model = adapted(causal_lm(), RANDOM[name]()).train()
    torch.manual_seed(1)
    drawn = [log_probabilities(model).detach() for _ in range(4)]
    assert not all(torch.equal(one, drawn[0]) for one in drawn)
    disable_dropout_in_model(model)
    assert torch.equal(log_probabilities(model), log_probabilities(model))
    trained = log_probabilities(model)
    trained.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert_same(trained, log_probabilities(model.eval()))


def test_first_step_of_policy_optimisation(method: str) -> None:
    """The policy generates in evaluation and learns in training mode: the ratio of its probabilities is 1, and the divergence from a
    reference that is the adapter as it was is 0."""
    model = get_peft_model(causal_lm(), METHODS[method](task_type="CAUSAL_LM"))
    disable_dropout_in_model(model)
    with torch.no_grad():
        old = log_probabilities(model.eval())
    reference = get_peft_model(causal_lm(), METHODS[method](task_type="CAUSAL_LM")).eval()
    reference.load_state_dict(model.state_dict())
    new = log_probabilities(model.train())
    assert new.requires_grad
    with torch.no_grad():
        difference = log_probabilities(reference) - new
    assert_same((new - old).exp(), torch.ones_like(new))
    assert_same(difference.expm1() - difference, torch.zeros_like(new), 1e-8)
