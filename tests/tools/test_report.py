# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The report on own, shuffled, mean and no prompts, against loops by hand."""

from __future__ import annotations

import contextlib
import html
import json
import math

import pytest
import tiny
import torch
from accelerate import cpu_offload
from methods import METHODS
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from peft_instance_prompt import IAPTConfig, instance_report
from peft_instance_prompt.tools.inspection import token_weights
from peft_instance_prompt.tools.report import PROMPTS, InstanceReport


SLOTS = 4


def rows(number: int) -> list[dict[str, torch.Tensor]]:
    """Rows that begin alike; the first five tokens are the instruction."""
    ids = torch.randint(3, tiny.VOCAB, (number, 8))
    ids[:, 0] = 1
    labels = ids.masked_fill(torch.arange(8) < 5, -100)
    return [{"input_ids": i, "labels": l} for i, l in zip(ids, labels)]


def stack_rows(data: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def adapted(kind: str = "iapt", **changes):
    fields = {"task_type": "CAUSAL_LM", "init_weights": False, **changes}
    return get_peft_model(tiny.causal_lm(), METHODS[kind](**fields)).eval()


def alone(model, data, **kwargs) -> torch.Tensor:
    """The loss of each row in a batch of its own."""
    with torch.no_grad():
        return torch.stack([model(**stack_rows([row]), **kwargs).loss for row in data]).double()


def with_slots(model, data, place: str, parts: dict[int, torch.Tensor] | None = None):
    """Run each row alone; write the generated parts (n, l, d) into the slots of each layer, or read what they are.

    `place` is "paper" or "before", where the slots come first, or "end", where they stand behind the instruction and keep their states.
    """
    read: dict[int, list] = {}
    outputs: dict[int, torch.Tensor] = {}
    first, copied = (5, 4) if place == "end" else (0, SLOTS)  # the first slot, and the token whose state is copied

    def hook(number, module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        slots, copy_of = hidden[0, first : first + SLOTS], hidden[0, copied]
        size = copy_of.square().mean().sqrt() if place != "paper" else 1.0
        kept = outputs[number - 1][0, first : first + SLOTS] if place == "end" and number else copy_of
        kept = kept if place != "paper" else torch.zeros(())
        done = read.setdefault(number, [])
        if parts is None:
            done.append((slots - kept) / size)
        else:
            slots.copy_(kept + size * parts[number][len(done)])
            done.append(None)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    layers = model.get_base_model().model.layers
    handles = [
        layer.register_forward_pre_hook(lambda *a, n=n: hook(n, *a), with_kwargs=True)
        for n, layer in enumerate(layers)
    ]
    handles += [
        layer.register_forward_hook(lambda module, args, out, n=n: outputs.__setitem__(n, out.clone()))
        for n, layer in enumerate(layers)
    ]
    losses = alone(model, data)
    for handle in handles:
        handle.remove()
    return losses, ({n: torch.stack(part) for n, part in read.items()} if parts is None else None)


@pytest.mark.slots
def test_own_and_none(kind):
    model, data = adapted(kind), rows(5)
    report = instance_report(model, data, batch_size=3)
    assert len(report) == 5
    torch.testing.assert_close(report.values["loss"]["own"], alone(model, data), atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(report.values["loss"]["none"], alone(model, data), atol=1e-5, rtol=1e-5)
        guesses = model(**stack_rows(data)).logits.argmax(dim=-1)
    right = [(guesses[n, 4:7] == row["labels"][5:]).double().mean() for n, row in enumerate(data)]
    assert report.values["accuracy"]["none"].tolist() == pytest.approx([value.item() for value in right])


@pytest.mark.parametrize("place", ["before", "end"])
def test_shuffled_and_mean(place):
    """Against hooks of the test's own that write what was generated for others into the slots. The start stays the row's own."""
    model, data = adapted(prompt_position=place), rows(4)
    own, parts = with_slots(model, data, place)
    report = instance_report(model, DataLoader(data, batch_size=2, collate_fn=stack_rows))
    torch.testing.assert_close(report.values["loss"]["own"], own, atol=1e-5, rtol=1e-5)
    swapped = {n: part[[1, 0, 3, 2]] for n, part in parts.items()}  # of two rows each gets the other's
    shuffled, _ = with_slots(model, data, place, swapped)
    torch.testing.assert_close(report.values["loss"]["shuffled"], shuffled, atol=1e-4, rtol=1e-4)
    means = {n: part.mean(dim=0, keepdim=True).expand_as(part) for n, part in parts.items()}
    mean, _ = with_slots(model, data, place, means)
    torch.testing.assert_close(report.values["loss"]["mean"], mean, atol=1e-4, rtol=1e-4)
    assert ((own - shuffled).abs() > 1e-3).all() and ((own - mean).abs() > 1e-3).all()


@pytest.mark.slots
def test_batches_of_different_lengths(method):
    """What a method reads of an instance may be as long as the text; what it makes of that is exchanged."""
    data = [{name: value[start:] for name, value in row.items()} for row, start in zip(rows(4), (0, 0, 2, 2))]
    model = adapted(method)
    report = instance_report(model, DataLoader(data, batch_size=2, collate_fn=stack_rows))
    torch.testing.assert_close(report.values["loss"]["own"], alone(model, data), atol=1e-5, rtol=1e-5)
    assert all(report.values["loss"][prompts].isfinite().all() for prompts in PROMPTS)
    assert (report.values["loss"]["own"] - report.values["loss"]["mean"]).abs().max() > 1e-4


def test_a_last_batch_of_one_row_borrows_from_the_batch_before():
    model, data = adapted(), rows(3)
    _, parts = with_slots(model, data, "end")
    shuffled, _ = with_slots(model, data, "end", {n: part[[1, 0, 0]] for n, part in parts.items()})
    report = instance_report(model, data, batch_size=2)
    torch.testing.assert_close(report.values["loss"]["shuffled"], shuffled, atol=1e-4, rtol=1e-4)


def test_one_pass_for_each_kind_of_prompt():
    model, passes = adapted(), []
    model.get_base_model().register_forward_hook(lambda *call: passes.append(call))
    instance_report(model, rows(6), batch_size=2, resamples=10)
    assert len(passes) == 3 * len(PROMPTS)


@pytest.mark.parametrize("seed", [0, 1])
def test_nobody_gets_its_own(seed):
    values = instance_report(adapted(), rows(9), batch_size=9, seed=seed).values["loss"]
    assert ((values["own"] - values["shuffled"]).abs() > 1e-4).all()


@pytest.mark.slots
def test_a_constant_prompt_cannot_tell_instances_apart(kind):
    """The control that is fed a constant: own, shuffled and mean are one and the same, and none is not."""
    model = tiny.perturb(adapted(kind, condition="constant"))
    values = instance_report(model, rows(5), batch_size=3).values["loss"]
    for other in ("shuffled", "mean"):
        torch.testing.assert_close(values["own"], values[other], atol=1e-4, rtol=1e-4)
    assert ((values["own"] - values["none"]).abs() > 1e-3).all()


@pytest.mark.parametrize("num_labels", [3, 1])
def test_classification_and_regression(num_labels):
    """Labels per row; without the prompt the trained head stays."""
    config = tiny.configure("llama", num_labels=num_labels)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_config(config),
        IAPTConfig(task_type="SEQ_CLS", bottleneck_dim=8, init_weights=False),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    ids = torch.randint(3, tiny.VOCAB, (4, 6))
    labels = torch.tensor([0, 2, 1, 0]) if num_labels == 3 else torch.tensor([0.5, -1.0, 2.0, 0.0])
    data = [{"input_ids": i, "labels": l} for i, l in zip(ids, labels)]
    report = instance_report(model, data, batch_size=2)
    torch.testing.assert_close(report.values["loss"]["own"], alone(model, data), atol=1e-5, rtol=1e-5)
    assert ("accuracy" in report.values) == (num_labels == 3)
    if num_labels == 3:
        right = model(input_ids=ids).logits.argmax(dim=-1) == labels
        assert report.values["accuracy"]["own"].tolist() == right.double().tolist()
    layer = model.get_base_model().model.iapt
    layer.enable_adapters(False)
    torch.testing.assert_close(report.values["loss"]["none"], alone(model, data), atol=1e-5, rtol=1e-5)


def heads_and_rows(number: int = 4):
    """A classifier with a trained head far from the base model's, and labelled rows."""
    config = tiny.configure("llama", num_labels=3)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config)
    model = tiny.adapted(base, METHODS["iapt"](task_type="SEQ_CLS", init_weights=False))
    data = [{"input_ids": i, "labels": i[:1] % 3} for i in torch.randint(3, tiny.VOCAB, (number, 6))]
    return model, [{**row, "labels": row["labels"][0]} for row in data]


FEATURES = {
    "names": lambda model, batch: model(**batch, adapter_names=["default", "__base__"]),
    "names that raise": lambda model, batch: model(**batch, adapter_names=["default"] * 3),
    "disabled": lambda model, batch: disabled(model, batch),
    "no gradient": lambda model, batch: model.eval()(**batch),
    "another adapter": lambda model, batch: model.add_adapter("b", METHODS["iapt"](task_type="SEQ_CLS")),
    "a report": lambda model, batch: instance_report(model, [batch], resamples=1, collate_fn=lambda rows: rows[0]),
}


def disabled(model, batch):
    with model.disable_adapter():
        return model(**batch)


def state(model: torch.nn.Module) -> dict:
    """Everything that a call could leave on a module: its attributes, its hooks, its mode."""
    return {
        name: (
            vars(module).keys() - {"_disable_adapters"},
            {k: list(v) for k, v in vars(module).items() if "hooks" in k},
            module.training,
        )
        for name, module in model.named_modules()
        if ".b." not in f"{name}." and not name.endswith(".b")
    }


@pytest.mark.parametrize("feature", FEATURES)
def test_after_another_feature(feature):
    """Without the prompt the trained head stays, whatever was done before; no call leaves anything on a module."""
    model, data = heads_and_rows()
    expected = instance_report(model, data, batch_size=2).values
    before = state(model)
    with contextlib.suppress(ValueError):
        FEATURES[feature](model, stack_rows(data[:2]))
    assert state(model) == before
    again = instance_report(model, data, batch_size=2).values
    assert all(torch.equal(again[m][p], expected[m][p]) for m in again for p in again[m])
    # By hand: no prompt, and the head that was trained.
    base = model.get_base_model()
    with model.disable_adapter(), torch.no_grad():
        states = base.model(stack_rows(data)["input_ids"]).last_hidden_state[:, -1]  # (4, d)
    logits = base.score.modules_to_save["default"](states)  # (4, 3)
    labels = stack_rows(data)["labels"]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
    torch.testing.assert_close(again["loss"]["none"], loss, atol=1e-5, rtol=1e-5)
    bare = torch.nn.functional.cross_entropy(base.score.original_module(states), labels, reduction="none").double()
    assert (bare - loss).abs().max() > 1e-2


@pytest.mark.slots
def test_of_an_offloaded_model(kind):
    model, data = adapted(kind), rows(4)
    expected = instance_report(model, data, batch_size=2, tokenizer=tiny.tokenizer())
    found = instance_report(cpu_offload(model, "cpu"), data, batch_size=2, tokenizer=tiny.tokenizer())
    for prompts in PROMPTS:
        torch.testing.assert_close(found.values["loss"][prompts], expected.values["loss"][prompts])
    assert found.spread == pytest.approx(expected.spread)


def test_own_metric_and_own_scope():
    """A metric of the caller's, and labels on all tokens with `instruction_mask` to say what the prompt is made from."""
    data = [{**row, "labels": row["input_ids"], "instruction_mask": torch.arange(8) < 5} for row in rows(4)]

    def first_logit(logits, batch):
        assert logits.shape[:2] == batch["labels"].shape
        return logits[:, 0, 0]

    model = adapted()
    report = instance_report(model, data, batch_size=2, metric=first_logit)
    assert list(report.values) == ["loss", "first_logit"]
    batch = stack_rows(data)
    torch.testing.assert_close(report.values["first_logit"]["own"], model(**batch).logits[:, 0, 0].detach().double())


def test_the_model_is_left_as_it_was():
    model, data = adapted().train(), rows(2)
    model.base_model.model.lm_head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    instance_report(model, data)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable


def make_report(own: torch.Tensor, **others: torch.Tensor) -> InstanceReport:
    return InstanceReport({"loss": {p: others.get(p, own) for p in PROMPTS}}, level=0.95, resamples=2000, seed=0)


def test_intervals():
    """For many instances, the interval of the mean is that of the normal distribution; differences are paired."""
    own = torch.randn(400, dtype=torch.double) * 3 + 5
    summary = make_report(own, none=own + 1, mean=torch.randn(400, dtype=torch.double)).summary()["loss"]
    half = 1.96 * own.std().item() / math.sqrt(400)
    found = summary["own"]
    assert found["mean"] == pytest.approx(own.mean().item())
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.12)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.12)
    # Paired: the same for each instance, so certain, although each of the two means is not.
    assert list(summary["own - none"].values()) == pytest.approx([-1.0, -1.0, -1.0])
    difference = summary["own - mean"]
    assert difference["high"] - difference["low"] > 2 * half


