# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A folder becomes a generator without a base model around it."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from methods import METHODS
from peft import LoraConfig, get_peft_model

from peft_instance_prompt import DynamicPromptConfig, IAPTConfig, IDPGConfig, LPTConfig, PreFTConfig
from peft_instance_prompt.methods.preft import PreFTGenerator
from peft_instance_prompt.vllm.adapters import describe_base, is_own, read_adapter


@pytest.fixture(scope="module")
def info():
    return describe_base(tiny.configure("llama"))


def save(config, folder, family: str = "llama", seed: int = 0, **changes):
    config.task_type = "CAUSAL_LM"
    model = tiny.adapted(tiny.causal_lm(family, **changes), config, seed=seed)
    model.save_pretrained(folder)
    return model


def test_weights_are_those_that_were_saved(method, info, tmp_path) -> None:
    config = METHODS[method](task_type="CAUSAL_LM")
    if getattr(config, "instance_source", None) == "frozen":
        config.instance_source = "embeddings"
    if hasattr(config, "insertion_layer"):
        config.insertion_layer = 0
    model = save(config, tmp_path)
    adapter = read_adapter(tmp_path, info)
    (kept,) = (m for name, m in model.named_modules() if name.endswith("_generator.default"))
    assert adapter.generator.state_dict().keys() == kept.state_dict().keys()
    for name, tensor in adapter.generator.state_dict().items():
        torch.testing.assert_close(tensor, kept.state_dict()[name], rtol=0, atol=0)
    assert not adapter.generator.training and not any(p.requires_grad for p in adapter.generator.parameters())


def test_key_tells_weights_and_configs_apart(info, tmp_path) -> None:
    adapters = []
    for number, (seed, fields) in enumerate([(0, {}), (0, {}), (1, {}), (0, {"prompt_position": "before"})]):
        save(IAPTConfig(bottleneck_dim=8, **fields), tmp_path / str(number), seed=seed)
        adapters.append(read_adapter(tmp_path / str(number), info))
    keys = [adapter.key for adapter in adapters]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    signatures = [adapter.generator.signature for adapter in adapters]  # which run together
    assert signatures[0] == signatures[2] != signatures[3]


def test_kinds() -> None:
    assert is_own("IAPT") and is_own("PREFT") and not is_own("LORA") and not is_own("NONE") and not is_own(None)


REFUSED = {
    "late slots": (lambda: LPTConfig(bottleneck_dim=8, insertion_layer=2), "shows its slots from layer 2 on"),
    "frozen pass": (
        lambda: IDPGConfig(multi_layer=False, phm_n=4, bottleneck_dim=8),
        "a pass of the base model without prompts.*to_prompt_embeds",
    ),
    "frozen pass between layers": (lambda: IDPGConfig(phm_n=4, bottleneck_dim=8), "instance_source='embeddings'"),
    "given vectors": (
        lambda: IDPGConfig(phm_n=4, bottleneck_dim=8, instance_source="instance_embeds", instance_embeds_dim=8),
        "a vector or task that the caller gives",
    ),
    "tasks": (
        lambda: DynamicPromptConfig(num_tasks=2, position="task", instance_source="embeddings"),
        "a vector or task that the caller gives.*`task_ids`",
    ),
    "another module": (lambda: IAPTConfig(bottleneck_dim=8, modules_to_save=["lm_head"]), "brings modules"),
    "LoRA": (lambda: LoraConfig(target_modules=["q_proj"]), "but LORA"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_refused(what, info, tmp_path) -> None:
    make, words = REFUSED[what]
    config = make()
    config.task_type = "CAUSAL_LM"
    get_peft_model(tiny.causal_lm(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        read_adapter(tmp_path, info)


def test_edits_by_a_vector_of_the_whole_instruction_are_refused(info, tmp_path, monkeypatch) -> None:
    save(PreFTConfig(r=4), tmp_path)
    monkeypatch.setattr(PreFTGenerator, "encode", lambda self, source: source.embeds.mean(dim=1))
    with pytest.raises(ValueError, match="PreFTGenerator edits tokens by a vector of the whole instruction"):
        read_adapter(tmp_path, info)


def test_folders_that_do_not_fit_are_refused(info, tmp_path) -> None:
    good = tmp_path / "good"
    save(IAPTConfig(bottleneck_dim=8), good)
    save(IAPTConfig(bottleneck_dim=8), tmp_path / "wide", hidden_size=48)
    with pytest.raises(ValueError, match="`hidden_size` 48"):
        read_adapter(tmp_path / "wide", info)
    with pytest.raises(ValueError, match="There is no adapter folder"):
        read_adapter(tmp_path / "none", info)
    for change, words in (
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"broken"), "not a readable safetensors"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "no adapter's config"),
        (lambda f: edit(f, bottleneck_dim=4), "of another shape"),
        (lambda f: edit(f, weights_digest="0"), "being rewritten"),
    ):
        shutil.copytree(good, tmp_path / "bad")
        change(tmp_path / "bad")
        with pytest.raises(ValueError, match=words):
            read_adapter(tmp_path / "bad", info)
        shutil.rmtree(tmp_path / "bad")


def edit(folder, **fields) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
