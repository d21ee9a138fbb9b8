# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""How transformers calls a stack: names of either release, and releases that nobody tested."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from tiny import adapted, batch, causal_lm
from torch import nn
from transformers import DynamicCache

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.engine import calls


def test_the_cache_is_found_by_what_it_is() -> None:
    cache = DynamicCache()
    assert calls.cache_of({"attention_mask": None, "any_name": cache}) == ("any_name", cache)
    assert calls.cache_of({"past_key_values": None}) == (None, None)
    layer = nn.Identity()
    assert (
        calls.LayerCall(layer, (1, cache), {}).cache
        is cache
        is calls.LayerCall(layer, (), {"layer_past": cache}).cache
    )


@pytest.mark.parametrize("positional", [0, 1, 2])
def test_states_and_mask_of_a_layer(positional: int) -> None:
    """They are found and replaced where the caller put them."""

    class Layer(nn.Module):
        def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, other: int = 0) -> None: ...

    given = {"hidden_states": torch.zeros(1), "attention_mask": torch.ones(1)}
    args = tuple(list(given.values())[:positional])
    call = calls.LayerCall(Layer(), args, dict(list(given.items())[positional:]))
    assert call.states is given["hidden_states"] and call.mask is given["attention_mask"]
    states, mask = torch.zeros(2), torch.ones(2)
    changed = call.with_states(states).with_mask(mask)
    assert changed.states is states and changed.mask is mask and len(changed.args) == positional
    assert call.states is given["hidden_states"] and call.mask is given["attention_mask"]
    with pytest.raises(ValueError, match="Positions cannot be hidden from Identity, which takes no `attention_mask`"):
        calls.LayerCall(nn.Identity(), (states,), {}).with_mask(mask)


@pytest.mark.parametrize("name", calls.CACHE_ARGUMENTS)
def test_both_names_of_the_cache_reach_a_stack(name: str) -> None:
    """Whatever this release calls it, callers of both releases are understood."""
    model = adapted(causal_lm(), IAPTConfig(task_type="CAUSAL_LM"))
    inputs, step = batch(9, 6), torch.tensor([[7], [8]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        cache = calls.cache_of(first)[1]
        stack = model.base_model.model.model
        found = stack(input_ids=step, attention_mask=mask, **{name: cache}).last_hidden_state
        ids = torch.cat([inputs["input_ids"], step], dim=1)
        scope = torch.cat([inputs["attention_mask"], torch.zeros(2, 1, dtype=torch.long)], dim=1)
        expected = model(ids, attention_mask=mask, instruction_mask=scope, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found[:, 0], expected[:, -1], atol=1e-4, rtol=1e-4)


def test_a_cache_given_twice() -> None:
    model = causal_lm()
    call = dict.fromkeys(calls.CACHE_ARGUMENTS, DynamicCache())
    with pytest.raises(TypeError, match="LlamaModel got its cache twice, as cache and as past_key_values"):
        calls.by_name(model.model, (), call)


def test_a_stack_that_is_called_in_another_way_is_refused_by_name() -> None:
    class Other(tf.LlamaModel):
        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, memory=None, **kwargs):
            return super().forward(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)

    model = causal_lm()
    other = Other(model.config)
    other.load_state_dict(model.model.state_dict())
    model.model = other
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(
        ValueError, match=r"The forward of Other \('model'\) is not understood: it takes no `cache or past_key"
    ):
        get_peft_model(model, IAPTConfig(task_type="CAUSAL_LM"))
    assert [name for name, _ in model.named_modules()] == names


def test_slots_in_mamba_are_refused() -> None:
    config = tf.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match="IAPT cannot be used here: slots need layers|The forward of MambaModel"):
        get_peft_model(tf.MambaForCausalLM(config), IAPTConfig(task_type="CAUSAL_LM"))


(OLDEST_MAJOR, OLDEST_MINOR), (MAJOR, MINOR) = calls.TESTED
NEXT = f"{MAJOR}.{MINOR + 1}.0"


@pytest.mark.parametrize(
    "version,switch,refused",
    [
        (f"{MAJOR}.{MINOR}.7", None, False),
        (NEXT, None, True),
        (f"{MAJOR + 1}.0.0.dev0", None, True),
        (NEXT, "1", False),
        (f"{OLDEST_MAJOR}.{OLDEST_MINOR - 1}.2", None, True),
    ],
)
def test_a_release_that_was_not_tested(
    version: str, switch: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No adapter is attached beside it, unless the user wants to try."""
    monkeypatch.setattr(tf, "__version__", version)
    monkeypatch.delenv(calls.SWITCH, raising=False)
    if switch:
        monkeypatch.setenv(calls.SWITCH, switch)
    model, config = causal_lm(), IAPTConfig(task_type="CAUSAL_LM")
    names = [name for name, _ in model.named_modules()]
    if not refused:
        get_peft_model(model, config)
        return
    tested = f"{OLDEST_MAJOR}.{OLDEST_MINOR} to {MAJOR}.{MINOR}"
    with pytest.raises(RuntimeError, match=f"{tested}; transformers {version} is installed.*{calls.SWITCH}=1"):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names


def test_one_warning_at_import() -> None:
    code = """
import warnings
import peft  # which imports transformers, perhaps twice
import transformers
transformers.__version__ = "999.0.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peft_instance_prompt
    import peft_instance_prompt
(one,) = [w for w in caught if "is tested with transformers" in str(w.message)]
assert one.filename == "<string>", one.filename
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