def test_text_and_json():
    report = instance_report(adapted(), rows(4), batch_size=2, resamples=50)
    lines = str(report).splitlines()
    assert "4 instances" in lines[0] and lines[1].split() == ["prompt", "loss", "accuracy"]
    names = ["own", "shuffled", "mean", "none", "own - shuffled", "own - mean", "own - none"]
    assert [line[:16].strip() for line in lines[2:-1]] == names
    assert f"{report.values['loss']['own'].mean():.4f} [" in lines[2]
    read = json.loads(report.to_json())
    assert read["values"]["loss"]["none"] == report.values["loss"]["none"].tolist()
    assert read["summary"] == report.summary() == report.summary()  # resampled alike each time
    assert read["instances"] == 4 and list(read["summary"]["accuracy"]) == names


def test_what_is_read_of_the_first_texts():
    """Those of the first instances, over batches; the report says of what it is."""
    model, data = adapted(), rows(5)
    report = instance_report(model, data, batch_size=2, resamples=10, tokenizer=tiny.tokenizer(), texts=3)
    assert report.subject == "IAPT, 4 prompt vectors at each of 3 layers"
    assert len(report.readings) == 3
    for row, reading in zip(data, report.readings):
        assert torch.equal(reading.weights[1], token_weights(model, stack_rows([row]), 1)[0])
    assert instance_report(model, data, resamples=10).readings == []
    assert instance_report(adapted("lpt"), data, resamples=10).subject.endswith("prompt vectors at layer 1")
    assert instance_report(adapted("ipt"), data, resamples=10).subject.endswith("prompt vectors at the input")


