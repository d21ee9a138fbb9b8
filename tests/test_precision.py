# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0


"""Low precision, quantised and offloaded base models, resized vocabularies, compiled models, exchanged weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from methods import METHODS
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from tiny import VOCAB, adapted, assert_same, batch, causal_lm, perturb
from transformers import AutoModelForCausalLM


INPUTS = batch(9, 6)
LIVE = INPUTS["attention_mask"].bool()
LABELS = INPUTS["input_ids"].where(torch.arange(9) > 5, -100)
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def prompted(kind: str, seed: int = 6, **fields: Any) -> PeftModel:
    return adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", **fields), seed=seed)


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict = INPUTS) -> torch.Tensor:
    return model.eval()(**inputs).logits


def train_step(model: PeftModel) -> float:
    """One step, after which all that is trained has moved and is finite."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(3)
    loss = model.train()(**INPUTS, labels=LABELS).loss
    loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if n in before and not p.equal(before[n])}
    assert moved and all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
    return float(loss)


# --------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kind: str, dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    """The adapter is kept in float32 beside a base model in half precision, unless that is turned off."""
    exact = prompted(kind)
    model = get_peft_model(
        causal_lm().to(dtype), METHODS[kind](task_type="CAUSAL_LM"), autocast_adapter_dtype=autocast_adapter_dtype
    )
    set_peft_model_state_dict(model, get_peft_model_state_dict(exact))
    own = {p.dtype for p in model.parameters() if p.requires_grad}
    assert own == {torch.float32 if autocast_adapter_dtype else dtype}
    found = logits(model)
    assert found.dtype == dtype
    assert_same(found.float()[LIVE], logits(exact)[LIVE], 0.05 if dtype == torch.bfloat16 else 0.005)
    tokens = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(tokens, model.generate(**INPUTS, **GREEDY, use_cache=False)) and tokens.shape == (2, 13)
    assert train_step(model) == pytest.approx(train_step(exact), rel=0.03)


def test_autocast(kind: str) -> None:
    model, exact = prompted(kind), prompted(kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
        assert model.generate(**INPUTS, **GREEDY).shape == (2, 13)
        loss = train_step(model)
    assert found.dtype == torch.bfloat16
    assert_same(found.float()[LIVE], logits(exact)[LIVE], 0.05)
    assert loss == pytest.approx(train_step(exact), rel=0.03)


# ------------------------------------------------------------------------------------------- devices and quantisation


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


# ------------------------------------------------------------------------------------------ weights that are changed


def test_resized_vocabulary(kind: str, tmp_path: Path) -> None:
    model = prompted(kind)
    before = logits(model)
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    assert torch.equal(logits(model)[..., :VOCAB], before)
    new = {**INPUTS, "input_ids": INPUTS["input_ids"].clone()}
    new["input_ids"][0, 2] = VOCAB + 3
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = causal_lm()
    base.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    if getattr(model.active_peft_config, "vocab_size", None) is not None:  # it has a table of its own, by token ids
        with pytest.raises(ValueError, match="has 96 rows, but the text has the token id 99"):
            logits(model, new)
        with pytest.raises(ValueError, match="`vocab_size` 96, but this one has 104"):
            PeftModel.from_pretrained(base, tmp_path)
        return
    assert logits(model, new)[LIVE].isfinite().all()
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path))[..., :VOCAB], before)


def test_hotswap(kind: str, tmp_path: Path) -> None:
    """PEFT's own is for LoRA only and says so; weights put in place do what it does."""
    model, other = prompted(kind), prompted(kind, seed=5)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    where = [p.data_ptr() for p in model.parameters()]
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert [p.data_ptr() for p in model.parameters()] == where
    assert torch.equal(logits(model), logits(other))
    native = causal_lm()
    native.enable_peft_hotswap(target_rank=8)
    native.load_adapter(str(tmp_path), adapter_name="default")
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        native.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)
    assert torch.equal(logits(native), logits(other))


# ---------------------------------------------------------------------------------------------------------- compiled


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def small() -> PeftModel:
    # Of one method: all do their work in the hooks, which are not compiled.
    return adapted(causal_lm(num_hidden_layers=2), METHODS["iapt"](task_type="CAUSAL_LM"))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_forward_and_backward(backend: str, compiler: dict) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    model = small()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for inputs in (INPUTS, batch(11, 4)):  # another length, too
            live = inputs["attention_mask"].bool()
            assert_same(compiled(**inputs).logits[live], logits(model, inputs)[live])
    grads = []
    for call in (model.train(), compiled):
        model.zero_grad()
        call(**INPUTS, labels=LABELS).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        assert_same(grads[1][name], grad, 1e-4)
    # The hooks part the graphs and have none themselves: of those there would be one per case that comes up.
    assert 0 < compiler["stats"]["unique_graphs"] < 25


def test_compiled_generation(compiler: dict) -> None:
    """`generate` with a static cache, whose forward is compiled."""
    model = small()
    expected = model.generate(**INPUTS, **GREEDY)
    base = model.get_base_model()
    plain = base.forward
    base.forward = torch.compile(plain, backend="eager")
    assert torch.equal(model.generate(**INPUTS, **GREEDY, cache_implementation="static"), expected)
    assert compiler["stats"]["unique_graphs"] > 0
    perturb(model, seed=4)  # the compiled model sees weights that are changed in place
    swapped = model.generate(**INPUTS, **GREEDY, cache_implementation="static")
    base.forward = plain
    assert torch.equal(swapped, model.generate(**INPUTS, **GREEDY)) and not torch.equal(swapped, expected)
