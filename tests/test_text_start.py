# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""`init_text`: a fresh adapter acts as the text before the row does, and what is generated is added to the text's states."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from methods import KINDS, METHODS
from peft import PeftModel, get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, encoder, generator_of, instances, pair, perturb, tokenizer

from peft_instance_prompt import IAPTConfig, IDPGConfig, IPTConfig, LPTConfig
from peft_instance_prompt.generator import INPUT


TEXT = [7, 20, 9]
FREE = [name for name, make in METHODS.items() if make().init_weights != "paper"]


def repeated(length: int) -> list[int]:
    """The text over and over."""
    return [TEXT[k % len(TEXT)] for k in range(length)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [name for name in FREE if not hasattr(METHODS[name](), "insertion_layer")])
@torch.no_grad()
@pytest.mark.slots
def test_fresh_adapter_is_the_text_before_the_row(method: str, family: str) -> None:
    """Layer by layer the slots hold what the base model makes of the text, so the row's logits are those behind it."""
    config = METHODS[method](task_type="CAUSAL_LM", prompt_position="before", init_text=TEXT)
    model = get_peft_model(causal_lm(family), config).eval()
    inputs, l = batch(9, 6), config.num_virtual_tokens
    actual = model(**inputs).logits
    base = model.unload()
    for row, n in enumerate((9, 6)):
        ids = torch.cat([torch.tensor(repeated(l)), inputs["input_ids"][row, -n:]])
        assert_same(actual[row, -n:], base(ids[None]).logits[0, l:])


@torch.no_grad()
def test_late_prompt_holds_the_text_at_its_layer() -> None:
    model = get_peft_model(causal_lm(), LPTConfig(task_type="CAUSAL_LM", init_text=TEXT, insertion_layer=2)).eval()
    base, ids = model.get_base_model(), torch.tensor([repeated(5)])
    with model.disable_adapter():
        states = base.model(ids, output_hidden_states=True).hidden_states[2][0]
    assert_same(generator_of(model).text[0], states)
    captured = []
    handle = base.model.layers[2].register_forward_pre_hook(lambda layer, args: captured.append(args[0]))
    model(batch(6)["input_ids"])
    handle.remove()
    assert_same(captured[0][0, :5], states)


@pytest.mark.parametrize("family", ["bert", "albert", "electra", "modernbert"])
@torch.no_grad()
def test_states_in_an_encoder(family: str) -> None:
    """Also where layers are shared, and where the embeddings are narrower."""
    base = encoder(family)
    ids = torch.tensor([repeated(4)])
    states = base(ids, output_hidden_states=True).hidden_states
    embeds = base.get_input_embeddings()(ids)[0]
    model = get_peft_model(base, METHODS["idpg"](init_text=TEXT))
    generator = generator_of(model)
    assert_same(generator.text_input[0], embeds)
    assert generator.text.shape == (3, 4, 32)
    for row in range(3):
        assert_same(generator.text[row], states[row + 1][0])


@pytest.mark.parametrize(
    "config",
    [
        IAPTConfig(task_type="CAUSAL_LM", bottleneck_dim=8, init_text=TEXT, layers_to_transform=[0, 2]),
        IDPGConfig(task_type="CAUSAL_LM", phm_n=4, dropout=0.0, init_text=TEXT, prompt_position="before"),
        IPTConfig(task_type="CAUSAL_LM", host="deep", table_rank=4, init_text=TEXT),
    ],
)
@torch.no_grad()
def test_what_is_generated_is_added_in_units_of_each_state(config) -> None:
    """`p = s + rms(s) * generated` slot by slot; between the layers of M-IDPG `rms(s) * generated`."""
    base = causal_lm()
    l, d = config.num_virtual_tokens, 32
    hidden = base.model(torch.tensor([repeated(l)]), output_hidden_states=True).hidden_states
    embeds = base.model.embed_tokens(torch.tensor(repeated(l)))
    model = adapted(base, config)
    generator = generator_of(model)
    seen = []
    for depth in generator.depths:
        s = embeds if depth == INPUT else hidden[depth][0]  # (l, d)
        states, vector = torch.randn(2, 5, d), None
        if isinstance(config, IDPGConfig):
            vector = torch.randn(2, d)
        elif isinstance(config, IPTConfig):
            vector = torch.randn(2, l, d)
        made = instances(states, vector=vector)
        weights = generator.weights(depth)
        generated = generator.generate(made, depth, weights).expand(2, -1, -1)
        actual = generator(made, depth)
        for g in range(2):
            for k in range(l):
                rms = sum(float(x) ** 2 for x in s[k]) / d
                part = (rms + 1e-6) ** 0.5 * generated[g, k]
                whole = part if generator.adds and depth != INPUT else s[k] + part
                assert_same(actual[g, k], whole)
        seen.append(depth)
    assert len(seen) > 1


@torch.no_grad()
def test_two_texts_in_one_batch() -> None:
    """Adapters that differ in their text run together, and each row has its own."""
    config = {"task_type": "CAUSAL_LM", "bottleneck_dim": 8}
    model = adapted(causal_lm(), IAPTConfig(**config, init_text=TEXT))
    for name, text in (("b", [30, 31]), ("c", None)):
        model.add_adapter(name, IAPTConfig(**config, init_text=text))
        perturb(model, seed=4, adapter=name)
    model.eval()
    one, two, none = (generator_of(model, name).signature for name in ("default", "b", "c"))
    assert one == two != none
    inputs, names = batch(9, 6, 7, 8), ["b", "default", "c", "b"]
    logits = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        real = inputs["attention_mask"][row].bool()
        model.set_adapter(name)
        assert_same(logits[row][real], model(**alone).logits[0][real])