@pytest.mark.parametrize("batch_size", [2, 5])
def test_spread(batch_size):
    """The distance of what stands in the slots from its mean, over its size, whatever the batches."""
    model, data = adapted(init_weights="paper"), rows(5)  # whose vectors are generated as a whole
    report = instance_report(model, data, batch_size=batch_size, resamples=10)
    states = with_slots(model, data, "paper")[1]
    assert list(report.spread) == list(states)
    for depth, values in states.items():
        values = values.flatten(1).double()
        apart, size = (values - values.mean(dim=0)).square().sum(), values.square().sum()
        assert report.spread[depth] == pytest.approx((apart / size).sqrt().item(), rel=1e-4)
    low, high = min(report.spread.values()), max(report.spread.values())
    words = f"differ between instances by {low:.1%} to {high:.1%}, by layer, of their size."
    assert str(report).endswith(words) and words in report.to_html()
    assert json.loads(report.to_json())["spread"] == {str(depth): share for depth, share in report.spread.items()}


@pytest.mark.slots
def test_spread_is_that_of_the_generated_part(kind):
    """Not of the base state, which is large: here it differs between the rows, and a constant has no spread all the same."""
    data = rows(4)
    for number, row in enumerate(data):
        row["input_ids"][0] = 3 + number
    fresh = instance_report(adapted(kind, init_weights=True), data, batch_size=2, resamples=10)
    assert all(share < 1e-3 for share in fresh.spread.values())  # of a fresh adapter, 0
    blind = tiny.perturb(adapted(kind, condition="constant", init_weights=True))
    assert all(share < 1e-3 for share in instance_report(blind, data, batch_size=2, resamples=10).spread.values())
    seeing = tiny.perturb(adapted(kind, init_weights=True))
    largest = max(instance_report(seeing, data, batch_size=2, resamples=10).spread.values())
    # by default, dynamic prompting chooses places for vectors that are the same for all
    assert (largest > 1e-2) != (kind == "dynamic_prompt")


def test_page(tmp_path):
    report = instance_report(adapted(), rows(4), batch_size=2, resamples=50, tokenizer=tiny.tokenizer())
    page = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page == report.to_html()
    assert page.count("<h3>Text ") == 4 and f"{report.values['loss']['own'].mean():.4f} [" in page
    assert html.escape(page) in report._repr_html_()


@pytest.mark.slots
def test_page_of_each_method(kind):
    """With what is read of the texts, or a sentence that says why there is nothing to show."""
    page = instance_report(adapted(kind), rows(2), resamples=10, tokenizer=tiny.tokenizer()).to_html()
    assert ("<h3>Text " in page) != ("no weighted means over tokens" in page)


def test_bad_input():
    model, data = adapted(), rows(2)
    for fields, message in (({"level": 1.0}, "`level`"), ({"resamples": 0}, "`resamples`")):
        with pytest.raises(ValueError, match=message):
            instance_report(model, data, **fields)
    with pytest.raises(ValueError, match="two instances"):
        instance_report(model, data[:1])
    with pytest.raises(ValueError, match="`labels`"):
        instance_report(model, [{"input_ids": row["input_ids"]} for row in data])
    with pytest.raises(ValueError, match="active"):
        instance_report(tiny.causal_lm(), data)
