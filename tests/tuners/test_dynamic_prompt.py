# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Dynamic prompting against references written here."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, encoder

from peft_instance_prompt import DynamicPromptConfig, record_choices
from peft_instance_prompt.tuners.dynamic_prompt import DynamicPromptGenerator
from peft_instance_prompt.tuners.dynamic_prompt.config import PRESETS


L = 4  # prompt vectors
ORDERS = ("paper", "dpt")


def dynamic(family: str = "llama", seed: int = 0, base=None, **fields) -> PeftModel:
    base = causal_lm(family) if base is None else base
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": L, "num_pool": 3, **fields}
    return adapted(base, DynamicPromptConfig(**fields), seed=seed)


def generator_of(model: PeftModel, adapter: str = "default") -> DynamicPromptGenerator:
    wanted = (m for name, m in model.named_modules() if name.endswith("." + adapter))
    (found,) = (module for module in wanted if isinstance(module, DynamicPromptGenerator))
    return found


def choose(model: PeftModel, **numbers: int) -> PeftModel:
    """Make the choices per task fall on these numbers."""
    for name, number in numbers.items():
        with torch.no_grad():
            generator_of(model).logits[name].zero_()[number] = 9.0
    return model


def prompts_of(model: PeftModel) -> torch.Tensor:
    """The prompts (k, l, e) of the pool, a view."""
    return generator_of(model).prompts.detach().view(-1, generator_of(model).num_slots, 32)


def labels_for(ids: torch.Tensor, start: int) -> torch.Tensor:
    return ids.masked_fill(torch.arange(ids.shape[1]) < start, -100)


def arrangement(prompt: torch.Tensor, embeds: torch.Tensor, start: int, end: int, j: int, order: str) -> torch.Tensor:
    """C_j: (S + l, e) of prompt (l, e) and embeds (S, e)."""
    front, back = (prompt[: L - j], prompt[L - j :]) if order == "paper" else (prompt[j:], prompt[:j])
    return torch.cat([embeds[:start], front, embeds[start:end], back, embeds[end:]])


# --------------------------------------------------------------------------------------------------- config and sizes


def test_parameter_counts_of_the_paper() -> None:
    expected = {"adap_pos": 21, "adap_ins_pos": 21_525, "adap_length": 21, "adap_ins_length": 21_525}
    expected["adap_ins_vec"] = 3 * 20 * 1024 + 4 * 1025  # a pool of 4 prompts and its head, beyond the one prompt
    expected["adap_ins_vec_pos"] = expected["adap_ins_vec"] + 21_525
    assert expected.keys() == PRESETS.keys()
    for name, count in expected.items():
        with torch.device("meta"):
            bert = tf.BertModel(
                tf.BertConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=1, vocab_size=8)
            )
            model = get_peft_model(bert, DynamicPromptConfig.preset(name))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20 * 1024 + count, name


