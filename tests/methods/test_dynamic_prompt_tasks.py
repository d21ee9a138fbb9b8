# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Dynamic prompting over several tasks, and its two stages, against plain loops written here."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from dynamic_prompts import ORDERS, K, L, choose, dynamic, labels_for
from peft import PeftModel, get_peft_model
from test_dynamic_prompt_gradient import assert_same_gradients, explicit_sum, run_alone
from tiny import adapted, assert_same, batch, causal_lm, encoder, generator_of, pair, perturb
from torch.nn import functional as F

from peft_instance_prompt import DynamicPromptConfig, learned_position, record_choices


T = 3  # tasks
TASKS = torch.tensor([2, 0, 1, 2])


def of_tasks(seed: int = 0, base=None, **fields) -> PeftModel:
    """An adapter over tasks that choose differently."""
    fields = {"position": "task", "num_tasks": T, **fields}
    model = dynamic(base=base, seed=seed, **fields)
    with torch.no_grad():
        for name, numbers in (("position", (0, 3, 1)), ("length", (4, 3, 1))):
            if name in generator_of(model).logits:
                for task, number in enumerate(numbers):
                    generator_of(model).logits[name][task, number] += 9.0
    return model


def row_alone(model: PeftModel, embeds: torch.Tensor, n: int, task: int, vector: torch.Tensor) -> torch.Tensor:
    """The logits (S, V) of one row (S, e) with an instruction of n tokens, from the equations, by the base model alone."""
    generator, config = generator_of(model), generator_of(model).config
    pool = generator.prompts.detach()[0].view(-1, L, embeds.shape[-1])  # (k, l, e)

    def logits(name: str) -> torch.Tensor:
        return generator.heads[name](vector) if name in generator.heads else generator.logits[name][task]

    prompt = pool[0]
    if config.representation != "off":
        scores = [float(score) for score in logits("representation")]
        scores = torch.tensor(scores).tanh() if config.tanh_logits else torch.tensor(scores)
        weights = scores.exp() / scores.exp().sum()
        prompt = sum(weight * each for weight, each in zip(weights, pool))
    if config.init_weights is True:
        first = embeds[0]
        prompt = -first + first.pow(2).mean().add(1e-6).sqrt() * prompt
    i = int(logits("length").argmax()) if config.length != "off" else L
    j = config.position if isinstance(config.position, int) else None
    j = config.position[task] if isinstance(config.position, list) else j
    j = int(logits("position").argmax()) if j is None else j
    slots = [(k, k >= L - j if config.order == "paper" else k < j) for k in range(i)]
    front = [prompt[k] for k, is_behind in slots if not is_behind]
    behind = [prompt[k] for k, is_behind in slots if is_behind]
    start = int(config.prompt_position == "after_first")
    row = [*embeds[:start], *front, *embeds[start:n], *behind, *embeds[n:]]
    with model.disable_adapter():
        out = model.get_base_model()(inputs_embeds=torch.stack(row)[None]).logits[0]
    at = [t + len(front) * (t >= start) + len(behind) * (t >= n) for t in range(len(embeds))]
    at[n - 1] += len(behind)  # the first response token is predicted at the last vector behind
    return out[at]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"length": "task", "init_weights": "paper"},
        {"length": "task", "representation": "task", "prompt_position": "before"},
        {"representation": "instance", "instance_source": "embeddings", "tanh_logits": True},
        {"position": [0, 4, 2], "length": "instance", "representation": "task", "tanh_logits": True},
        {"position": 3, "num_tasks": None, "representation": "instance"},
    ],
)
@torch.no_grad()
def test_each_row_gets_the_choices_of_its_task(order: str, fields: dict) -> None:
    model, n = of_tasks(order=order, **fields), 6
    several = generator_of(model).config.num_tasks is not None
    ids = batch(9, 9, 9, 9)["input_ids"]
    scope = torch.arange(9).expand(4, -1) < n
    inputs = {"input_ids": ids, "instruction_mask": scope, **({"task_ids": TASKS} if several else {})}
    actual = model(**inputs).logits
    stack = model.get_base_model().model
    embeds = stack.embed_tokens(ids)
    with model.disable_adapter():
        states = embeds if fields.get("instance_source") else stack(ids).last_hidden_state
    for row in range(4):
        vector = states[row, :n].mean(dim=0)
        vector = vector / vector.pow(2).sum().sqrt()
        assert_same(actual[row], row_alone(model, embeds[row], n, int(TASKS[row]), vector))
    if several:  # another task, another answer
        other = model(**{**inputs, "task_ids": (TASKS + 1) % T}).logits
        assert ((other - actual).abs().amax(dim=(1, 2)) > 1e-3).all()


