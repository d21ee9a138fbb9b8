import os

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_instance_prompt import IAPTConfig  # PEFT knows it now


name = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

torch.manual_seed(0)
config = IAPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
model = get_peft_model(base, config)
model.print_trainable_parameters()

reviews = [
    ("A gem, from the first frame to the last.", " positive"),
    ("I want my two hours back.", " negative"),
    ("The cast is a delight.", " positive"),
    ("Loud, long and empty.", " negative"),
    ("Rarely has a debut been this sure of itself.", " positive"),
    ("The jokes die one by one.", " negative"),
]
texts = [f"Review: {text}\nSentiment:{label}" for text, label in reviews]
batch = tokenizer(texts, padding=True, return_tensors="pt")
batch["labels"] = batch["input_ids"].clone()
batch["labels"][:, :-1] = -100  # the last token is the answer

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-2)
for step in range(21):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

folder = "reviews-iapt"
model.save_pretrained(folder)
base = model.unload()
model = PeftModel.from_pretrained(base, folder, adapter_name="reviews")
model.eval()

names = ["reviews", "__base__"]  # the second row has no adapter
texts = ["Review: A warm and clever film.\nSentiment:"] * 2
batch = tokenizer(texts, padding=True, return_tensors="pt")
output = model.generate(**batch, max_new_tokens=1, adapter_names=names)
for adapter, text in zip(names, tokenizer.batch_decode(output[:, -1:])):
    print(f"adapter {adapter}: {text!r}")
