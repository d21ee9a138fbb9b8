# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters that are saved and loaded: in a new process, by each way to load, with heads and other trained modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from methods import METHODS
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.utils import get_peft_model_state_dict
from prompted_model import INPUTS, LABELS, config, logits, prompted
from tiny import adapted, causal_lm, configure


LOAD = """
import sys, torch, warnings
path, folder, methods = {path!r}, {folder!r}, {methods!r}
sys.path[:0] = path
warnings.simplefilter("ignore")
torch.set_num_threads({threads})
from peft import AutoPeftModelForCausalLM, PeftModel
from tiny import batch, causal_lm
import mean_prompt, peft_instance_prompt  # a method of one's own is there when its file is imported
inputs, out = batch(9, 6), {{}}

def look(model):
    with torch.no_grad():
        return model.eval()(**inputs).logits

for method in methods:
    where, seen = folder + "/" + method, {{}}
    for name, kwargs in (
        ("default", {{}}),
        ("other_name", {{"adapter_name": "other"}}),
        ("trainable", {{"is_trainable": True}}),
        ("low_cpu", {{"low_cpu_mem_usage": True, "adapter_name": "a_b-c"}}),
    ):
        torch.manual_seed(len(name))
        model = PeftModel.from_pretrained(causal_lm(), where, **kwargs)
        assert any(p.requires_grad for p in model.parameters()) == (name == "trainable"), name
        seen[name] = look(model)
    model = PeftModel.from_pretrained(causal_lm(), where + "/second")
    model.load_adapter(where, adapter_name="late")
    seen["second"] = look(model)
    model.set_adapter("late")
    seen["late"] = look(model)
    native = causal_lm()
    native.load_adapter(where, adapter_name="n")
    seen["native"] = look(native)
    seen["auto"] = look(AutoPeftModelForCausalLM.from_pretrained(where))
    out[method] = seen
torch.save((look(causal_lm()), out), folder + "/out.pt")
"""


@pytest.fixture(scope="module")
def new_process(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Logits of each method's adapters here, and what a new process makes of them, by each way to load; and of the base."""
    folder, here = tmp_path_factory.mktemp("saved"), {}
    causal_lm().save_pretrained(folder / "base")
    for method in METHODS:
        for seed, where in ((0, folder / method), (3, folder / method / "second")):
            base = tf.AutoModelForCausalLM.from_pretrained(folder / "base")
            model = adapted(base, config(method), seed=seed)
            model.save_pretrained(where)
            here[method, seed] = logits(model)
        files = {file.name for file in (folder / method).iterdir() if file.is_file() and file.name != "README.md"}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
    tests = Path(__file__).parent
    path, threads = [str(tests), str(tests.parent)], torch.get_num_threads()
    code = LOAD.format(folder=str(folder), methods=list(METHODS), path=path, threads=threads)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return here, *torch.load(folder / "out.pt")


def test_new_process(method: str, new_process) -> None:
    here, bare, out = new_process
    assert torch.equal(bare, logits(causal_lm()))
    assert not torch.equal(here[method, 0], here[method, 3])
    assert set(out[method]) == {"default", "other_name", "trainable", "low_cpu", "second", "late", "native", "auto"}
    for name, found in out[method].items():
        assert torch.equal(found, here[method, 3 if name == "second" else 0]), name


def test_auto_class_in_the_same_process(kind: str, tmp_path: Path) -> None:
    causal_lm().save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = adapted(base, config(kind))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_training_goes_on_after_loading(method: str, tmp_path: Path) -> None:
    model = prompted(method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(causal_lm(), tmp_path, is_trainable=True)
    grads = []
    for one in (model, again):
        torch.manual_seed(3)
        one.train()(**INPUTS, labels=LABELS).loss.backward()
        grads.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_state_dict_names_no_adapter(method: str) -> None:
    model = adapted(causal_lm(), config(method), name="somename")
    state = get_peft_model_state_dict(model, adapter_name="somename")
    weights = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(state) >= len(weights)
    assert not [name for name in state if "somename" in name]


def test_modules_to_save(kind: str, tmp_path: Path) -> None:
    model = prompted(kind, modules_to_save=["lm_head"])
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(causal_lm(), tmp_path, adapter_name="x")
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(prompted(kind))).abs().max() > 1e-2


def test_classification_head_is_saved(kind: str, tmp_path: Path) -> None:
    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        return tf.LlamaForSequenceClassification(configure("llama", num_labels=3)).eval()

    model = adapted(base(), METHODS[kind](task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert logits(model).shape == (2, 3)
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(base())).abs().max() > 1e-3