def test_preset_overrides() -> None:
    config = DynamicPromptConfig.preset("adap_pos", length="instance", num_virtual_tokens=3)
    assert (config.position, config.length, config.representation, config.num_virtual_tokens) == (
        "task",
        "instance",
        "off",
        3,
    )
    with pytest.raises(ValueError, match="no preset 'adap'.*adap_ins_vec_pos"):
        DynamicPromptConfig.preset("adap")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "row"}, "`position` must be one of .*'row'"),
        ({"length": True}, "`length` must be one of .*True"),
        ({"representation": "task"}, "`representation` must be one of .*'task'"),
        ({"order": "reverse"}, "`order` must be one of .*'reverse'"),
        ({"num_pool": 0}, "`num_pool` must be at least 1, got 0"),
        ({"anneal_steps": 0}, "`anneal_steps` must be at least 1, got 0"),
        ({"temperature": 0}, "`temperature` must be above 0, got 0"),
        ({"min_temperature": -1.0}, "`min_temperature` must be above 0, got -1"),
        ({"temperature": math.inf}, "`temperature` must be finite, got inf"),
        ({"instance_source": "cls"}, "`instance_source` must be one of .*'cls'"),
        ({"instance_embeds_dim": 3}, "`instance_embeds_dim` must be .* None otherwise, got 3 with 'frozen'"),
        ({"prompt_position": "end"}, "`prompt_position` must be one of .*'end'"),
        ({"layers_to_transform": 0}, "`layers_to_transform` must be None.* got 0"),
        ({"sample_at_eval": 1}, "`sample_at_eval` must be one of .* got 1"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicPromptConfig(**fields)


def test_a_prompt_that_does_not_fit_the_positions() -> None:
    model = dynamic("gpt2", base=causal_lm("gpt2", n_positions=12))
    with pytest.raises(ValueError, match="the model has 12 positions, and 9 tokens with 4 prompt slots need 13"):
        model(batch(9)["input_ids"])


# ------------------------------------------------------------------------------------------------------- arrangement


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prompt_position", ["before", "after_first"])
def test_arrangement_in_a_causal_model(order: str, prompt_position: str) -> None:
    """Between instruction and response; the first response token is predicted at the last vector behind."""
    ids, n = batch(9)["input_ids"], 6
    start = int(prompt_position == "after_first")
    for j in range(L + 1):
        model = dynamic(position="task", init_weights="paper", order=order, prompt_position=prompt_position)
        choose(model, position=j)
        with torch.no_grad():
            actual = model(ids, instruction_mask=torch.arange(9)[None] < n).logits[0]
            base = model.get_base_model()
            prompt = prompts_of(model)[0]
            with model.disable_adapter():
                rows = arrangement(prompt, base.model.embed_tokens(ids)[0], start, n, j, order)
                logits = base(inputs_embeds=rows[None]).logits[0]
        places = [t + (L - j) * (t >= start) + j * (t >= n) for t in range(9)]
        places[n - 1] += j
        assert_same(actual, logits[places])


@pytest.mark.parametrize("order", ORDERS)
def test_arrangement_in_an_encoder(order: str) -> None:
    """Before the end token, beside padding on either side."""
    for j in (1, L):
        model = dynamic(base=encoder("bert"), task_type=None, position="task", init_weights="paper", order=order)
        choose(model, position=j)
        base = model.get_base_model()
        for side in ("left", "right"):
            inputs = batch(9, 6, side=side)
            with torch.no_grad():
                actual = model(**inputs).last_hidden_state
                for row, n in enumerate((9, 6)):
                    ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
                    embeds = base.get_input_embeddings()(ids)
                    rows = arrangement(prompts_of(model)[0], embeds, 1, n - 1, j, order)
                    with model.disable_adapter():
                        states = base(inputs_embeds=rows[None]).last_hidden_state[0]
                    places = [t + (L - j) * (t >= 1) + j * (t >= n - 1) for t in range(n)]
                    assert_same(actual[row][inputs["attention_mask"][row].bool()], states[places])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mpt"])
def test_unused_vectors_are_not_there(family: str) -> None:
    """A prompt of length i is the prompt of its first i vectors alone, whatever the others hold."""
    inputs = batch(9, 6)
    for i in (0, 1, 3):
        model = choose(dynamic(family, position="off", length="task"), length=i)
        with torch.no_grad():
            prompts_of(model)[:, i:] = 1e4
            actual = model(**inputs)
            if i == 0:
                with model.disable_adapter():
                    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                    expected = model(**inputs, **({"position_ids": positions} if family in ("llama", "gpt2") else {}))
            else:
                shorter = dynamic(family, position="off", num_virtual_tokens=i)
                prompts_of(shorter).copy_(prompts_of(model)[:, :i])
                expected = shorter(**inputs)
        real = inputs["attention_mask"].bool()
        assert_same(actual.logits[real], expected.logits[real])


def test_unused_vectors_in_half_precision_and_decoding() -> None:
    model = choose(dynamic(position="task", length="task", order="dpt"), position=2, length=3).to(torch.bfloat16)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "output_logits": True}
    inputs = batch(9, 6)
    runs = []
    for value in (0.0, 1e30):
        with torch.no_grad():
            prompts_of(model)[:, 3:] = value
            runs.append(model.generate(**inputs, **how, return_dict_in_generate=True))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(runs[0].logits, runs[1].logits))


# ------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("preset", PRESETS)
def test_fresh_adapter_and_its_gradients(preset: str) -> None:
    """It begins with the plain prompt, and at the second step all weights learn."""
    model = get_peft_model(
        causal_lm(), DynamicPromptConfig.preset(preset, task_type="CAUSAL_LM", num_virtual_tokens=L)
    )
    ids = batch(9, 9)["input_ids"]
    with record_choices() as record, torch.no_grad():
        model.eval()(ids)
    assert record[0].positions is None or not record[0].positions.any()
    assert record[0].lengths is None or (record[0].lengths == L).all()
    generator = generator_of(model.train())
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    torch.manual_seed(0)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=labels_for(ids, 6)).loss.backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in generator.parameters())


