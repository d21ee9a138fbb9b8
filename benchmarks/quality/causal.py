# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""A causal model that writes the label, or the answer, behind the text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from quality.methods import Setting
from quality.tasks import Task


PROMPT = "{text}\nAnswer:"


@dataclass
class Causal:
    """
    `exact`: the whole answer and its end are each the likeliest token given what stands before, so that greedy decoding writes
    just this. `accuracy`: among the first tokens of the task's labels, that of the right one is the likeliest.

    Attributes:
        folder: Folder or hub name of the model.
        device: Where it runs.
        overrides: Fields of its config that are to be others, for a smaller model.
    """

    folder: str
    device: str
    overrides: dict
    task_type = "CAUSAL_LM"
    score = "exact"
    free_text = True

    def __post_init__(self):
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def setting(self, steps: int) -> Setting:
        return Setting(self.task_type, steps, self.tokenizer, self.folder)

    def base(self, task: Task) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **self.overrides)
        return model.requires_grad_(False).to(self.device)

    def answer(self, text: str) -> list[int]:
        return self.tokenizer(" " + text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]

    def collate(self, task: Task, examples: list[dict]) -> dict[str, torch.Tensor]:
        prompts = self.tokenizer([PROMPT.format(text=example["text"]) for example in examples])["input_ids"]
        rows = [(prompt, self.answer(example["label"])) for prompt, example in zip(prompts, examples)]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        pad = [width - len(prompt) - len(answer) for prompt, answer in rows]
        fill = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([[fill] * n + p + a for n, (p, a) in zip(pad, rows)]),
            "attention_mask": torch.tensor([[0] * n + [1] * (width - n) for n in pad]),
            "labels": torch.tensor([[-100] * (n + len(p)) + a for n, (p, a) in zip(pad, rows)]),
        }

    def loss(self, model: torch.nn.Module, batch: dict, ours: bool) -> torch.Tensor:
        # Rows end together, so the head has to look at the last columns only.
        labels = batch["labels"]
        K = int((labels != -100).any(dim=0).sum())
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if ours:
            inputs["instruction_mask"] = (labels == -100) & batch["attention_mask"].bool()
        logits = model(**inputs, use_cache=False, logits_to_keep=K + 1).logits[:, -K - 1 : -1]  # (B, K, V)
        return F.cross_entropy(logits.transpose(1, 2).float(), labels[:, -K:])

    def metric(self, task: Task):
        """`exact + 2 * accuracy`, for `unpack`."""
        first = torch.tensor([self.answer(label)[0] for label in task.labels], device=self.device)
        if len(set(first.tolist())) < len(task.labels):
            raise ValueError(f"The labels {task.labels} do not differ in their first token.")

        def packed(logits: torch.Tensor, batch: dict) -> torch.Tensor:
            labels, guesses = batch["labels"][:, 1:], logits[:, -batch["labels"].shape[1] : -1]  # (B, S - 1), (.., V)
            asked = labels != -100
            exact = ((guesses.argmax(dim=-1) == labels) | ~asked).all(dim=1)  # (B,)
            if not len(first):
                return exact.float()
            where = asked.int().argmax(dim=1)  # (B,), the column that predicts the first token of the answer
            rows = torch.arange(len(where), device=where.device)
            among = guesses[rows, where][:, first].argmax(dim=-1)  # (B,)
            return exact.float() + 2 * (first[among] == labels[rows, where]).float()

        return packed

    @staticmethod
    def unpack(values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"exact": values % 2, "accuracy": values // 2}

    def losses(self, logits: torch.Tensor, batch: dict) -> torch.Tensor:
        """The mean over the tokens of each row's answer."""
        labels = batch["labels"][:, 1:]
        logits = logits[:, -batch["labels"].shape[1] : -1].float()  # a prompt of PEFT's stands before them
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, S - 1)
        return losses.sum(dim=1) / (labels != -100).sum(dim=1)  # (B,)

    @torch.no_grad()
    def zero_shot(self, task: Task, examples: list[dict]) -> dict[str, torch.Tensor]:
        """The plain model with the task's question behind the text."""
        model = self.base(task).eval()
        asked = [{**example, "text": f"{example['text']}\n{task.question}"} for example in examples]
        values, metric = [], self.metric(task)
        for start in range(0, len(asked), 16):
            batch = {k: v.to(self.device) for k, v in self.collate(task, asked[start : start + 16]).items()}
            values.append(metric(model(**batch).logits, batch).cpu())
        return self.unpack(torch.cat(values))

    @torch.no_grad()
    def generate(self, model: torch.nn.Module, task: Task, examples: list[dict]) -> dict[str, torch.Tensor] | None:
        """Exact match and F1 of what greedy decoding writes, against the best of the right answers. Of free text only."""
        if task.labels:
            return None
        match, f1 = [], []
        for start in range(0, len(examples), 16):
            rows = examples[start : start + 16]
            inputs = self.tokenizer([PROMPT.format(text=e["text"]) for e in rows], padding=True, return_tensors="pt")
            output = model.generate(
                **{k: inputs[k].to(self.device) for k in ("input_ids", "attention_mask")},
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            texts = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for text, example in zip(texts, rows):
                written = text.strip().lower()
                match.append(float(written in example["answers"]))
                f1.append(max(overlap_f1(written, answer) for answer in example["answers"]))
        return {"match": torch.tensor(match), "f1": torch.tensor(f1)}


def overlap_f1(written: str, answer: str) -> float:
    """F1 of the words that both have, as SQuAD counts it."""
    ours, theirs = Counter(written.split()), Counter(answer.split())
    common = sum((ours & theirs).values())
    return 2 * common / (sum(ours.values()) + sum(theirs.values())) if common else 0.0
