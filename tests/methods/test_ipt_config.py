# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""IPT's sizes, pretrained tables, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from tiny import adapted, batch, causal_lm, generator_of
from tiny import encoder as bert

from peft_instance_prompt import IPTConfig
from peft_instance_prompt.engine.stack import describe
from peft_instance_prompt.methods.ipt import IPTGenerator
from peft_instance_prompt.nn.encoders import ENCODERS, Table


INPUTS = batch(9, 4)
d, L, V = 32, 3, 96


def config(**fields) -> IPTConfig:
    return IPTConfig(
        **{"task_type": "CAUSAL_LM", "num_virtual_tokens": 6, "table_rank": 4, "bottleneck_dim": 5, **fields}
    )


def encoder(**fields) -> IPTConfig:
    return config(**{"strategy": "encoder", **fields})


@torch.no_grad()
def logits(model: PeftModel, **kwargs) -> torch.Tensor:
    return model(**INPUTS, **kwargs).logits


@pytest.mark.parametrize(
    "fields", [{"strategy": s, "host": h} for s in ("lookup", "encoder") for h in ("prompt", "deep")]
)
@pytest.mark.parametrize("kind", ENCODERS)
def test_share_of_a_model_of_1b(fields: dict, kind: str) -> None:
    """Llama 3.2 1B: the defaults stay within the 0.5 to 1.5 % that the paper states."""
    sizes = {"vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192}
    with torch.device("meta"):
        base = tf.LlamaForCausalLM(
            tf.LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)
        )
        (info,) = describe(base)
        generator = IPTGenerator(IPTConfig(encoder=kind, **fields), info)
    total = sum(p.numel() for p in base.parameters())
    trained = sum(p.numel() for p in generator.parameters())
    assert abs(total / 1.236e9 - 1) < 0.001
    assert 0.005 < trained / total < 0.015
    table = sum(p.numel() for p in generator.table.parameters())
    assert table == 64 * (128_256 + 2048) and table / trained > 0.8


@pytest.mark.parametrize("scale", [-1e300, 1e5, float("nan")])
def test_scales_that_overflow(scale: float) -> None:
    with pytest.raises(ValueError, match="`instance_scale` must (lie between -10000 and 10000|be finite)"):
        config(host="deep", instance_scale=scale)


