# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The quality suites: what they share, and a run of each on two layers of a real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from splits import three_splits


ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from quality import tasks  # noqa: E402
from quality.causal import Causal, overlap_f1  # noqa: E402
from quality.cells import Cell, Plan, run_cell  # noqa: E402
from quality.command import CORE, cells, numbers  # noqa: E402
from quality.encoder import Encoder  # noqa: E402
from quality.methods import CONTROLS, EDITS, METHODS, OURS, VARIANTS, Setting  # noqa: E402
from quality.statistics import paired_interval  # noqa: E402
from quality.tasks import Task  # noqa: E402
from quality.training import HEAD_RATE, fit  # noqa: E402


def examples(n: int) -> list[dict]:
    return [{"text": f"page{i // 3}: t{i}", "label": "abc"[i % 3]} for i in range(n)]


def test_splits_share_no_group_and_are_always_the_same() -> None:
    once = three_splits(examples(400), group=lambda e: e["text"].split(":")[0], most=(20, 50))
    again = three_splits(examples(400) + examples(400), group=lambda e: e["text"].split(":")[0], most=(20, 50))
    assert once == again
    assert (len(once["dev"]), len(once["test"])) == (20, 50)
    pages = [{e["text"].split(":")[0] for e in part} for part in once.values()]
    assert not pages[0] & pages[1] and not pages[0] & pages[2] and not pages[1] & pages[2]
    with pytest.raises(ValueError, match="8 different texts"):
        three_splits(examples(7))


def test_batches_are_the_same_for_each_method_and_mix_the_tasks() -> None:
    parts = tuple(
        Task(name, {"train": [{"text": f"{name}{i}"} for i in range(n)]}, ()) for name, n in (("a", 5), ("b", 80))
    )
    mixture = Task("a+b", {}, (), parts=parts)
    batches = list(mixture.batches(steps=50, size=8, seed=3))
    assert (
        batches == list(mixture.batches(steps=50, size=8, seed=3)) != list(mixture.batches(steps=50, size=8, seed=4))
    )
    of_a = [row["text"] for batch in batches for row in batch if row["text"][0] == "a"]
    assert 150 < len(of_a) < 250  # half of 400, though there are few such texts
    assert all(len(set(of_a[i : i + 5])) == 5 for i in range(0, 145, 5))  # each once before one comes again


def test_a_head_chooses_among_the_labels_of_all_tasks_of_a_mixture(monkeypatch) -> None:
    labels = {"movie": "ab", "vitaminc": "ca", "intent": "x", "overlap": "pqr"}
    splits = {
        name: {part: [{"text": "w1 w2", "label": l} for l in own] for part in ("train", "dev", "test")}
        for name, own in labels.items()
    }
    monkeypatch.setattr(tasks, "MIXTURE", tuple(labels))
    monkeypatch.setattr(tasks, "_cached", splits.get)
    written = tasks.load("mixture")
    assert [part.name for part in written.parts] == list(labels)
    chosen = tasks.load("mixture", free_text=False)
    assert [part.name for part in chosen.parts] == ["movie", "vitaminc", "intent"]
    assert {chosen.choices, *(part.choices for part in chosen.parts)} == {("a", "b", "c", "x")}
    assert chosen.parts[1].labels == ("a", "c") and tasks.load("intent").choices == ("x",)
    suite = Encoder.__new__(Encoder)
    suite.tokenizer = tiny.tokenizer()
    for part, expected in zip(chosen.parts, ([0, 1], [2, 0], [3])):
        assert suite.collate(part, part.splits["test"])["labels"].tolist() == expected


def test_only_prompts_that_differ_by_instance_are_exchanged() -> None:
    assert {name for name, method in METHODS.items() if method.exchanged} == set(OURS)
    ours = {*OURS, *VARIANTS, *CONTROLS.values(), *EDITS}
    assert {name for name, method in METHODS.items() if method.ours} == ours


