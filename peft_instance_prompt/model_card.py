# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A section in an adapter's model card that says how to load it: without our import, PEFT raises a bare `KeyError: 'IAPT'`.

PEFT offers no way to add to the card that it writes, and transformers' `push_to_hub` replaces that card with one of its own. So
[`teach_peft`] extends two methods of `PeftModel`; cards of other packages' adapters stay as they are.
"""

from __future__ import annotations

import functools
import json
import os
import re
from importlib import metadata
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft.config import PeftConfig
from peft.peft_model import PeftModel


PACKAGE = "peft-instance-prompt"
HOME_LABELS = ("homepage", "repository", "documentation")  # of `[project.urls]`, the first that is there

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}

SECTION = """<!-- {package} -->
## How to load this adapter

A soft prompt that is computed from each input, by the method {method}{paper}. PEFT knows the method when
`{home}` has been imported, which needs {link}, and not before:

```bash
pip install {package}
```

```python
import {home}  # before loading: it adds {method} to PEFT
from peft import {auto_class}

model = {auto_class}.from_pretrained({name})
```
<!-- /{package} -->"""


def as_literal(name: str) -> str:
    """A name as a Python string in which no character can end the code block or the section that it stands in."""
    return json.dumps(name).replace("<", "\\u003c").replace("`", "\\u0060")


def home_page() -> str | None:
    """The address that the installed package's metadata gives, from `[project.urls]` of pyproject.toml; None if it gives none."""
    try:
        entries = metadata.metadata(PACKAGE).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        entries = []
    urls = {label.strip().lower(): url.strip() for label, _, url in (entry.partition(",") for entry in entries)}
    return next((urls[label] for label in HOME_LABELS if label in urls), None)


def write_card(folder: str | os.PathLike, config: PeftConfig, name: str = "FOLDER_OR_REPOSITORY") -> None:
    """Write into the `README.md` of an adapter's folder how to load it; the rest of the card stays.

    Args:
        folder (`str`): The folder. A missing card is made.
        config (`PeftConfig`): The adapter's config.
        name (`str`): The folder or repository that the card's example loads. Defaults to `"FOLDER_OR_REPOSITORY"`.
    """
    path = Path(folder, "README.md")
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{ModelCardData(library_name='peft')}\n---\n")
    method = getattr(config.peft_type, "value", config.peft_type)
    title, number = config.paper or (None, None)
    home, url = config.import_first, home_page()
    card.data["tags"] = sorted(
        {*(card.data.tags or []), PACKAGE, method.lower(), *([f"arxiv:{number}"] if number else [])}
    )
    section = SECTION.format(
        package=PACKAGE,
        link=f"[{PACKAGE}]({url})" if url else PACKAGE,
        home=home,
        method=method,
        paper=f" ([{title}](https://arxiv.org/abs/{number}))" if number else "",
        auto_class=AUTO_CLASSES.get(getattr(config.task_type, "value", config.task_type), "AutoPeftModel"),
        name=as_literal(name),
    )
    other = re.sub(f"<!-- {PACKAGE} -->.*?<!-- /{PACKAGE} -->\n*", "", card.text, flags=re.DOTALL).lstrip("\n")
    card.text = f"\n{section}\n\n{other}"
    card.save(path)


def teach_peft(config_cls: type) -> None:
    """Make `PeftModel` keep the section of [`write_card`] in the cards of adapters whose config is a `config_cls`."""
    write, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files

    def own_config(model: PeftModel) -> PeftConfig | None:
        return next((config for config in model.peft_config.values() if isinstance(config, config_cls)), None)

    @functools.wraps(write)
    def create_or_update_model_card(self, output_dir):
        write(self, output_dir)
        if config := own_config(self):
            write_card(output_dir, config)

    @functools.wraps(upload)
    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        if config := own_config(self):
            write(self, working_dir)  # over transformers' card, which calls the adapter a transformers model
            write_card(working_dir, config, repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel._upload_modified_files = _upload_modified_files
