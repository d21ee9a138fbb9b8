# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Base models that are quantised, or lie on disk in part or as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llama_calls import GREEDY, INPUTS, LIVE, logits, train_step
from methods import METHODS
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from tiny import adapted, causal_lm
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny base model on disk. Its layers are 64 wide, since 4-bit weights come in blocks of 64."""
    folder = tmp_path_factory.mktemp("base")
    causal_lm(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(folder)
    return str(folder)


def saved(kind: str, checkpoint: str, folder: Path, **fields: Any) -> PeftModel:
    """An adapter for the base model on disk, saved to `folder`."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = adapted(base, METHODS[kind](task_type="CAUSAL_LM", **fields))
    model.save_pretrained(folder)
    return model


def test_device_map_with_one_device(kind: str, checkpoint: str, tmp_path: Path) -> None:
    expected = saved(kind, checkpoint, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, device_map={"": "cpu"})
    model = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(model.generate(**INPUTS, **GREEDY), expected.generate(**INPUTS, **GREEDY))


PLACES = {
    "some": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"},
    "most": {"model.rotary_emb": "cpu", "lm_head": "cpu"},
}
PARTS = ["model.embed_tokens", *(f"model.layers.{n}" for n in range(3)), "model.norm", "model.rotary_emb", "lm_head"]


@pytest.mark.parametrize(
    "offloaded,how", [("some", "from_pretrained"), ("most", "get_peft_model"), ("most", "native")]
)
def test_layers_on_disk(
    kind: str, offloaded: str, how: str, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT copies offloaded weights to below the working directory
    expected = saved(kind, checkpoint, tmp_path / "adapter")
    places = {part: PLACES[offloaded].get(part, "disk") for part in PARTS}
    base = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=places, offload_folder=tmp_path / "a")
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    if how == "native":
        base.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(logits(base), logits(expected))
        return
    if how == "from_pretrained":
        # PEFT spreads the model anew when it loads an adapter, and has to be told where to; so it is with LoRA.
        own = f"model.{METHODS[kind]().peft_type.lower()}"
        wrapped = {f"base_model.model.{part}": place for part, place in {**places, own: "cpu"}.items()}
        model = PeftModel.from_pretrained(
            base, tmp_path / "adapter", device_map=wrapped, offload_folder=str(tmp_path / "b")
        )
    else:
        model = get_peft_model(base, METHODS[kind](task_type="CAUSAL_LM"))
        set_peft_model_state_dict(model, get_peft_model_state_dict(expected))
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(model.generate(**INPUTS, **GREEDY), expected.generate(**INPUTS, **GREEDY))


def write_gguf(base: torch.nn.Module, file: Path) -> None:
    """A Llama in llama.cpp's format, of which 8 bits are kept."""
    gguf = pytest.importorskip("gguf")
    config, writer, kind = base.config, gguf.GGUFWriter(file, "llama"), gguf.GGMLQuantizationType.Q8_0
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in base.state_dict().items():
        module = name.removesuffix(".weight")
        if head := heads.get(module.rpartition(".")[2]):  # the format's order of a head's rows for rotary positions
            weight = weight.unflatten(0, (head, 2, -1)).transpose(1, 2).flatten(0, 2)
        weight, name = weight.numpy(), known.get_name(module) + ".weight"
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised(name: str, checkpoint: str) -> torch.nn.Module:
    if name == "gguf":
        write_gguf(AutoModelForCausalLM.from_pretrained(checkpoint), Path(checkpoint, "base.gguf"))
        return AutoModelForCausalLM.from_pretrained(checkpoint, gguf_file="base.gguf", dtype=torch.float32)
    if name == "torchao_int8":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_8bit=True)
        if name == "bitsandbytes_4bit":
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gguf", "torchao_int8", "bitsandbytes_8bit", "bitsandbytes_4bit"])
def test_quantised_base(kind: str, name: str, checkpoint: str, tmp_path: Path) -> None:
    exact = saved(kind, checkpoint, tmp_path)
    # Trained before anything is evaluated: bitsandbytes repacks 4-bit weights on a CPU at the first evaluation, and through
    # those no gradient passes any more, whatever the adapter is.
    model = PeftModel.from_pretrained(quantised(name, checkpoint), tmp_path, is_trainable=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train_step(model)
    train_step(
        get_peft_model(
            prepare_model_for_kbit_training(quantised(name, checkpoint)), METHODS[kind](task_type="CAUSAL_LM")
        )
    )

    model = PeftModel.from_pretrained(quantised(name, checkpoint), tmp_path).eval()
    found = logits(model)
    with model.disable_adapter():
        effect = float((found - logits(model))[LIVE].abs().mean())
    # The same base model with what is left of its weights, in float: they are what a layer makes of the unit vectors.
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)
    with torch.no_grad():
        for part, layer in expected.get_base_model().named_modules():
            other = model.get_base_model().get_submodule(part)
            if isinstance(layer, torch.nn.Embedding):
                layer.weight.copy_(other.weight)
            elif isinstance(layer, torch.nn.Linear) and "generator" not in part:
                weight = other(torch.eye(layer.in_features)).T
                assert part == "lm_head" or not weight.equal(layer.weight), "the base model is not quantised"
                layer.weight.copy_(weight)
    error = float((found - logits(expected))[LIVE].abs().mean())
    # bitsandbytes rounds what goes into a layer, too
    assert error < (0.3 * effect if name.startswith("bitsandbytes") else 1e-4 * effect)
    assert model.generate(**INPUTS, **GREEDY).shape == (2, 13)