def test_most_telling_cells_first_and_seed_0_before_the_others() -> None:
    found = cells(["x", "y"], list(METHODS), ["full", "100"], [0, 1, 2])
    assert len(found) == len(set(found)) == 2 * 2 * (3 * (len(METHODS) - 1) + 1)
    assert {cell.method for cell in found[: 2 * len(CORE)]} == set(CORE) and not any(
        c.seed for c in found[: 2 * len(CORE)]
    )
    for cell in found:
        if cell.seed:
            assert found.index(Cell(cell.task, cell.size, cell.method, 0)) < found.index(cell)


def test_each_method_of_ours_has_a_control_and_as_many_rates() -> None:
    assert set(CONTROLS) == set(OURS) and set(CONTROLS.values()) <= set(METHODS)
    assert {len(method.rates) for name, method in METHODS.items() if name != "zero-shot"} == {3}


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("zero-shot", "head", "full", "prompt-tuning")])
def test_each_method_can_be_attached(name: str, task_type: str) -> None:
    if name == "prefix-tuning" and task_type == "SEQ_CLS":
        pytest.skip("PEFT refuses it for BERT")
    if EDITS.get(name, 0) > 64:
        pytest.skip("its rank is above the width of the tiny models")
    family = "llama" if task_type == "CAUSAL_LM" else "bert"
    base = wide_model(family)
    setting = Setting(task_type, 7, tiny.tokenizer(), "")
    if name == "prefix-tuning":
        setting.tokenizer.chat_template = None
    model = METHODS[name].attach(base, setting)
    config = model.peft_config["default"]
    assert getattr(config, "condition", None) == (
        None if name in EDITS or not METHODS[name].ours else "constant" if name.endswith("-constant") else "instance"
    )
    assert getattr(config, "anneal_steps", 7) == 7
    ids = torch.randint(3, tiny.VOCAB, (2, 9))
    labels = (
        torch.tensor([0, 1]) if task_type == "SEQ_CLS" else torch.cat([torch.full((2, 6), -100), ids[:, 6:]], dim=1)
    )
    assert model(input_ids=ids, labels=labels).loss.isfinite()


def wide_model(family: str) -> torch.nn.Module:
    """Tiny, but with a width that the defaults of IDPG can divide."""
    import transformers as tf

    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=4)).eval()
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes, intermediate_size=48, num_labels=3)).eval()


# ------------------------------------------------------------------------------------------------ scores and intervals


class Words(Causal):
    """With a tokenizer of whole words, answers without an end, and a model with random weights."""

    def __init__(self):
        self.device, self.folder, self.overrides = "cpu", "", {}
        self.tokenizer, self.model = tiny.tokenizer("left"), wide_model("llama").requires_grad_(False)
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)

    def answer(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


TEXTS = [" ".join(f"w{(7 * i + j) % 90}" for j in range(2 + i % 5)) for i in range(20)]


def test_exact_is_what_greedy_decoding_writes() -> None:
    suite = Words()
    inputs = suite.tokenizer([f"{text}\nAnswer:" for text in TEXTS], padding=True, return_tensors="pt")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    written = suite.model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=999)[
        :, -3:
    ]
    for i in range(0, 20, 2):
        written[i, i % 3] = (written[i, i % 3] + 1) % tiny.VOCAB  # every other answer is another one, by one token
    rows = [{"text": t, "label": " ".join(suite.tokenizer.convert_ids_to_tokens(w))} for t, w in zip(TEXTS, written)]
    task = Task("words", {"test": rows}, ())
    batch = suite.collate(task, rows)
    logits, metric = suite.model(**batch).logits, suite.metric(task)
    assert suite.unpack(metric(logits, batch))["exact"].tolist() == [0.0, 1.0] * 10
    # A prompt of PEFT's stands before the logits of the tokens.
    longer = torch.cat([torch.randn(len(rows), 5, tiny.VOCAB), logits], dim=1)
    assert torch.equal(metric(longer, batch), metric(logits, batch))
    assert torch.equal(suite.losses(longer, batch), suite.losses(logits, batch))


