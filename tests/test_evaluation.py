# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The scores of lm-eval, which says nothing of where an instruction ends, on a task that lies on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods import METHODS
from peft import PeftModel
from tiny import adapted, causal_lm
from tiny import tokenizer as word_tokenizer


lm_eval = pytest.importorskip("lm_eval")
lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
huggingface = pytest.importorskip("lm_eval.models.huggingface")

# Of several tokens, since lm-eval feeds all but the last: only then can a prompt see what is to be scored.
CHOICES = ["w50 w51 w52", "w60 w61"]
DOCS = [
    {"text": text, "label": n % 2}
    for n, text in enumerate(["w10 w11 w12 w13 w14 w15", "w20", "w30 w31 w32", "w40 w11"])
]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict:
    file = tmp_path_factory.mktemp("task") / "docs.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} w0 w1",
        "doc_to_target": "label",
        "doc_to_choice": CHOICES,
        "metric_list": [{"metric": "acc"}],
    }


def measured(model: PeftModel, task: dict) -> tuple[list, float]:
    """The log-likelihoods of both choices for each text, and the accuracy, as lm-eval finds them."""
    harness = huggingface.HFLM(pretrained=model, tokenizer=word_tokenizer(), batch_size=4, device="cpu", max_length=64)
    found = lm_eval.simple_evaluate(
        harness,
        tasks=[task],
        task_manager=lm_eval_tasks.TaskManager(include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    scores = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]
    return scores, found["results"]["local"]["acc,none"]


@torch.no_grad()
def by_hand(model: PeftModel) -> list[list[float]]:
    """The same, row by row and without padding, with prompts that are said to be made from the text alone."""
    tokenizer, scores = word_tokenizer(), []
    for doc in DOCS:
        context = tokenizer(f"{doc['text']} w0 w1", add_special_tokens=False)["input_ids"]
        scores.append([])
        for choice in CHOICES:
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([context + answer])  # (1, S)
            mask = torch.arange(ids.shape[1])[None] < len(context)  # (1, S)
            logits = model(input_ids=ids, instruction_mask=mask).logits[0].log_softmax(-1)  # (S, V)
            scores[-1].append(sum(float(logits[len(context) + n - 1, token]) for n, token in enumerate(answer)))
    return scores


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_prompts_that_see_the_text_only(
    kind: str, task: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    template = word_tokenizer()("w0 w1", add_special_tokens=False)["input_ids"]
    model = adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", response_template=template)).eval()
    scores, accuracy = measured(model, task)
    expected = by_hand(model)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    best = [row.index(max(row)) for row in expected]
    assert accuracy == pytest.approx(sum(b == doc["label"] for b, doc in zip(best, DOCS)) / len(DOCS))


@pytest.mark.filterwarnings("ignore")
def test_scores_without_a_template_are_not(task: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the documentation warns of: no one tells the model that a part of the row is to be scored."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM")).eval()
    scores, _ = measured(model, task)
    assert (torch.tensor(scores) - torch.tensor(by_hand(model))).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_command_line(task: dict, tmp_path: Path) -> None:
    """`lm_eval --model_args pretrained=...,peft=...`, which never imports this package: the scores are the same."""
    causal_lm().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    template = word_tokenizer()("w0 w1", add_special_tokens=False)["input_ids"]
    model = adapted(causal_lm(), METHODS["iapt"](task_type="CAUSAL_LM", response_template=template))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(json.dumps(task))
    folders = f"pretrained={tmp_path / 'base'},peft={tmp_path / 'adapter'},max_length=64"
    line = [
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        folders,
        "--tasks",
        "local",
        "--include_path",
        tmp_path / "tasks",
    ]
    line += ["--device", "cpu", "--batch_size", "4", "--output_path", tmp_path / "out", "--log_samples"]
    env = {"PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "peft_instance_prompt", "run", *map(str, line)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (file,) = (tmp_path / "out").rglob("samples_local*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    scores = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(by_hand(model)), rtol=1e-4, atol=1e-4)
