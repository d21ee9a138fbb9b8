# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Transformers' own adapters: `add_adapter`, `load_adapter`, and LoRA beside a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from prompted_model import GREEDY, INPUTS, config, logits, prompted
from tiny import assert_same, causal_lm, perturb


@pytest.mark.native
def test_native_adapters(method: str, tmp_path: Path) -> None:
    peft_model = prompted(method)
    peft_model.save_pretrained(tmp_path / "peft")
    expected = logits(peft_model)
    model = causal_lm()
    model.add_adapter(config(method), adapter_name="own")
    perturb(model, adapter="own")
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.generate(**INPUTS, **GREEDY), peft_model.generate(**INPUTS, **GREEDY))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(causal_lm()))
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "native")
    assert json.loads((tmp_path / "native" / "adapter_config.json").read_text())["peft_type"]
    # From one to the other, in both directions.
    assert torch.equal(logits(PeftModel.from_pretrained(causal_lm(), tmp_path / "native")), expected)
    model.add_adapter(config(method), adapter_name="second")
    perturb(model, seed=4, adapter="second")
    model.set_adapter("second")
    assert (logits(model) - expected).abs().max() > 1e-2
    model.load_adapter(tmp_path / "peft", adapter_name="third")
    model.set_adapter("third")
    assert torch.equal(logits(model), expected)
    model.set_adapter("own")
    model.delete_adapter("second")
    assert torch.equal(logits(model), expected)
    assert not [name for name in model.state_dict() if ".second." in name]


@pytest.mark.native
@pytest.mark.parametrize("template", [[90], None])
def test_native_generate(kind: str, template: list[int] | None) -> None:
    model = causal_lm()
    model.add_adapter(config(kind, response_template=template))
    perturb(model)
    ids = torch.tensor([[5, 6, 7, 8, 90], [9, 10, 11, 12, 90]])
    text = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=False), text)
    assert torch.equal(model.generate(ids[:1], **GREEDY, assistant_model=causal_lm(seed=1)), text[:1])


@pytest.mark.native
def test_native_instruction_mask(kind: str) -> None:
    model = causal_lm()
    model.add_adapter(config(kind))
    perturb(model)
    mask = (torch.arange(9) > 4).expand(2, -1) & INPUTS["attention_mask"].bool()
    assert_same(logits(model, instruction_mask=mask), logits(prompted(kind), instruction_mask=mask), 0)
    model.train()
    with pytest.raises(ValueError, match="cannot tell instruction from response"):
        model(**INPUTS)


@pytest.mark.native
def test_with_lora(kind: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    prompt = prompted(kind)
    prompt.save_pretrained(tmp_path)
    model = causal_lm()
    model.add_adapter(lora, adapter_name="lora")
    only_lora = logits(model)
    model.load_adapter(tmp_path, adapter_name="prompt")
    model.set_adapter("lora")
    assert torch.equal(logits(model), only_lora)
    model.set_adapter("prompt")
    assert torch.equal(logits(model), logits(prompt))
    model.set_adapter(["lora", "prompt"])
    both = logits(model)
    assert min((both - logits(prompt)).abs().max(), (both - only_lora).abs().max()) > 1e-2
    out = model.generate(**INPUTS, **GREEDY, output_logits=True, return_dict_in_generate=True)
    mask = torch.cat([INPUTS["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
    scope = mask.masked_fill(torch.arange(15) >= 9, 0)
    with torch.no_grad():
        forced = model(out.sequences, attention_mask=mask, instruction_mask=scope).logits[:, 8:-1]
    assert_same(torch.stack(out.logits, dim=1), forced)
    with pytest.raises(ValueError, match="different peft types"):
        prompt.add_adapter("lora", lora)