# ----------------------------------------------------------------------------------------- choices, noise, temperature


def positions(model: PeftModel, **inputs) -> list[int]:
    with record_choices() as record, torch.no_grad():
        model(**inputs)
    return record[0].positions.tolist()


def test_noise_in_training_and_not_in_evaluation() -> None:
    inputs = batch(9, 9, 9, 9, 9, 9, 9, 9)
    inputs["labels"] = labels_for(inputs["input_ids"], 6)
    model = dynamic(position="task")
    with torch.no_grad():
        generator_of(model).logits["position"].copy_(torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0]))
    assert positions(model, **inputs) == [1] * 8
    assert len(set(positions(model.train(), **inputs))) > 1
    drawn = torch.tensor([positions(model, **inputs) for _ in range(60)]).flatten()
    expected = generator_of(model).logits["position"].softmax(-1)
    assert_same(drawn.bincount(minlength=5) / len(drawn), expected, 0.08)
    sampling = dynamic(position="task", sample_at_eval=True)
    assert len({tuple(positions(sampling, **inputs)) for _ in range(3)}) == 3


def test_temperature_falls_over_training_and_survives_saving(tmp_path) -> None:
    model = dynamic(position="instance", anneal_steps=4)
    ids = batch(9)["input_ids"]
    labels = labels_for(ids, 6)
    generator = generator_of(model)
    with torch.no_grad():
        model(ids)
    seen = []
    for _ in range(6):
        seen.append(generator.temperature)
        model.train()(ids, labels=labels)
    expected = [1.0 * 0.5 ** (min(t / 4, 1.0) ** 2) for t in range(6)]
    assert seen == pytest.approx(expected)
    assert int(generator.step) == 6
    # The released code's, after 300 and 680 steps of its own: it multiplies by exp(-3e-6 t) in step t.
    slow = generator_of(dynamic())
    for step in (300, 600):
        slow.step.fill_(step)
        assert slow.temperature == pytest.approx(math.exp(-3e-6 * step * (step + 1) / 2), rel=2e-3)
    generator.step.fill_(3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path, adapter_name="other")
    assert int(generator_of(loaded, "other").step) == 3
    assert generator_of(loaded.to(torch.bfloat16), "other").step.dtype == torch.long


def test_trainer_resumes_with_the_temperature(tmp_path) -> None:
    ids = batch(9)["input_ids"][0]
    data = [{"input_ids": ids, "labels": labels_for(ids[None], 6)[0]}] * 4
    arguments = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    config = DynamicPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=L)
    for steps, resume in ((2, False), (3, True)):
        model = get_peft_model(causal_lm(), config)
        trainer = tf.Trainer(model, tf.TrainingArguments(max_steps=steps, **arguments), train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        assert int(generator_of(model).step) == steps


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("source", ["frozen", "embeddings"])
def test_choices_do_not_depend_on_padding_or_the_response(family: str, source: str) -> None:
    model = dynamic(family, length="instance", representation="instance", instance_source=source)
    for head in generator_of(model).heads.values():
        head.weight.data.mul_(8)  # what it reads has the length 1
    rows = (12, 9, 7, 5, 10)
    seen = []
    for side in ("left", "right"):
        with record_choices() as record, torch.no_grad():
            model(**batch(*rows, side=side))
        seen.append(record[0])
    assert torch.equal(seen[0].positions, seen[1].positions)
    assert torch.equal(seen[0].lengths, seen[1].lengths)
    assert_same(seen[0].mixture, seen[1].mixture)
    assert len(set(seen[0].positions.tolist())) > 1
    assert len(set(seen[0].lengths.tolist())) > 1
    # The vector: a mean over the instruction.
    ids = batch(12)["input_ids"]
    mask = torch.arange(12)[None] < 8
    other = ids.masked_fill(~mask, 7)
    with record_choices() as record, torch.no_grad():
        model(ids, instruction_mask=mask)
        model(other, instruction_mask=mask)
        model(ids.roll(1, dims=1), instruction_mask=mask)
    assert_same(record[0].mixture, record[1].mixture)
    assert (record[0].mixture - record[2].mixture).abs().max() > 1e-3
    base = model.get_base_model()
    with torch.no_grad(), model.disable_adapter():
        stack = base.get_decoder()
        states = stack(ids).last_hidden_state if source == "frozen" else stack.get_input_embeddings()(ids)
        mean = states[0, :8].mean(dim=0)
        mean = mean / mean.pow(2).sum().sqrt()
        head = generator_of(model).heads["representation"]
        assert_same(record[0].mixture[0], head(mean).softmax(-1))


def test_given_vectors_and_relu() -> None:
    model = dynamic(instance_source="instance_embeds", instance_embeds_dim=6, relu_logits=True)
    head = generator_of(model).heads["position"]
    given, inputs = torch.randn(2, 6), batch(9, 6)
    with torch.no_grad():
        wanted = head(given / given.pow(2).mean(-1, keepdim=True).sqrt()).relu().argmax(-1)
    assert positions(model, **inputs, instance_embeds=given) == wanted.tolist()
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([-3.0, -2.0, -1.0, -2.0, -3.0]))  # all alike behind the ReLU
    assert positions(model, **inputs, instance_embeds=given) == [0, 0]
    with pytest.raises(ValueError, match="needs `instance_embeds`"):
        model(**inputs)


