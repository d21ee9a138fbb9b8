# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What scripts with LoRA do around a model: pipelines, streamers, gradient accumulation, a 4-bit run that goes on, exporting."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from methods import METHODS
from peft import PeftConfig, PeftModel, get_peft_model
from tiny import adapted, assert_same, batch, causal_lm, encoder, perturb, tokenizer
from trainers import causal_trainer, changed, losses, trainable
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from peft_instance_prompt.engine.request import Request, current_request


TEXTS = ["w5 w6 w7 w8", "w9", "w20 w21"]
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def prompted(kind: str, **fields: Any) -> PeftModel:
    return adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM", **fields))


def answers(model: torch.nn.Module) -> list[str]:
    """Each text alone and without padding."""
    words, found = tokenizer(), []
    for text in TEXTS:
        ids = torch.tensor([words(text, add_special_tokens=False)["input_ids"]])
        out = model.generate(input_ids=ids, **GREEDY)[0, ids.shape[1] :]
        found.append(words.decode(out, skip_special_tokens=True))
    return found


@pytest.mark.filterwarnings("ignore")
def test_text_generation_pipeline(kind: str) -> None:
    model = prompted(kind)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer("left"), device="cpu", batch_size=3)
    found = pipe(TEXTS, return_full_text=False, add_special_tokens=False, **GREEDY)
    expected = answers(model)
    assert [one[0]["generated_text"].split() for one in found] == [text.split() for text in expected]
    with model.disable_adapter():
        assert answers(model) != expected


@pytest.mark.filterwarnings("ignore")
def test_text_classification_pipeline(kind: str) -> None:
    base = encoder("bert", AutoModelForSequenceClassification, num_labels=3)
    model = adapted(base, METHODS[kind](task_type="SEQ_CLS"))
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer(), device="cpu", batch_size=3, top_k=None)
    found = [{one["label"]: one["score"] for one in row} for row in pipe(TEXTS)]
    for text, scores in zip(TEXTS, found):
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0].softmax(-1)  # (3,)
        assert_same(torch.tensor([scores[f"LABEL_{n}"] for n in range(3)]), expected)


def test_streamers(kind: str, capsys) -> None:
    model, words = prompted(kind), tokenizer()
    ids = torch.tensor([words(TEXTS[0], add_special_tokens=False)["input_ids"]])
    streamer = TextStreamer(words, skip_prompt=True, skip_special_tokens=True)
    model.generate(input_ids=ids, streamer=streamer, **GREEDY)
    assert capsys.readouterr().out.split() == answers(model)[0].split()
    pieces = TextIteratorStreamer(words, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={"input_ids": ids, "streamer": pieces, **GREEDY})
    thread.start()
    assert "".join(pieces).split() == answers(model)[0].split()
    thread.join()


def test_gradient_accumulation(kind: str, tmp_path: Path) -> None:
    """Two halves of a batch are the whole batch, though their rows have other numbers of labels."""
    runs = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = causal_trainer(
            tmp_path / str(steps),
            kind,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            max_grad_norm=0.5,
        )
        trainer.train()
        runs.append((losses(trainer), trainable(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=2e-3)  # the log has four digits
    for name, value in runs[0][1].items():
        assert_same(runs[1][1][name], value, 1e-5)
    assert changed(trainable(adapted(causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))), trainer.model)


def test_the_steps_of_pefts_method_comparison(kind: str, tmp_path: Path) -> None:
    """Its runner wants CUDA. This is what it does with a config from an experiment's folder: the loss of plain text, training on
    labels that cover question and answer, generation with a static cache, saving."""
    words, answer = tokenizer(), [4, 5]  # w0 w1
    config = {"response_template": answer, "missing_template": "all", "task_type": "CAUSAL_LM"}
    config["peft_type"] = METHODS[kind]().peft_type.value
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = get_peft_model(causal_lm(), PeftConfig.from_pretrained(tmp_path), autocast_adapter_dtype=True)

    plain = words.pad(words(["w5 w6 w7", "w9"]), return_tensors="pt", padding_side="left")
    with torch.inference_mode():
        before = model.eval()(**plain, pad_token_id=2).logits

    rows = words([f"w{9 + n} w{8 + n} w0 w1 w{20 + n}" + " w6" * n for n in range(3)])
    rows = words.pad(rows, return_tensors="pt", padding_side="right")
    labels = rows["input_ids"].clone()
    labels[rows["attention_mask"] == 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(5):
        optimizer.zero_grad()
        out = model.train()(**rows, labels=labels, num_items_in_batch=int(rows["attention_mask"].sum()))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(float(out.loss))
    assert found[-1] < found[0]

    questions = words.pad(words(["w9 w8 w0 w1", "w7 w0 w1"]), return_tensors="pt", padding_side="left")
    how = GenerationConfig(max_length=12, min_length=12, cache_implementation="static", disable_compile=True)
    with torch.inference_mode():
        text = model.eval().generate(**questions, generation_config=how, pad_token_id=2)
        assert text.shape == (2, 12)
        assert not torch.equal(model(**plain, pad_token_id=2).logits, before)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(causal_lm(), tmp_path / "saved").eval()
    assert torch.equal(again.generate(**questions, generation_config=how, pad_token_id=2), text)


@pytest.mark.filterwarnings("ignore")
def test_a_run_in_4_bits_goes_on(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    causal_lm().save_pretrained(tmp_path / "base")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def trainer(folder: str, seed: int, **changes: Any):
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=four, dtype=torch.float32, device_map={"": "cpu"}
        )
        torch.manual_seed(0)
        model = perturb(get_peft_model(base, METHODS[kind](task_type="CAUSAL_LM")), seed)
        return causal_trainer(tmp_path / folder, model=model, max_steps=4, **changes)

    whole = trainer("whole", 0)
    whole.train()
    trainer("part", 0, save_strategy="steps", save_steps=2).train()
    again = trainer("part", 9)
    again.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert losses(again)[2:] == losses(whole)[2:] and len(losses(whole)) == 4
    for name, value in trainable(whole.model).items():
        assert_same(again.model.get_parameter(name), value, 1e-5)


def test_export_is_refused(kind: str) -> None:
    model = prompted(kind)
    with pytest.raises(ValueError, match=r"cannot be exported with `torch.export`.*`unload\(\)`"):
        torch.export.export(model, (), dict(batch(5)), strict=False)
    assert current_request() == Request()  # what the call said is forgotten
    base, inputs = model.unload(), dict(batch(5))
    base.config.use_cache = False
    exported = torch.export.export(base, (), inputs, strict=False).module()
    assert_same(exported(**inputs).logits, base(**inputs).logits)