def test_accuracy_is_among_the_first_tokens_of_the_labels() -> None:
    suite, labels = Words(), ("w3 w4", "w8", "w15", "w30")
    rows = [{"text": text, "label": labels[i % 4]} for i, text in enumerate(TEXTS)]
    task = Task("words", {"test": rows}, labels)
    batch = suite.collate(task, rows)
    found = suite.unpack(suite.metric(task)(suite.model(**batch).logits, batch))["accuracy"]
    expected = []
    for row in rows:  # row by row, without padding
        alone = suite.tokenizer(f"{row['text']}\nAnswer:", return_tensors="pt")["input_ids"]
        logits = suite.model(alone).logits[0, -1]
        best = max(labels, key=lambda label: logits[suite.answer(label)[0]].item())
        expected.append(float(best == row["label"]))
    assert found.tolist() == expected and 0 < sum(expected) < 20
    with pytest.raises(ValueError, match="do not differ in their first token"):
        suite.metric(Task("words", {}, ("w3 w4", "w3")))


def test_training_loss_is_that_of_the_answers_tokens() -> None:
    suite = Words()
    rows = [{"text": "w1 w2 w3", "label": "w4"}, {"text": "w1", "label": "w5 w6"}]
    batch = suite.collate(Task("words", {}, ()), rows)
    expected = suite.model(**batch).loss
    torch.testing.assert_close(suite.loss(suite.model, batch, ours=False), expected)


def test_learning_rates_of_a_head_and_of_named_parameters() -> None:
    model = torch.nn.Module()
    for name in ("down", "up"):
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))
    model.classifier = torch.nn.Linear(2, 2)
    before = model.classifier.weight.clone()
    fit(model, [None], lambda m, _: sum(p.sum() for p in m.parameters()), 1, 0.5, "cpu", {"down": 0.1})
    # Adam's first step is as long as its rate.
    torch.testing.assert_close(model.down, torch.full((2,), -0.05))
    torch.testing.assert_close(model.up, torch.full((2,), -0.5))
    torch.testing.assert_close(before - model.classifier.weight, torch.full((2, 2), HEAD_RATE))


def test_a_broken_run_goes_on_from_the_rates_that_it_has_tried(monkeypatch, tmp_path: Path) -> None:
    rates = METHODS["iapt"].rates
    right, trained = dict(zip(rates, (0.0, 1.0, 0.0))), []

    def train(plan, cell, task, rate: float):
        if len(trained) == 2:
            trained.append("broken")
            raise KeyboardInterrupt
        trained.append(rate)
        return rate, {
            "losses": [1.0],
            "seconds": 1.0,
            "cpu_seconds": 1.0,
            "above_loaded_mb": 1.0,
            "trainable": 1,
            "head": 0,
        }

    def evaluate(suite, model: float, task, split: str) -> dict:
        return {"loss": torch.full((2,), 1 - right[model]), "accuracy": torch.ones(2)}  # the loss decides

    monkeypatch.setattr("quality.cells.load", lambda *_: Task("movie", {"train": [], "test": []}, ()))
    monkeypatch.setattr("quality.cells.train", train)
    monkeypatch.setattr("quality.cells.evaluate", evaluate)
    monkeypatch.setattr("quality.cells.tested", lambda suite, model, *_: ({"own": {"model": model}}, {}))
    suite = Encoder.__new__(Encoder)
    suite.folder, suite.device = "m", "cpu"
    plan, cell = Plan(suite, 1, 1, 1, 3, (1, 1), tmp_path), Cell("movie", "full", "iapt", 0)
    with pytest.raises(KeyboardInterrupt):
        run_cell(plan, cell)
    result = run_cell(plan, cell)
    # The model of the best rate went with the broken run.
    assert trained == [rates[0], rates[1], "broken", rates[2], rates[1]]
    assert [note["rate"] for note in result["tried"]] == list(rates)
    assert result["rate"] == result["test"]["movie"]["own"]["model"] == rates[1]
    assert [file.name for file in cell.file(tmp_path).parent.iterdir()] == ["iapt-seed0.json"]


