# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The code blocks of README and documentation, what has to be there before a fragment runs, and which blocks do not run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    if path.name != "SECURITY.md"
)
PYTHON = ("py", "python")
# The name that the pages call the base model by; the tests put a tiny one in its place.
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Languages that no test runs. Of a `diff`, both sides run, as Python.
OTHER_LANGUAGES = {
    "": "what a program printed, or a drawing",
    "sh": "commands; a test looks whether the files and targets that they name are there",
    "yaml": "a file for a command, which tests/test_commands_real_tools.py has too",
    "toml": "a proposal for other packages",
    "text": "a few lines for a file of PEFT's",
}

# Blocks that do not run, by page and first line.
LEFT_OUT = {
    "README.md: from peft import PeftModel": "needs the model of the two adapters; `test_the_readme_prints_what_it_says` runs it",
    "docs/vllm.md: from vllm import LLM, SamplingParams": "needs vLLM; tests/vllm_plugin runs this with it",
    "docs/evaluation.md: import lm_eval": "needs a task; tests/test_evaluation.py runs this on one that lies on disk",
    'docs/how_it_works.md: --8<-- "tests/mean_prompt.py:4:"': "is a file that all shared tests run",
}

# What fragments take for granted: a base model, its tokenizer, a batch with labels on the answers, and the usual imports.
COMMON = f'''
from pathlib import Path
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from peft_instance_prompt import *

TEXTS = ["Review: A gem.\\nSentiment: positive", "Review: Loud, long and empty.\\nSentiment: negative", "Review: Dull.\\nSentiment: negative"]
tokenizer = AutoTokenizer.from_pretrained("{NAME}", padding_side="left")

def fresh():
    return AutoModelForCausalLM.from_pretrained("{NAME}")

def adapted(config):
    return get_peft_model(fresh(), config)

def collator(examples):
    rows = tokenizer([example["text"] for example in examples], padding=True, return_tensors="pt")
    labels = rows["input_ids"].clone()
    labels[:, :-1] = -100
    return {{**rows, "labels": labels}}

examples = [{{"text": text}} for text in TEXTS]
inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
batch = collator(examples)
base = model = fresh()
'''

# What runs before or behind a page, or one block of it.
BEFORE = {
    "docs/quantised.md": 'batch["labels"][:, :2] = -100',
    "docs/living_together.md": """
model = adapted(IAPTConfig(task_type="CAUSAL_LM")).eval()
model.add_adapter("alice", IAPTConfig(task_type="CAUSAL_LM"))
""",
    "docs/living_together.md: from contextvars import copy_context": """
from concurrent.futures import ThreadPoolExecutor
from tiny import perturb
pool, mask = ThreadPoolExecutor(1), inputs["attention_mask"].bool()
mask[:, -2:] = False
perturb(model)
def score(batch):
    return model(**inputs).logits
""",
    "docs/scope.md: from peft_instance_prompt import instruction_scope": """
model, batch["instruction_mask"] = adapted(IAPTConfig(task_type="CAUSAL_LM")), batch["labels"] == -100
""",
    "docs/methods/idpg.md: from peft_instance_prompt import IDPGConfig": """
model, dataset = fresh(), Dataset.from_list(examples)
def encoder(texts):
    return torch.randn(len(texts), 384)
""",
    "docs/methods/dynamic_prompt.md: from peft_instance_prompt import DynamicPromptConfig, learned_position": """
base = fresh()
def train(model):
    model.train()(**batch).loss.backward()
""",
    "docs/methods/dynamic_prompt.md: config = DynamicPromptConfig(": "base = fresh()",
    "docs/methods/dynamic_prompt.md: from peft_instance_prompt import record_choices": """
model = adapted(DynamicPromptConfig.preset("adap_ins_pos", length="instance", representation="instance", task_type="CAUSAL_LM")).eval()
""",
    "docs/tools.md": 'model, test = adapted(IAPTConfig(task_type="CAUSAL_LM", activation="rational")), examples',
    "docs/tools.md: from peft_instance_prompt import learn_activations": """
from trl import SFTConfig, SFTTrainer
train = held_out = test = Dataset.from_list([{"prompt": "Review: A gem.\\nSentiment:", "completion": " positive"}] * 2)
args = SFTConfig("outputs", max_steps=1, bf16=False, use_cpu=True, report_to="none")
""",
    "docs/tools.md: from peft_instance_prompt import to_prompt_embeds": """
model, prompts = adapted(DynamicPromptConfig(task_type="CAUSAL_LM")).eval(), TEXTS
""",
    "docs/vllm.md: from peft_instance_prompt import encode_prompt_embeds, to_prompt_embeds": """
model, prompt = adapted(IDPGConfig(task_type="CAUSAL_LM", multi_layer=False)).eval(), TEXTS[0]
""",
}
AFTER = {
    "docs/living_together.md: from contextvars import copy_context": """
assert future.result().equal(model(**inputs, instruction_mask=mask).logits)
assert not future.result().equal(model(**inputs).logits)
""",
    "docs/methods/idpg.md: from peft_instance_prompt import IDPGConfig": """
trainer.args.max_steps = 1
trainer.train()
""",
    "docs/methods/dynamic_prompt.md: from peft_instance_prompt import record_choices": """
assert all(part.shape[0] == 3 for part in (record[0].positions, record[0].lengths, record[0].mixture))
""",
    "docs/tools.md: from peft_instance_prompt import to_prompt_embeds": "assert len(embeds) == len(prompts)",
}
# These are programs, and not fragments: nothing is there before they run.
WHOLE = ("docs/tour.md", "docs/upstream.md")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: the number of its first line, its language, and its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def key(self) -> str:
        """The page, and the first line that says something: comments and docstrings of one line do not."""
        lines = [line for line in self.text.splitlines() if line.strip() and not line.startswith(("#", '"""'))]
        return f"{self.page}: {lines[0] if lines else ''}"

    def side(self, sign: str) -> str:
        """The text that a diff begins from (`-`) or arrives at (`+`)."""
        return "\n".join(line[2:] for line in self.text.splitlines() if line[:1] in (sign, " ", ""))


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(page, text[: match.start(3)].count("\n") + 1, match[2], match[3]) for match in found]


ALL = [block for page in PAGES for block in blocks(page)]