def test_gradients_are_those_of_the_sum_over_all_arrangements() -> None:
    """The logits of each task learn from its own rows; a task without rows learns nothing."""
    model = of_tasks(length="task", representation="task").train()
    with torch.no_grad():
        for name in ("position", "length"):
            generator_of(model).logits[name].mul_(0.1)  # so that the draws differ
    tasks, n = torch.tensor([2, 0, 2, 0]), 6
    ids = batch(9, 9, 9, 9)["input_ids"]
    torch.manual_seed(3)
    loss = model(ids, labels=labels_for(ids, n), task_ids=tasks).loss
    loss.backward()
    actual = {name: p.grad.clone() for name, p in generator_of(model).named_parameters()}
    embeds = model.get_base_model().model.embed_tokens(ids).detach()
    losses = []
    for b, (row, (u, at)) in enumerate(zip(*explicit_sum(model, embeds, None, 3, 1, n, tasks))):
        out = run_alone(model, row, u, at)
        read = [at.index(("token", n)) - 1, *(at.index(("token", t)) for t in range(n, 8))]
        losses.append(F.cross_entropy(out[read], ids[b, n:]))
    expected = torch.stack(losses).mean()
    assert_same(loss, expected)
    for name in ("position", "length", "representation"):
        grads = actual[f"logits.{name}"].abs().amax(dim=1)
        assert grads[0] > 0 and grads[2] > 0 and grads[1] == 0
    assert_same_gradients(model, actual, expected)


def test_counts_and_shapes() -> None:
    with torch.device("meta"):
        bert = tf.BertModel(tf.BertConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=1, vocab_size=8))
        fields = {"position": "task", "length": "task", "representation": "task", "num_tasks": 5, "num_pool": 4}
        model = get_peft_model(bert, DynamicPromptConfig(**fields))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 4 * 20 * 1024 + 5 * (21 + 21 + 4)
    assert model.base_model.model.dynamic_prompt.generators["default"].logits["position"].shape == (5, 21)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_generate_with_beams_padding_and_other_adapters(family: str) -> None:
    """A row's text is the one that it has alone, with its task; adapters without tasks take no notice."""
    model = of_tasks(base=causal_lm(family), length="task", representation="task")
    other = DynamicPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=L, position="task")
    model.add_adapter("plain", other)
    choose_plain = generator_of(model, "plain").logits["position"]
    choose_plain.zero_()[2] = 9.0
    third = DynamicPromptConfig(**{**generator_of(model).config.to_dict(), "peft_type": None})
    model.add_adapter("third", third)
    perturb(model, seed=7, adapter="third")
    inputs, names = batch(9, 6, 7, 8), ["default", "plain", "__base__", "third"]
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "num_beams": 2, "pad_token_id": 0}
    texts = model.generate(**inputs, **how, task_ids=TASKS, adapter_names=names)
    logits = model(**inputs, task_ids=TASKS, adapter_names=names).logits
    for row, name in enumerate(names):
        real = inputs["attention_mask"][row].bool()
        kept = torch.ones_like(real) if name == "__base__" else real  # the bare GPT-2 counts padding as positions
        alone = {name: values[row : row + 1, kept] for name, values in inputs.items()}
        alone.update(adapter_names=[name], task_ids=TASKS[row : row + 1])
        assert_same(logits[row][real], model(**alone).logits[0][real[kept]])
        assert torch.equal(texts[row, -4:], model.generate(**alone, **how)[0, -4:])


@torch.no_grad()
def test_encoder_and_pair() -> None:
    bert = of_tasks(base=encoder("bert", tf.AutoModelForSequenceClassification), task_type="SEQ_CLS")
    t5 = of_tasks(base=pair("t5"), task_type="SEQ_2_SEQ_LM")
    inputs = batch(9, 9, 9, 9)
    for model, more in ((bert, {}), (t5, {"decoder_input_ids": torch.zeros(4, 1, dtype=torch.long)})):
        with record_choices() as record:
            model(**inputs, **more, task_ids=TASKS)
            model(**inputs, **more, task_ids=TASKS.int())
        assert record[0].positions.tolist() == record[1].positions.tolist() == [1, 0, 3, 1]


