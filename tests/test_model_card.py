# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The model card, and the way to a hub and back."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import torch
from hub import running_hub
from huggingface_hub import ModelCard, constants
from methods import METHODS
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_instance_prompt import IAPTConfig
from peft_instance_prompt.model_card import HOME_LABELS, write_card


ROOT = Path(__file__).parent.parent
IDS = torch.arange(3, 9)[None]


def adapted(kind: str = "iapt"):
    model = get_peft_model(tiny.causal_lm(), METHODS[kind](task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


def python_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_card_says_how_to_load(tmp_path, kind):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    config = model.peft_config["default"]
    method, home = config.peft_type.value, type(config).__module__.partition(".")[0]
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert {"peft-instance-prompt", method.lower(), "transformers"} <= set(card.data.tags)
    assert "pip install peft-instance-prompt" in card.text and f"by the method {method}" in card.text
    link = re.search(r" \(\[.*\]\(https://arxiv.org/abs/\d{4}\.\d{5}\)\)", card.text)
    assert (link is not None) == (home == "peft_instance_prompt"), "the methods of this package come from papers"
    code = python_of(card.text)
    assert code.index(f"import {home}") < code.index("from_pretrained(")
    assert "# Model Card for" in card.text  # what PEFT writes is there as well


def metadata_of(*urls: str) -> Message:
    """A wheel's metadata, with these lines of `[project.urls]`."""
    message = Message()
    for url in urls:
        message["Project-URL"] = url
    return message


@pytest.mark.parametrize(
    ("urls", "link"),
    [
        ((), "peft-instance-prompt"),
        (("Changes, https://a/changes",), "peft-instance-prompt"),
        (("Repository, https://a/b", "Homepage, https://a/?x=1,2"), "[peft-instance-prompt](https://a/?x=1,2)"),
        (("repository, https://a/b",), "[peft-instance-prompt](https://a/b)"),
    ],
)
def test_the_card_links_the_home_page_of_the_metadata_or_none(tmp_path, monkeypatch, urls, link):
    monkeypatch.setattr(metadata, "metadata", lambda name: metadata_of(*urls))
    write_card(tmp_path, IAPTConfig(task_type="CAUSAL_LM"))
    card = (tmp_path / "README.md").read_text()
    assert f"which needs {link}, and not before" in card
    assert re.findall(r"https://[^)]*", card)[1:] == re.findall(r"https://[^)]*", link), (
        "beside the paper's, none is invented"
    )


def test_a_source_tree_has_no_home_page(tmp_path, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", missing)
    write_card(tmp_path, IAPTConfig(task_type="CAUSAL_LM"))
    assert "which needs peft-instance-prompt, and" in (tmp_path / "README.md").read_text()


def test_where_addresses_go():
    """pyproject.toml says where, in lines that are valid once their # is gone; the site has a variable for each of its two."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.removeprefix("# ") == "[project.urls]")
    end = lines.index("", start)
    text = "\n".join(lines[:start] + [line.removeprefix("# ") for line in lines[start:end]] + lines[end:])
    urls = tomllib.loads(text)["project"]["urls"]
    assert {label.lower() for label in urls} <= set(HOME_LABELS) and len(urls) == 2
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"^(repo_url|site_url): !ENV (\w+)$", site, flags=re.MULTILINE) == [
        ("repo_url", "REPOSITORY_URL"),
        ("site_url", "SITE_URL"),
    ]


@pytest.mark.parametrize("name", ['a"b', "a\nb", "```\n# x", "a\\b", "<!-- /peft-instance-prompt -->", "ä/ö"])
def test_names_are_texts_of_python(tmp_path, name):
    """Whatever a folder or repository is called, the snippet names it, and the section is found again."""
    for _ in range(2):
        write_card(tmp_path, IAPTConfig(task_type="CAUSAL_LM"), name)
    card = (tmp_path / "README.md").read_text()
    (call,) = re.findall(r"from_pretrained\((.*)\)", python_of(card))
    assert ast.literal_eval(call) == name
    assert card.count("## How to load") == 1 and card.count("<!-- /peft-instance-prompt -->") == 1


def test_saving_again_keeps_one_section_and_what_others_wrote(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    first = path.read_text()
    path.write_text(first + "\nTrained on a full moon.\n")
    model.save_pretrained(tmp_path)
    assert path.read_text().count("pip install") == 1 and "full moon" in path.read_text()
    path.unlink()
    model.save_pretrained(tmp_path)
    assert path.read_text() == first


@pytest.mark.native
def test_named_adapters_and_native_saving(tmp_path):
    """Each adapter in a folder of its own has a card; so has one that transformers itself saves."""
    model = adapted()
    model.add_adapter("other", IAPTConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "peft")
    for folder in (tmp_path / "peft", tmp_path / "peft" / "other"):
        assert "pip install peft-instance-prompt" in (folder / "README.md").read_text()
    native = tiny.causal_lm()
    native.add_adapter(IAPTConfig(task_type="CAUSAL_LM"))
    native.save_pretrained(tmp_path / "native")
    assert "pip install peft-instance-prompt" in (tmp_path / "native" / "README.md").read_text()


def test_trainer(tmp_path):
    """The card of a saved model, and the one that Trainer writes over it when it pushes."""
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(adapted(), args)
    trainer.save_model()
    assert "pip install" in (tmp_path / "README.md").read_text()
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert card.count("pip install") == 1 and "# mine" in card


def test_other_methods_cards_are_left_alone(tmp_path):
    model = get_peft_model(tiny.causal_lm(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "instance" not in (tmp_path / "README.md").read_text()


def test_tasks(tmp_path):
    for task, auto_class in (("SEQ_CLS", "AutoPeftModelForSequenceClassification"), (None, "AutoPeftModel")):
        write_card(tmp_path, IAPTConfig(task_type=task))
        assert f"import {auto_class}\n" in python_of((tmp_path / "README.md").read_text())


def test_the_snippet_runs(tmp_path):
    """The card's code, with the folder's name filled in, loads what was saved."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny.causal_lm().save_pretrained(base)
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    names: dict = {}
    exec(python_of((folder / "README.md").read_text()).replace("FOLDER_OR_REPOSITORY", str(folder)), names)
    assert torch.equal(names["model"].eval()(IDS).logits, model(IDS).logits)


LOAD = """
import tiny, torch
from peft import PeftModel
import peft_instance_prompt
model, native = PeftModel.from_pretrained(tiny.causal_lm(), "someone/adapter"), tiny.causal_lm()
model.load_adapter("someone/adapter", "second")
model.load_adapter("someone/adapter", "second")
model.set_adapter("second")
native.load_adapter("someone/adapter")
for one in (model, native):
    assert torch.equal(one.eval()(torch.arange(3, 9)[None]).logits, torch.load({path!r}))
print("equal")
"""


@pytest.mark.slow
def test_to_a_hub_and_back(tmp_path, monkeypatch):
    """Push with `huggingface_hub`'s own client, twice, and load in another process with an empty cache: bit-equal."""
    path = str(tmp_path / "logits.pt")
    model = adapted()
    torch.save(model(IDS).logits.detach(), path)
    with running_hub() as hub:
        files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        own = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": files, "HF_HUB_CACHE": str(tmp_path)}
        own |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in own.items():
            monkeypatch.setattr(constants, name, value)
        # transformers keeps a client, which an earlier call of it may have made for the real hub.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        for _ in range(2):  # a card that is on the hub already is kept and brought up to date
            model.push_to_hub("someone/adapter", token="hf_x")
        files = dict(hub.repos["someone/adapter"])
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == set(files)
        env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
        env |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "new")}
        command = [sys.executable, "-W", "ignore", "-c", LOAD.format(path=path)]
        done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
        assert done.stdout.strip().endswith("equal"), done.stderr[-3000:]
        assert not [request for request in hub.unknown if "someone" in request]
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft" and "peft-instance-prompt" in card.data.tags
    assert card.text.count("pip install") == 1 and 'from_pretrained("someone/adapter")' in card.text
    assert list(hub.objects.values()) == [files["adapter_model.safetensors"]]
