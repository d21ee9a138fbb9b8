# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What dynamic prompts choose, by what noise and at what temperature, and how that is recorded."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from dynamic_prompts import L, dynamic, labels_for, positions
from peft import PeftModel, get_peft_model
from tiny import assert_same, batch, causal_lm, generator_of

from peft_instance_prompt import DynamicPromptConfig, record_choices


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
