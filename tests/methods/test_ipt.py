# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What is IPT's own: the table, the encoders, both hosts, where they start, sizes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, generator_of
from torch import nn

from peft_instance_prompt import IPTConfig
from peft_instance_prompt.engine.intercept import intercept
from peft_instance_prompt.generator import INPUT, Instances, Source
from peft_instance_prompt.nn.encoders import ENCODERS, Table


INPUTS = batch(9, 4)
LABELS = INPUTS["input_ids"].where(torch.arange(9) > 6, -100)  # instructions of 7 and of 2 tokens
d, L, V = 32, 3, 96


def config(**fields) -> IPTConfig:
    return IPTConfig(
        **{"task_type": "CAUSAL_LM", "num_virtual_tokens": 6, "table_rank": 4, "bottleneck_dim": 5, **fields}
    )


def encoder(**fields) -> IPTConfig:
    return config(**{"strategy": "encoder", **fields})


def rms(x: torch.Tensor) -> torch.Tensor:
    return (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def logits(model: PeftModel, **kwargs) -> torch.Tensor:
    return model(**INPUTS, **kwargs).logits


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize(("init_weights", "init"), [(True, None), (True, "random"), ("paper", None)])
@pytest.mark.parametrize("task_prompt", [False, True])
@torch.no_grad()
def test_lookup_against_the_base_model_with_the_prompt_in_its_input(rank, init_weights, init, task_prompt) -> None:
    """Row by row, with as many prompt vectors as there are instruction tokens, but with all if there is a task prompt."""
    fields = {"table_rank": rank, "init_weights": init_weights, "init": init, "task_prompt": task_prompt}
    model, base = adapted(causal_lm(), config(**fields)), causal_lm()
    generator = generator_of(model)
    table = generator.table.weight if rank is None else generator.table.weight @ generator.table.up  # (V, d)
    actual = model(**INPUTS, labels=LABELS).logits
    for row, start, n in ((0, 0, 6), (1, 5, 2)):
        ids = INPUTS["input_ids"][row, start:]
        found = table[ids[:n]]  # (n, d)
        found = found / rms(found) * generator.gate[0] if init == "random" else found
        prompt = torch.cat([found, torch.zeros(6 - n, d)]) + generator.task[0] if task_prompt else found
        embeds = base.get_input_embeddings()(ids)
        prompt = prompt if init_weights == "paper" else embeds[0] + rms(embeds[0]) * prompt
        expected = base(inputs_embeds=torch.cat([prompt, embeds])[None]).logits[0, len(prompt) :]
        assert_same(actual[row, start:], expected)


@pytest.mark.parametrize("kind", ["cnn", "mlp", "lstm"])
@pytest.mark.parametrize("read", [1, 2, 4])
@torch.no_grad()
def test_an_encoder_that_reads_few_tokens(kind: str, read: int) -> None:
    """What stands behind the tokens that are read counts for nothing: the prompt is that of the short text."""
    model = adapted(causal_lm(), encoder(encoder=kind, max_instance_tokens=read))
    generator = generator_of(model)
    long, short = batch(9)["input_ids"], batch(9)["input_ids"][:, :read]
    made = []
    for ids in (long, short):
        embeds, mask = model.get_input_embeddings()(ids), torch.ones_like(ids, dtype=torch.bool)
        vector = generator.encode(Source(ids, embeds, mask, None, lambda: embeds))
        made.append(generator(Instances(embeds, mask, embeds[:, :1], vector), INPUT))
    assert_same(made[0], made[1])


def test_random_table_is_uniform() -> None:
    weight = Table(1000, 50).weight
    assert weight.min() >= -0.5 and weight.max() <= 0.5
    assert abs(float(weight.std()) - 12**-0.5) < 0.005 and abs(float(weight.mean())) < 0.005
    low = Table(1000, 50, rank=8)
    assert abs(float((low.weight @ low.up).std()) - 12**-0.5) < 0.05


@pytest.mark.parametrize("rank", [4, None])
def test_token_that_training_never_met(rank: int | None) -> None:
    """Its slot holds what a fresh adapter's does, a copy of the first token; those of other tokens have moved."""
    model = get_peft_model(causal_lm(), config(table_rank=rank, num_virtual_tokens=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    met, new = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8, 7]])
    for _ in range(3):
        model(met, labels=torch.tensor([[-100, -100, 7]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with intercept(lambda made: seen.append(made.values[0])):
        seen: list[torch.Tensor] = []
        model.eval()(new)
    first = model.get_input_embeddings()(new)[0, 0]
    assert torch.equal(seen[-1][1], first) and not torch.allclose(seen[-1][0], first, atol=0.01)


@pytest.mark.parametrize("rank", [4, None])
def test_frozen_table(rank: int | None, tmp_path: Path) -> None:
    """It gets no gradient, counts as not trained, and is saved all the same."""
    model = adapted(causal_lm(), encoder(trainable=False, table_rank=rank))
    generator = generator_of(model)
    assert not any(name.startswith("table") for name, _ in generator.named_parameters())
    with torch.no_grad():
        for buffer in generator.table.buffers():
            buffer.add_(torch.randn(buffer.shape))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path, adapter_name="other").eval()
    assert torch.equal(logits(loaded), expected)
    # In a mixed batch each row has the table of its own adapter.
    loaded.add_adapter("fresh", encoder(trainable=False, table_rank=rank, init_weights=False))
    loaded.set_adapter("fresh")
    fresh = logits(loaded)
    mixed = logits(loaded, adapter_names=["other", "fresh"])
    assert_same(mixed[0], expected[0])
    assert_same(mixed[1, 5:], fresh[1, 5:])


@pytest.mark.parametrize("fields", [{}, {"strategy": "encoder", "host": "deep"}])
def test_mixed_batch_copies_no_table(fields: dict) -> None:
    """What is stacked over the rows of a mixed batch is everything but the table."""
    generator = generator_of(get_peft_model(causal_lm(), config(**fields)))
    stacked = {name for depth in generator.depths for name in generator.index_at(depth)}
    assert stacked == {name for name, _ in generator.named_parameters() if not name.startswith("table.")}


def test_table_of_the_models_embeddings() -> None:
    base = causal_lm()
    embeddings = base.get_input_embeddings().weight.detach().clone()
    model = get_peft_model(base, config(table_rank="auto", init="embeddings"))
    weight = generator_of(model).table.weight
    assert torch.equal(weight, embeddings) and weight.requires_grad
    assert weight.data_ptr() != base.get_input_embeddings().weight.data_ptr()


def test_the_models_embeddings_themselves() -> None:
    """Not trained, they are read and not copied, and need no token ids."""
    fields = {"table_rank": "auto", "init": "embeddings"}
    model = get_peft_model(causal_lm(), encoder(trainable=False, **fields))
    assert generator_of(model).table is None
    copied = get_peft_model(causal_lm(), encoder(**fields))
    state = {n: torch.randn(p.shape) for n, p in generator_of(model).named_parameters()}
    for one in (model, copied):
        generator_of(one).load_state_dict(state, strict=False)
    assert_same(logits(model.eval()), logits(copied.eval()))
    embeds = model.get_input_embeddings()(INPUTS["input_ids"])
    embeds, seen = embeds.detach().requires_grad_(), []
    with intercept(lambda made: seen.append(made.values)):
        with_embeds = model(inputs_embeds=embeds, attention_mask=INPUTS["attention_mask"]).logits
    assert_same(with_embeds, logits(model))
    assert not seen[0].requires_grad


@pytest.mark.parametrize("host", ["prompt", "deep"])
def test_embeddings_without_ids(host: str) -> None:
    model = get_peft_model(causal_lm(), config(host=host)).eval()
    embeds = model.get_input_embeddings()(INPUTS["input_ids"])
    with pytest.raises(ValueError, match="looks the prompt up by token ids.*`inputs_embeds`"):
        model(inputs_embeds=embeds, attention_mask=INPUTS["attention_mask"])
    assert model(**INPUTS).logits.isfinite().all()


# -------------------------------------------------------------------------------------------------------- the encoders


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_encoder_on_each_row_alone(kind: str) -> None:
    """Against torch's own modules on the row's tokens without padding; rows of one token and of none among them."""
    torch.manual_seed(3)
    network, x = ENCODERS[kind], torch.randn(5, 7, d)
    weights = {name.removeprefix("encoder_"): p[0] for name, p in network.parameters(d, 5).items()}
    counts = torch.tensor([7, 4, 2, 1, 0])

    def run(x: torch.Tensor) -> torch.Tensor:
        return network.run(x, counts, {f"encoder_{name}": weight for name, weight in weights.items()})[:, 0]  # (G, f)

    actual = run(x)
    assert actual.shape == (5, network.features_per_unit * 5) and actual.isfinite().all()
    for row, n in enumerate(counts[:-1]):
        one = x[row : row + 1, :n]
        if kind == "cnn":
            tokens = nn.functional.pad(one.mT, (0, max(5 - int(n), 0)))  # (1, d, n), at least one window
            maxima = []
            for size in (3, 4, 5):
                kernel = weights[f"kernel_{size}"].view(size, d, 5).permute(2, 1, 0)  # (m, d, size)
                bias = weights[f"bias_{size}"][0]
                windows = nn.functional.conv1d(tokens[..., : max(int(n), size)], kernel, bias)  # (1, m, windows)
                maxima.append(windows.amax(dim=-1)[0])
            expected = torch.cat(maxima).relu()
        elif kind == "mlp":
            expected = (one[0].mean(dim=0) @ weights["hidden"] + weights["bias"][0]).relu()
        else:
            lstm = nn.LSTM(d, 5, num_layers=2, bidirectional=True, batch_first=True)
            for layer in range(2):
                for way, suffix in enumerate(("", "_reverse")):
                    own = {"weight_ih": weights[f"input_{layer}"][way].T, "weight_hh": weights["hidden"][layer, way].T}
                    own["bias_ih"] = weights["bias_input"][layer, way, 0]
                    own["bias_hh"] = weights["bias_hidden"][layer, way, 0]
                    for name, weight in own.items():
                        getattr(lstm, f"{name}_l{layer}{suffix}").copy_(weight)
            last = lstm(one)[1][0]  # (layers * directions, 1, 5)
            expected = torch.cat([last[-2, 0], last[-1, 0]])
        assert_same(actual[row], expected)
    # What stands behind a row's tokens does not matter.
    noise = torch.where(torch.arange(7) < counts[:, None], 0.0, 100.0)[..., None]
    assert_same(run(x + noise), actual)


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_the_encoder_reads(kind: str) -> None:
    """The first `max_instance_tokens` of the instruction and nothing else."""
    model = adapted(causal_lm(), encoder(encoder=kind, max_instance_tokens=5))
    seen: list[torch.Tensor] = []
    for changed in (None, 0, 4, 5, 7):
        ids = INPUTS["input_ids"].clone()
        if changed is not None:
            ids[0, changed] = 95
        with torch.no_grad(), intercept(lambda made: seen.append(made.values) if made.depth == -1 else None):
            model(input_ids=ids, attention_mask=INPUTS["attention_mask"], labels=LABELS)
    seen = [prompt[0, 1:] - prompt[0, :1] for prompt in seen]  # the first token is also what they are anchored at
    assert [torch.equal(prompt, seen[0]) for prompt in seen] == [True, False, False, True, True]


@pytest.mark.parametrize("kind", ENCODERS)
def test_dropout_in_training_only(kind: str) -> None:
    model = adapted(causal_lm(), encoder(encoder=kind, dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model, labels=LABELS), logits(model, labels=LABELS))


# ----------------------------------------------------------------------------------------------------------- deep host


@pytest.mark.parametrize(("init_weights", "init"), [(True, None), (True, "random"), ("paper", None)])
@pytest.mark.parametrize("layers", [None, [1, 2]])
@pytest.mark.parametrize("accumulate", [None, True])
@torch.no_grad()
def test_deep_host(init_weights, init, layers: list[int] | None, accumulate: bool | None) -> None:
    """A task prompt at every layer, and 0.05 times the instance's part added to the first, written by hooks."""
    accumulate = None if init_weights == "paper" else accumulate
    fields = {"init_weights": init_weights, "init": init, "layers_to_transform": layers, "accumulate": accumulate}
    model = adapted(causal_lm(), config(host="deep", **fields))
    generator, base, ids = generator_of(model), causal_lm(), INPUTS["input_ids"][:1]
    found = generator.table(ids[0, :6])  # (6, d)
    found = found / rms(found) * generator.gate[0] if init == "random" else found

    def write(number: int):
        def hook(layer, args):
            states = args[0].clone()  # (1, 6 + S, d)
            at = layers.index(number) if layers else number
            prompt = generator.task[at] + (0.05 * found if at == 0 else 0.0)
            stays = states[0, :6] if accumulate and at > 0 else states[0, 6]
            states[0, :6] = prompt if init_weights == "paper" else stays + rms(states[0, 6]) * prompt
            return (states, *args[1:])

        return hook

    for number in layers or range(L):
        base.model.layers[number].register_forward_pre_hook(write(number))
    embeds = base.get_input_embeddings()(ids)
    # What is not written to begins as a copy of the first token.
    expected = base(inputs_embeds=torch.cat([embeds[:, :1].expand(-1, 6, -1), embeds], dim=1)).logits[:, 6:]
    assert_same(model(ids).logits, expected)


def test_deep_host_without_task_prompt() -> None:
    model = get_peft_model(causal_lm(), config(host="deep", task_prompt=False))
    assert generator_of(model).depths == (0,)
    assert {name for name, _ in generator_of(model).named_parameters()} == {"table.weight", "table.up"}


@pytest.mark.parametrize("fields", [{}, {"strategy": "encoder"}, {"host": "deep"}])
def test_constant_condition(fields: dict) -> None:
    """All instances get one prompt, made by the same generator from a learned constant; there is no table."""
    model, seen = adapted(causal_lm(), config(condition="constant", init_weights="paper", **fields)), []
    with intercept(lambda made: seen.append(made.values)):
        model(**INPUTS, labels=LABELS).loss.backward()
    for made in seen:
        assert_same(made[0], made[1])
    generator = generator_of(model)
    assert generator.table is None and generator.constant.grad.any()


# ----------------------------------------------------------------------------------------------------- a trained model


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"strategy": "encoder"}, {"host": "deep"}])
@torch.no_grad()
def test_fresh_adapter_does_not_hurt_a_trained_model(fields: dict) -> None:
    from smollm2 import load_smollm2
    from vader import sentiment_splits

    model, tokenizer = load_smollm2()
    texts = [f"Review: {example['text']}" for example in sentiment_splits("movie", n_test=8)[1]]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)
    before = model(**inputs, labels=labels).loss
    model = get_peft_model(model, IPTConfig(task_type="CAUSAL_LM", **fields)).eval()
    after = model(**inputs, labels=labels, instruction_mask=inputs["attention_mask"]).loss
    assert abs(after - before) < 0.02 * before
