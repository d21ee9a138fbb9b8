# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""What the documentation shows is what the tests and examples run, and every block of Python runs."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from pages import (
    AFTER,
    ALL,
    BEFORE,
    COMMON,
    LEFT_OUT,
    NAME,
    OTHER_LANGUAGES,
    PAGES,
    PYTHON,
    ROOT,
    WHOLE,
    Block,
    blocks,
)
from peft import PeftConfig, get_peft_model
from tiny import causal_lm, encoder
from tokenizers import Tokenizer, models, pre_tokenizers

from peft_instance_prompt import InstancePromptConfig
from smollm2 import smollm2_folder


# -------------------------------------------------------------------------------------------------- blocks of Python


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights, and a tokenizer that has a token for each word of the pages' code."""
    text = "".join(block.text for block in ALL) + COMMON
    words = ["<pad>", "<s>", "</s>", "<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
    }
    folder = tmp_path_factory.mktemp("base")
    tf.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    # As deep as some page asks for, and as wide as blocks of 4-bit weights.
    sizes = {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    causal_lm(vocab_size=len(words), **sizes).save_pretrained(folder)
    return folder


def attach(config: PeftConfig, folder: Path) -> None:
    """Put a config that a page shows, and does nothing with, into a model."""
    if config.task_type == "SEQ_CLS":
        base = encoder(auto=tf.AutoModelForSequenceClassification)
        base.name_or_path = str(folder)  # where its tokenizer is
    else:
        base = tf.AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, config)


def run(code: str, block: Block, names: dict[str, Any], folder: Path) -> None:
    """Run code as if it stood in its page; what is wrong names the page's line."""
    code = "\n" * (block.line - 1) + code.replace(NAME, str(folder))
    exec(compile(code, str(ROOT / block.page), "exec"), names)


def names_of(page: str, folder: Path) -> dict[str, Any]:
    """The names that are there when a page begins."""
    names: dict[str, Any] = {"__name__": "page"}
    if page not in WHOLE:
        exec(COMMON.replace(NAME, str(folder)), names)
        exec(BEFORE.get(page, ""), names)
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", sorted({block.page for block in ALL if block.language in PYTHON}))
def test_blocks_of_a_page_run(page: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block, in one namespace, with a tiny model under the name of the real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", str(tiny_folder))
    names = names_of(page, tiny_folder)
    for block in blocks(page):
        if block.language not in PYTHON or block.key in LEFT_OUT:
            continue
        exec(BEFORE.get(block.key, ""), names)
        before = names.get("config")
        run(block.text, block, names, tiny_folder)
        config = names.get("config")
        if config is not before and isinstance(config, InstancePromptConfig) and "get_peft_model" not in block.text:
            attach(config, tiny_folder)
        exec(AFTER.get(block.key, ""), names)


DIFFS = [block for block in ALL if block.language == "diff"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sign", ["-", "+"])
@pytest.mark.parametrize("block", DIFFS, ids=lambda block: f"{block.page}:{block.line}")
def test_both_sides_of_a_diff_run(block: Block, sign: str, tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    exec(COMMON.replace(NAME, str(tiny_folder)), names)
    run(block.side(sign), block, names, tiny_folder)


def test_every_block_runs_or_is_left_out_with_a_reason() -> None:
    keys = {block.key for block in ALL if block.language in PYTHON}
    pages = {block.page for block in ALL}
    assert {block.language for block in ALL} <= {*PYTHON, "diff", *OTHER_LANGUAGES}
    assert set(LEFT_OUT) <= keys
    assert {*BEFORE, *AFTER} <= keys | pages


def test_commands_name_files_and_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for block in ALL:
        if block.language == "sh":
            for words in re.findall(r"^make ([a-z -]+)", block.text, flags=re.MULTILINE):
                assert set(words.split()) <= targets, f"{block.page}:{block.line}: make {words}"
            for file in re.findall(r"\b(?:examples|benchmarks|tests|docs)/[\w/.]+\w", block.text):
                assert (ROOT / file).exists(), f"{block.page}:{block.line}: {file}"


@pytest.mark.slow
def test_the_readme_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real model: what stands behind the block of Python is what it prints."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    code, printed = next((b, p) for b, p in zip(ALL, ALL[1:]) if b.page == "README.md" and b.language == "py")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run(code.text, code, {"__name__": "page"}, smollm2_folder())
    assert said.getvalue() == printed.text


# ------------------------------------------------------------------------------------------------- what a page shows

WIDTH = 76  # columns of code that a page shows beside its navigation
AS_IT_IS = "docs/how_it_works.md"  # shows a file, and a drawing of the engine


def test_code_is_no_wider_than_its_page() -> None:
    pages = [block for block in ALL if block.page.startswith(("README", "docs/")) and block.page != AS_IT_IS]
    assert [f"{block.page}:{block.line}" for block in pages if max(map(len, block.text.splitlines())) > WIDTH] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(("README", "docs/")) and page != AS_IT_IS])
def test_each_column_of_a_table_has_a_name(page: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    heads = [head for head, rule in zip(lines, lines[1:]) if re.fullmatch(r"(\|-{3,})+\|", rule)]
    assert [head for head in heads if "" in [cell.strip() for cell in head.strip("|").split("|")]] == []


# ---------------------------------------------------------------------------------------------------- files and words


def test_the_tour_shows_a_file_as_it_is() -> None:
    lines = (ROOT / "examples/quickstart.py").read_text(encoding="utf-8").splitlines(keepends=True)
    code = "".join(line for line in lines if not line.startswith("# SPDX-")).lstrip()
    assert f"```py\n{code}```\n" in (ROOT / "docs/tour.md").read_text(encoding="utf-8")