def test_trainer_and_saving(tmp_path) -> None:
    """Batches carry a column `task_ids`, in training and in evaluation; what was saved gives the same."""
    ids = batch(9)["input_ids"][0]
    data = [{"input_ids": ids, "labels": labels_for(ids[None], 6)[0], "task_ids": t % T} for t in range(6)]
    model = of_tasks(length="task")
    before = {name: p.detach().clone() for name, p in generator_of(model).named_parameters()}
    trainer = tf.Trainer(
        model,
        tf.TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=3,
            max_steps=2,
            learning_rate=0.1,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train()
    assert all((p != before[name]).any() for name, p in generator_of(model).named_parameters())
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.args.remove_unused_columns = True
    with pytest.raises(ValueError, match="needs `task_ids`.*`remove_unused_columns=False`"):
        trainer.evaluate()
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(causal_lm(), tmp_path / "adapter")
    inputs = {**batch(9, 6, 7, 8), "task_ids": TASKS}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("task_ids", "error", "message"),
    [
        (None, ValueError, r"needs `task_ids`, integers of shape \(2,\) from 0 to 2 \(`num_tasks` 3\)"),
        (
            torch.tensor([3, 0]),
            ValueError,
            r"`task_ids` must lie in 0..2, as the adapter has `num_tasks` 3, got \[3\]",
        ),
        (torch.tensor([0, -1]), ValueError, r"`task_ids` must lie in 0..2, .*got \[-1\]"),
        (torch.tensor([0]), ValueError, "`task_ids` must have"),
        (torch.tensor([[0], [1]]), ValueError, "`task_ids` must have"),
        (torch.tensor([0.0, 1.0]), TypeError, "`task_ids` must be a tensor of integers, got torch.float32"),
        ([0, 1], TypeError, "`task_ids` must be a tensor of integers, got list"),
    ],
)
def test_bad_task_ids(task_ids, error: type, message: str) -> None:
    model, inputs = of_tasks(), batch(9, 6)
    expected = model(**inputs, task_ids=torch.tensor([1, 2])).logits
    for call in (model, model.base_model, model.generate):
        with pytest.raises(error, match=message):
            call(**inputs, task_ids=task_ids)
    assert torch.equal(model(**inputs, task_ids=torch.tensor([1, 2])).logits, expected)


def test_task_ids_for_an_adapter_of_one_task() -> None:
    """It takes no notice, as the bare model with its adapters disabled does."""
    model, inputs = dynamic(position="task"), batch(9, 6)
    with torch.no_grad():
        assert torch.equal(model(**inputs, task_ids=torch.tensor([7, 8])).logits, model(**inputs).logits)
        with model.disable_adapter():
            assert torch.equal(model(**inputs, task_ids=torch.tensor([7, 8])).logits, model(**inputs).logits)


# ------------------------------------------------------------------------------------------------------- two stages


@torch.no_grad()
def test_the_second_stage_keeps_the_position_of_the_first() -> None:
    first = choose(dynamic(position="task"), position=3)
    position, base = learned_position(first), first.unload()
    assert position == 3
    config = DynamicPromptConfig.preset(
        "adap_pos_ins_vec", position=position, task_type="CAUSAL_LM", num_virtual_tokens=L, num_pool=K
    )
    second = adapted(base, config).train()
    assert [name for name, p in second.named_parameters() if p.requires_grad and "logits" in name] == []
    with record_choices() as record:
        for _ in range(4):
            ids = batch(9, 9)["input_ids"]
            second(ids, labels=labels_for(ids, 6))
    assert all(choices.positions.tolist() == [3, 3] for choices in record)
    assert (record[0].mixture[0] - record[0].mixture[1]).abs().max() > 0
    assert learned_position(of_tasks()) == [0, 3, 1]
    for model in (second, dynamic(position="instance")):
        with pytest.raises(
            ValueError, match="must be dynamic prompting with `position='task'`, got DynamicPromptConfig"
        ):
            learned_position(model)


def test_the_joint_preset_of_the_released_code_learns_both() -> None:
    config = DynamicPromptConfig.preset("adap_pos_ins_vec")
    assert (config.position, config.representation, config.length) == ("task", "instance", "off")