def test_full_table_of_a_large_vocabulary_warns() -> None:
    with pytest.warns(UserWarning, match=r"1,600,000 parameters.*50,000.*3,202,048"):
        get_peft_model(causal_lm(vocab_size=50_000), config(table_rank=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(causal_lm(vocab_size=50_000), config())
        get_peft_model(causal_lm(), config(table_rank=None))


@pytest.mark.parametrize("resized", [100, 90])
def test_vocabulary_that_has_changed(resized: int, tmp_path: Path) -> None:
    model = adapted(causal_lm(), config())
    model.save_pretrained(tmp_path)
    base = causal_lm()
    base.resize_token_embeddings(resized, mean_resizing=False)
    with pytest.raises(ValueError, match=rf"`vocab_size` 96.*{resized}"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any("ipt" in name for name, _ in base.named_modules()) and not base._forward_pre_hooks


# ---------------------------------------------------------------------------------------------------- pretrained tables


def pretrained(kind: str | None, rank: int | None) -> dict[str, torch.Tensor]:
    tensors = {f"table.{name}": tensor for name, tensor in Table(V, d, rank).state_dict().items()}
    if kind is not None:
        tensors |= ENCODERS[kind].parameters(d, 5)
    return {name: tensor.detach() + 1 for name, tensor in tensors.items()}


@pytest.mark.parametrize(("kind", "rank", "trainable"), [(None, None, True), ("cnn", 4, True), ("lstm", 4, False)])
def test_pretrained(kind: str | None, rank: int | None, trainable: bool, tmp_path: Path) -> None:
    file = tmp_path / "table.safetensors"
    tensors = pretrained(kind, rank)
    save_file({**tensors, "head.weight": torch.ones(2)}, file)  # what else stands in the file is left alone
    fields = {"init": "pretrained", "init_file": str(file), "table_rank": rank, "trainable": trainable}
    model = get_peft_model(
        causal_lm(), config(**({} if kind is None else {"strategy": "encoder", "encoder": kind}), **fields)
    )
    state = generator_of(model).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    # The adapter does not need the file any more, and does not keep its name.
    adapted(model.unload(), model.peft_config["default"]).save_pretrained(tmp_path / "adapter")
    assert str(tmp_path) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert model.peft_config["default"].init_file == str(file)
    file.unlink()
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path / "adapter")
    assert loaded.peft_config["default"].init == "pretrained"


def test_bad_init_file(tmp_path: Path) -> None:
    base = causal_lm()
    file = tmp_path / "table.safetensors"
    how = {"init": "pretrained", "init_file": str(file)}

    def refused(says: str, **fields) -> None:
        with pytest.raises(ValueError, match=says):
            get_peft_model(base, config(**how, **fields))
        assert not any("ipt" in name for name, _ in base.named_modules())

    refused("`init_file`.*not a readable safetensors file")
    file.write_text(json.dumps({}))
    refused("`init_file`.*not a readable safetensors file")
    save_file(pretrained(None, 8), file)
    refused(r"table.weight \(96, 4\) \(96, 8\), table.up \(4, 32\) \(8, 32\)")
    save_file(pretrained("cnn", 4), file)
    refused(r"encoder_hidden \(1, 32, 5\) None", strategy="encoder", encoder="mlp")


# ------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"strategy": "table"}, ValueError, "`strategy`.*'lookup', 'encoder'.*'table'"),
        ({"encoder": "gru"}, ValueError, "`encoder`.*'cnn', 'mlp', 'lstm'.*'gru'"),
        ({"host": "prefix"}, ValueError, "`host`.*'prefix'"),
        ({"init": "ones"}, ValueError, "`init`.*'zeros', 'random'.*'ones'"),
        ({"init": "zeros", "strategy": "encoder"}, ValueError, "`init='zeros'` needs.*'encoder', True and True"),
        ({"init": "zeros", "trainable": False}, ValueError, "`init='zeros'` needs.*'lookup', False and True"),
        ({"init": "zeros", "init_weights": "paper"}, ValueError, "`init='zeros'` needs.*'lookup', True and 'paper'"),
        ({"init": "pretrained"}, ValueError, "`init_file`.*None with 'pretrained'"),
        ({"init_file": "x"}, ValueError, "`init_file`.*'x' with 'zeros'"),
        ({"table_rank": 0}, ValueError, "`table_rank` must be at least 1, got 0"),
        ({"table_rank": "all"}, TypeError, "`table_rank`.*'all'"),
        ({"table_rank": 4, "init": "embeddings"}, ValueError, "`table_rank` must be None.*got 4"),
        ({"trainable": 2}, ValueError, "`trainable`.*2"),
        ({"max_instance_tokens": 0}, ValueError, "`max_instance_tokens`.*0"),
        ({"dropout": -0.1}, ValueError, "`dropout`.*-0.1"),
        (
            {"init": "embeddings", "trainable": False, "init_weights": "paper"},
            ValueError,
            "`trainable=False` leaves nothing to train",
        ),
        ({"layers_to_transform": [1]}, ValueError, r"`layers_to_transform`.*`host='prompt'`.*\[1\]"),
    ],
)
def test_bad_field(fields: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        IPTConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "init"),
    [
        ({}, "zeros"),
        ({"condition": "constant"}, "zeros"),
        ({"host": "deep", "init_weights": False}, "zeros"),
        ({"strategy": "encoder"}, "random"),
        ({"trainable": False}, "random"),
        ({"init_weights": "paper"}, "random"),
    ],
)
def test_default_of_init(fields: dict, init: str) -> None:
    assert config(**fields).init == init


def test_where_vectors_are_added_to_the_states() -> None:
    def filled_in(base, **fields) -> bool:
        return get_peft_model(base, IPTConfig(host="deep", table_rank=4, **fields)).peft_config["default"].accumulate

    assert filled_in(bert(), task_type="FEATURE_EXTRACTION") is True
    assert filled_in(causal_lm(), task_type="CAUSAL_LM") is False
    assert filled_in(causal_lm(), task_type="CAUSAL_LM", prompt_position="end") is True
    with pytest.raises(ValueError, match="`accumulate` must be False or None with `init_weights='paper'`"):
        config(host="deep", accumulate=True, init_weights="paper")


def test_a_file_without_the_new_fields_is_of_the_old_form(tmp_path: Path) -> None:
    """A table of random vectors behind a gate, and vectors that replace the states in the slots, as up to 0.2.0."""
    model = adapted(causal_lm(), config(init="random", host="deep", accumulate=False, prompt_position="end"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("init", "accumulate")}
    file.write_text(json.dumps({**saved, "format_version": 0}))
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path).eval()
    assert (loaded.peft_config["default"].init, loaded.peft_config["default"].accumulate) == ("random", False)
    assert torch.equal(logits(loaded), logits(model))


def test_embeddings_of_another_width() -> None:
    base = causal_lm("opt")
    with pytest.raises(ValueError, match="`init='embeddings'`.*24 and not 32"):
        get_peft_model(base, config(host="deep", init="embeddings", table_rank="auto"))
    get_peft_model(base, config(init="embeddings", table_rank="auto"))


def test_instance_embeds_are_not_used() -> None:
    model = get_peft_model(causal_lm(), config()).eval()
    with pytest.warns(UserWarning, match="`instance_embeds` are not used"):
        assert torch.equal(logits(model, instance_embeds=torch.ones(2, 3)), logits(model))