@pytest.mark.parametrize("method", [name for name in FREE if name in KINDS])
@pytest.mark.slots
def test_saved_adapter_needs_no_text(method: str, tmp_path, monkeypatch) -> None:
    """It is loaded without a pass of the base model and without a tokenizer, and trains no weight more."""
    config = METHODS[method](task_type="CAUSAL_LM", init_text=TEXT)
    model = adapted(causal_lm(), config)
    plain = get_peft_model(causal_lm(), METHODS[method](task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters()[0] == plain.get_nb_trainable_parameters()[0]
    model.save_pretrained(tmp_path)
    inputs = batch(9, 6)
    with torch.no_grad():
        expected = model(**inputs).logits

    def never(*args):
        raise AssertionError("the states were computed again")

    monkeypatch.setattr("peft_instance_prompt.model.states_of_text", never)
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path)
    again = PeftModel.from_pretrained(causal_lm(), tmp_path, low_cpu_mem_usage=True)
    loaded.load_adapter(tmp_path, "second")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
        assert torch.equal(again(**inputs).logits, expected)
        loaded.set_adapter("second")
        assert torch.equal(loaded(**inputs).logits, expected)
    with pytest.raises(
        AssertionError, match="computed again"
    ):  # a config that is used a second time has a start of its own
        get_peft_model(causal_lm(), config)


def test_text_is_turned_into_ids(tmp_path) -> None:
    tokenizer().save_pretrained(tmp_path)
    config = IAPTConfig(task_type="CAUSAL_LM", init_text="w3 w16", tokenizer_name_or_path=str(tmp_path))
    model = get_peft_model(causal_lm(), config)
    assert model.peft_config["default"].init_text == [7, 20] and config.init_text == "w3 w16"
    other = get_peft_model(causal_lm(), IAPTConfig(task_type="CAUSAL_LM", init_text=[7, 20, 7, 20]))
    assert torch.equal(generator_of(model).text, generator_of(other).text)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_is_read_beside_threads_that_generate(family: str) -> None:
    """Adapters are added while others generate: each holds the states of a quiet run, and no other call fails or changes."""
    config = {"task_type": "CAUSAL_LM", "bottleneck_dim": 8}
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def added(model: PeftModel, number: int) -> torch.Tensor:
        model.add_adapter(f"a{number}", IAPTConfig(**config, init_text=[5 + number, 9]))
        return generator_of(model, f"a{number}").text

    quiet, busy = (adapted(causal_lm(family), IAPTConfig(**config)) for _ in range(2))
    expected = [added(quiet, number) for number in range(12)]
    texts = [batch(5 + k, 4, seed=k) for k in range(3)]
    alone = [busy.generate(**text, **how) for text in texts]
    done, started = threading.Event(), threading.Barrier(4)

    def generate(number: int) -> int:
        count = 0
        while not done.is_set():
            assert torch.equal(busy.generate(**texts[number], **how), alone[number])
            if count == 0:
                started.wait()
            count += 1
        return count

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(generate, number) for number in range(3)]
        try:
            started.wait(timeout=60)
            actual = [added(busy, number) for number in range(12)]
        finally:
            done.set()
        counts = [job.result() for job in jobs]
    assert all(count > 1 for count in counts), "nothing ran beside"
    for one, other in zip(actual, expected):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_text": ""}, "`init_text` must be token ids or a text, not empty, or None, got ''"),
        ({"init_text": [1, -2]}, "`init_text` must be token ids"),
        ({"init_text": TEXT, "init_weights": "paper"}, "`init_text` must be None with `init_weights='paper'`, got"),
        ({"init_text": [5, 6, 7, 8, 9]}, r"at most `num_virtual_tokens` 4 tokens, got 5: \[5, 6, 7, 8, 9\]"),
        ({"init_text": [5, 96]}, r"`init_text` must have ids below 96, .*got \[96\]"),
        ({"init_text": "w3"}, "`init_text` is a text, and no tokenizer is known"),
    ],
)
def test_bad_text(fields: dict, message: str) -> None:
    base = causal_lm()
    before = dict(base.named_modules())
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, IAPTConfig(task_type="CAUSAL_LM", **fields))
    assert dict(base.named_modules()) == before


def test_decoder_of_a_pair_and_a_model_without_weights() -> None:
    config = {"task_type": "SEQ_2_SEQ_LM", "init_text": TEXT}
    with pytest.raises(ValueError, match=r"`init_text` must be None in the decoder .*\[7, 20, 9\]"):
        get_peft_model(pair("t5"), IAPTConfig(**config, target_modules=["decoder.block"]))
    assert generator_of(get_peft_model(pair("t5"), IAPTConfig(**config))).text.abs().max() > 0
    with pytest.raises(ValueError, match="`init_text` needs the base model's weights in memory"):
        get_peft_model(causal_lm().to("meta"), IAPTConfig(task_type="CAUSAL_LM", init_text=TEXT))
