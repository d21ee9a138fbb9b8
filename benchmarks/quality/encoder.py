# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""An encoder with a classification head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from quality.methods import Setting
from quality.tasks import Task


@dataclass
class Encoder:
    """
    Attributes:
        folder: Folder or hub name of the model.
        device: Where it runs.
        overrides: Fields of its config that are to be others, for a smaller model.
    """

    folder: str
    device: str
    overrides: dict
    task_type = "SEQ_CLS"
    score = "accuracy"
    free_text = False

    def __post_init__(self):
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)

    def setting(self, steps: int) -> Setting:
        return Setting(self.task_type, steps, self.tokenizer, self.folder)

    def base(self, task: Task) -> torch.nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(
            self.folder, num_labels=len(task.choices), dtype=torch.float32, **self.overrides
        )
        return model.requires_grad_(False).to(self.device)

    def collate(self, task: Task, examples: list[dict]) -> dict[str, torch.Tensor]:
        texts = [example["text"] for example in examples]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        labels = torch.tensor([task.choices.index(example["label"]) for example in examples])
        return {**batch, "labels": labels}

    def loss(self, model: torch.nn.Module, batch: dict, ours: bool) -> torch.Tensor:
        return model(**batch).loss

    def metric(self, task: Task):
        def accuracy(logits: torch.Tensor, batch: dict) -> torch.Tensor:
            return (logits.argmax(dim=-1) == batch["labels"]).float()  # (B,)

        return accuracy

    @staticmethod
    def unpack(values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"accuracy": values}

    def losses(self, logits: torch.Tensor, batch: dict) -> torch.Tensor:
        return F.cross_entropy(logits.float(), batch["labels"], reduction="none")  # (B,)

    @torch.no_grad()
    def zero_shot(self, task: Task, examples: list[dict]) -> torch.Tensor:
        """The label whose vector lies nearest to the text's: means over tokens, of length 1."""
        model = AutoModel.from_pretrained(self.folder, dtype=torch.float32, **self.overrides).to(self.device).eval()

        def vectors(texts: list[str]) -> torch.Tensor:
            batch = self.tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
            batch = batch.to(self.device)
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]  # (B, S, d), (B, S, 1)
            return F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)  # (B, d)

        labels = vectors(list(task.choices))
        rows = torch.cat([vectors([e["text"] for e in examples[i : i + 32]]) for i in range(0, len(examples), 32)])
        right = torch.tensor([task.choices.index(example["label"]) for example in examples], device=self.device)
        return {"accuracy": ((rows @ labels.T).argmax(dim=-1) == right).float().cpu()}

    def generate(self, model: torch.nn.Module, task: Task, examples: list[dict]) -> None:
        return None  # an encoder writes no text