def test_overlap_f1() -> None:
    assert overlap_f1("the red fox", "red fox") == pytest.approx(0.8)
    assert overlap_f1("dog", "red fox") == 0 and overlap_f1("fox", "fox") == 1


def test_interval_covers_seeds_and_instances() -> None:
    rng = np.random.default_rng(0)
    one = 0.3 + rng.normal(size=(3, 400)) + np.array([[-0.2], [0.0], [0.2]])
    two = 0.1 + rng.normal(size=(1, 900))
    mean, low, high = paired_interval([[torch.tensor(one)], [torch.tensor(two)]], resamples=4000)
    assert mean == pytest.approx((one.mean() + two.mean()) / 2)
    means = []  # the same bootstrap with numpy
    for _ in range(4000):
        picked = one[rng.integers(3, size=3)][:, rng.integers(400, size=400)].mean()
        means.append((picked + two[0, rng.integers(900, size=900)].mean()) / 2)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist(), abs=0.012)
    for nothing in ([], [[]], [[torch.zeros(1, 0)]]):
        with pytest.raises(ValueError, match="nothing to resample"):
            paired_interval(nothing)


def test_tasks_of_a_mixture_draw_the_same_seeds() -> None:
    """Each seed is as good for one task as for the other: apart, the seeds would even out."""
    table = torch.tensor([[-0.3], [0.0], [0.3]]).expand(3, 50)
    _, low, high = paired_interval([[table, table]])
    assert (low, high) == pytest.approx((-0.3, 0.3))
    _, low, high = paired_interval([[table], [table]])
    assert -0.3 < low < -0.1 and 0.1 < high < 0.3
    with pytest.raises(ValueError, match=r"same seeds, got \[2, 3\]"):
        paired_interval([[table, table[:2]]])


def test_numbers_of_a_result() -> None:
    assert numbers("0110") == [0, 1, 1, 0] and numbers("0.250 1.000") == [0.25, 1] and numbers("0.125") == [0.125]


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("suite", ["quality_encoder", "quality_causal"])
def test_smoke_run_can_be_resumed(suite: str, tmp_path: Path) -> None:
    try:
        from minilm import minilm_folder
        from smollm2 import smollm2_folder

        minilm_folder(), smollm2_folder()
    except (RuntimeError, OSError) as error:
        pytest.skip(f"the models cannot be had here: {error}")
    command = [sys.executable, str(ROOT / "benchmarks" / f"{suite}.py"), "--smoke", "--results", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    files = sorted(tmp_path.glob("*/*.json"))
    assert len(files) == 7  # zero-shot, and two seeds of three methods
    result = json.loads(next(f for f in files if f.name == "iapt-seed1.json").read_text())
    (chosen,) = {json.loads(f.read_text())["rate"] for f in files if f.name == "iapt-seed0.json"}
    assert result["rate"] == chosen and [t["rate"] for t in result["tried"]] == [chosen]
    for by_prompt in result["test"].values():
        assert {"own", "shuffled", "mean", "none"} <= set(by_prompt)
        assert {len(numbers(by_prompt[p][result["score"]])) for p in by_prompt} == {8}
    assert set(result["spread"]) == {"0", "1"} and all(
        0 < share <= 1 for share in result["spread"].values()
    )  # 2 layers
    assert not any("spread" in f.read_text() for f in files if not f.name.startswith("iapt-seed"))
    files[0].unlink()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "6 of 7 cells are there" in again.stdout and files[0].is_file()
    plan = subprocess.run([*command, "--plan"], capture_output=True, text=True).stdout
    assert "7 of 7 cells are there" in plan
