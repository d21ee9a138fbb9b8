import os

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_instance_prompt import IAPTConfig  # also teaches PEFT to load such adapters


name = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

torch.manual_seed(0)
model = get_peft_model(model, IAPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
model.print_trainable_parameters()

reviews = [
    ("A gem, from the first frame to the last.", " positive"),
    ("I want my two hours back.", " negative"),
    ("The cast is a delight.", " positive"),
    ("Loud, long and empty.", " negative"),
    ("Rarely has a debut been this sure of itself.", " positive"),
    ("The jokes die one by one.", " negative"),
]
batch = tokenizer([f"Review: {text}\nSentiment:{label}" for text, label in reviews], padding=True, return_tensors="pt")
batch["labels"] = batch["input_ids"].clone()
batch["labels"][:, :-1] = -100  # the label is the last token; what stands before it is the instruction

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
for step in range(21):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

model.save_pretrained("reviews-iapt")
model = PeftModel.from_pretrained(model.unload(), "reviews-iapt", adapter_name="reviews").eval()

prompts = tokenizer(["Review: A warm and clever film.\nSentiment:"] * 2, padding=True, return_tensors="pt")
output = model.generate(**prompts, max_new_tokens=1, do_sample=False, adapter_names=["reviews", "__base__"])
for adapter, text in zip(("reviews", "none"), tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :])):
    print(f"adapter {adapter}: {text!r}")
