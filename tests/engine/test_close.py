# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The outputs of a stack, without the rows of slots: of a mixture of experts, of poolers, of an encoder for its decoder."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import tiny
import torch
import transformers as tf
from methods import METHODS
from tiny import VOCAB, adapted, assert_same, batch, causal_lm, pair


SIZES = tiny._llama
MIXTURES: dict[str, Callable] = {
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SIZES, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    "olmoe": lambda: tf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "phimoe": lambda: tf.PhimoeConfig(**SIZES, num_local_experts=4),
    "granitemoe": lambda: tf.GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: tf.GptOssConfig(
        **SIZES,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "dbrx": lambda: tf.DbrxConfig(
        vocab_size=VOCAB,
        d_model=32,
        n_heads=4,
        n_layers=3,
        max_seq_len=128,
        ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    ),
    "jamba": lambda: tf.JambaConfig(
        **SIZES,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_d_conv=2,
        use_mamba_kernels=False,
    ),
}
PAIR_MIXTURES: dict[str, Callable] = {
    "switch": lambda: tf.SwitchTransformersConfig(
        **{**tiny._t5, "num_layers": 4, "num_decoder_layers": 4},
        num_experts=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        expert_capacity=64,
    ),
    "nllb_moe": lambda: tf.NllbMoeConfig(
        **tiny._bart, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, expert_capacity=64
    ),
}


def mixture(family: str) -> torch.nn.Module:
    config = MIXTURES[family]()
    for name, value in tiny._special.items():
        setattr(config, name, value)
    return tiny._random(tf.AutoModelForCausalLM, config, seed=0)


def balance(routers: list[torch.Tensor], top_k: int) -> float:
    """The loss that balances experts (Switch Transformer, eq. 4 to 6), over the rows (tokens, experts) of all layers."""
    rows = torch.cat(routers).softmax(dim=-1)  # (layers * tokens, experts)
    counts = torch.zeros(rows.shape[1])
    for row in rows:
        for expert in row.sort(descending=True).indices[:top_k].tolist():
            counts[expert] += 1
    return float((counts / len(rows) * rows.mean(dim=0)).sum() * rows.shape[1])


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", MIXTURES)
def test_mixture_of_experts_is_balanced_over_the_tokens(family: str, padded: bool) -> None:
    """Slots and padding count for nothing in the loss, and the router logits are the tokens' own."""
    base = mixture(family)
    model = adapted(base, METHODS["iapt_after_first"](task_type="CAUSAL_LM", num_virtual_tokens=4))
    lengths = (7, 4) if padded else (7, 7)
    inputs = batch(*lengths)
    labels = torch.where(torch.arange(7) < 5, -100, inputs["input_ids"])  # (2, 7)
    if not padded:
        del inputs["attention_mask"]
    seen: list[torch.Tensor] = []
    routers = {m for n, m in base.named_modules() if n.rsplit(".", 1)[-1] in ("gate", "router")}
    hooks = [
        # Most give a tuple with the logits first.
        m.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for m in routers
    ]
    out = model(**inputs, labels=labels, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    # The four slots stand behind the first of a row's tokens.
    columns = [[c for c in range(11) if not 7 - n < c <= 7 - n + 4] for n in lengths]
    own, tokens = [], []
    if any(logits.numel() != 2 * 11 * 4 for logits in seen):
        pytest.skip("this release's router does not return its logits first")
    for logits in seen:
        logits = logits.reshape(2, 11, 4)
        own.append(torch.stack([logits[row, columns[row]] for row in range(2)]))  # (2, 7, experts)
        tokens += [own[-1][row, 7 - n :] for row, n in enumerate(lengths)]
    assert len(out.router_logits) == len(own) > 0
    for actual, expected in zip(out.router_logits, own):
        assert_same(actual, expected.flatten(0, 1))
    top_k = getattr(base.config, "num_experts_per_tok", 2)
    assert abs(out.aux_loss.item() - balance([part.detach() for part in tokens], top_k)) < 1e-5
    scored = torch.nn.functional.cross_entropy(out.logits[:, 4:-1].flatten(0, 1), labels[:, 5:].flatten())
    assert_same(out.loss, scored + base.router_aux_loss_coef * out.aux_loss)
    base.config.output_router_logits = True  # as trainers ask for it
    again = model.train()(**inputs, labels=labels)
    again.loss.backward()
    assert again.aux_loss is not None and any(p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", PAIR_MIXTURES)
def test_encoder_of_a_mixture_of_experts(family: str) -> None:
    """Switch counts its encoder's outputs from the end, where it must find its router logits and nothing of ours."""
    base = tiny._random(tf.AutoModelForSeq2SeqLM, PAIR_MIXTURES[family](), seed=0)
    bare = copy.deepcopy(base)
    inputs, labels = batch(7, 4, side="right"), batch(5, 5, seed=3)["input_ids"]
    shapes = {}
    model = adapted(base, METHODS["iapt"](task_type="SEQ_2_SEQ_LM"))
    for name, one in (("bare", bare), ("ours", model)):
        out = one(**inputs, labels=labels, output_router_logits=True)
        shapes[name] = [[x.shape for x in out[f"{side}_router_logits"]] for side in ("encoder", "decoder")]
        assert out.loss.isfinite()
    assert shapes["bare"] == shapes["ours"] and all(shapes["bare"])


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_slots_of_an_encoder_stand_in_no_tuple(family: str) -> None:
    base = pair(family)
    bare = copy.deepcopy(base).get_encoder()
    model = adapted(base, METHODS["iapt"](task_type="SEQ_2_SEQ_LM"))
    inputs = batch(7, 5, side="right")
    for how in ({}, {"output_hidden_states": True}):
        plain, ours = bare(**inputs, **how), base.get_encoder()(**inputs, **how)
        assert isinstance(ours, type(plain)) and len(ours) == len(plain) == len(ours.to_tuple())
        assert type(ours[-1]) is type(plain[-1]) and len(ours[-1]) == len(plain[-1])
        assert len(base.get_encoder()(**inputs, **how, return_dict=False)) == len(plain)
        ids = torch.tensor([[1, 5, 6]] * 2)
        expected = model(**inputs, decoder_input_ids=ids).logits
        for same in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
            assert list(same) == list(ours)
            given = {"encoder_outputs": same, "attention_mask": inputs["attention_mask"]}
            assert torch.equal(model(**given, decoder_input_ids=ids).logits, expected)


def test_outputs_per_position_that_nobody_knows_are_refused(monkeypatch) -> None:
    base = causal_lm()
    model = adapted(base, METHODS["iapt"](task_type="CAUSAL_LM"))
    forward = type(base.model).forward
    for shape in ((2, 11), (2, 3, 11), (22, 5), (11, 2, 4)):  # 7 tokens and 4 slots in each of two rows

        def more(self, *args, shape=shape, **kwargs):
            output = forward(self, *args, **kwargs)
            output["indexer"] = (torch.zeros(shape),)
            return output

        monkeypatch.setattr(type(base.model), "forward", more)
        with pytest.raises(ValueError, match=r"out of the output `indexer` \(.*for each of 11 positions"):
            model(**batch(7, 5))
        with model.disable_adapter():
            model(**batch(7, 5))
        assert model(**batch(9, 5)).logits.shape == (2, 9, VOCAB)  # there it has no row per position


@torch.no_grad()
@pytest.mark.parametrize("indices", [1, [0, -1], [3]])
def test_hidden_states_that_are_asked_for_by_number(indices) -> None:
    """Those that nobody asked for are None, as in the bare model."""
    if (bare := causal_lm()(**batch(7, 5), output_hidden_states=indices).hidden_states) is None or len(bare) != 4:
        pytest.skip("this release of transformers takes no numbers of layers")
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM"))
    whole = model(**batch(7, 5), output_hidden_states=True).hidden_states
    some = model(**batch(7, 5), output_hidden_states=indices).hidden_states
    assert len(some) == len(whole) == 4 and any(states is not None for states in some)
    for one, other in zip(some, whole):
        assert one is None or torch.equal(one, other)


@torch.no_grad()
def test_pooler_that_is_a_linear_layer() -> None:
    """What stands before and behind it is found out by what it made of the states with slots; else it is refused."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.BigBirdConfig(
        **sizes, intermediate_size=48, max_position_embeddings=64, attention_type="original_full"
    )
    base = tiny._random(tf.AutoModel, config, seed=0)
    model = adapted(base, METHODS["iapt"](prompt_position="before"))
    inputs = batch(7, 5, side="right")
    out = model(**inputs)
    assert_same(out.pooler_output, base.pooler(out.last_hidden_state[:, 0]).tanh())
    base.activation = torch.nn.Sequential(base.pooler, torch.nn.Tanh())  # one that has parameters of its own
    with pytest.raises(ValueError, match="taken out of `pooler_output`: how BigBirdModel makes it with its `pooler`"):
        model(**inputs)
    base.activation = torch.nn.Identity()
    assert_same(model(**inputs).pooler_output, base.pooler(out.last_hidden_state[:, 0]))