def test_relu_is_not_for_the_mixture() -> None:
    """The released code has it before its discrete choices only: logits below zero still weigh their prompts less."""
    given, inputs = torch.randn(2, 6), batch(9, 6)
    model = dynamic(
        instance_source="instance_embeds", instance_embeds_dim=6, relu_logits=True, representation="instance"
    )
    heads = generator_of(model).heads
    with torch.no_grad():
        heads["representation"].bias.copy_(torch.tensor([-1.0, -2.0, 1.0]))
        expected = heads["representation"](given / given.norm(dim=-1, keepdim=True)).softmax(-1)
    with record_choices() as record, torch.no_grad():
        model(**inputs, instance_embeds=given)
    assert_same(record[0].mixture, expected)


def test_constant_condition_chooses_alike() -> None:
    model = dynamic(condition="constant", length="instance", representation="instance")
    with record_choices() as record, torch.no_grad():
        model(**batch(9, 6, 8))
    for values in (record[0].positions, record[0].lengths, record[0].mixture):
        assert (values == values[0]).all()


def test_record_in_mixed_batches_and_threads() -> None:
    model = dynamic(length="task")
    model.add_adapter("b", DynamicPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=L, length="task"))
    with torch.no_grad():
        generator_of(model, "b").heads["position"].bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0]))
    inputs = batch(9, 6, 9, 7)
    with record_choices() as record, torch.no_grad():
        model(**inputs, adapter_names=["b", "default", "__base__", "b"])
        assert len(record) == 2
        model.generate(**inputs, max_new_tokens=3)
    assert len(record) == 3, "decoding chooses nothing"
    by_row = {int(r): int(p) for choices in record[:2] for r, p in zip(choices.rows, choices.positions)}
    assert by_row.keys() == {0, 1, 3}
    assert by_row[0] == by_row[3] == 2
    assert by_row[1] == record[2].positions[1]
    assert record[2].mixture is None
    assert record[2].rows.tolist() == [0, 1, 2, 3]

    def alone(row: int) -> list[int]:
        return positions(model, **{name: value[row : row + 1] for name, value in inputs.items()})

    expected = [alone(row) for row in range(4)]
    with record_choices() as record, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(alone, range(4))) == expected
        assert record == []
    with torch.no_grad():
        model(**inputs)
    assert record == []


def test_all_off_is_prompt_tuning() -> None:
    model = dynamic(position="off", init_weights="paper", prompt_position="before")
    ids, prompt = batch(7)["input_ids"], prompts_of(model)
    with torch.no_grad():
        actual = model(ids).logits
        base = model.unload()
        assert_same(actual, base(inputs_embeds=torch.cat([prompt, base.model.embed_tokens(ids)], 1)).logits[:, L:])


def test_assisted_decoding() -> None:
    """With an assistant the text is the same; as an assistant, its cache would be cropped to before its own slots."""
    model, assistant = choose(dynamic(position="task"), position=2), causal_lm(seed=3)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inputs = batch(9)
    expected = model.generate(**inputs, **how)
    assert torch.equal(model.generate(**inputs, **how, assistant_model=assistant), expected)
    with pytest.raises(ValueError, match="cannot be cropped to .* that would cut off prompt slots"):
        assistant.generate(**inputs, **how, assistant_model=model.get_base_model())
