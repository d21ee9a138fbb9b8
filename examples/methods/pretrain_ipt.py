# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
Pretrain the table, and the small network, of IPT: tell the domain of a sentence from what is looked up for its tokens.

    python examples/methods/pretrain_ipt.py --encoder cnn
    python examples/methods/pretrain_ipt.py --encoder cnn --short     # does it run?

takes a minute or two on two CPU cores and writes a file that `IPTConfig(init="pretrained", init_file=...)` takes, or
`train.py --method ipt --init-file`. The sentences are those of four domains (film reviews, product reviews, editorials, tweets), from a
PyPI package, and the vocabulary is that of SmolLM2.

In the paper this is the "knowledge-enhanced" start, on 13 domains. Its released code never updates the table there: it is left
out of the optimizer, and what is saved as pretrained is the random start. Here the table is trained, and the file without
`--encoder` (one linear layer on the mean of what is looked up) is for `strategy="lookup"`.
"""

import argparse
import random
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

import one_line  # first: the other imports may fail

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import trange
from transformers import AutoConfig, AutoTokenizer

from peft_instance_prompt.nn.encoders import ENCODERS, Table
from peft_instance_prompt.nn.pooling import mean_pool, rms_norm


# The loaders of model and sentences.
sys.path.append(str(Path(__file__).resolve().parents[2] / "realdata"))

from smollm2 import smollm2_folder
from vader import FILES, load_sentences


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--encoder", choices=list(ENCODERS), help="the network (default: none, for strategy='lookup')")
parser.add_argument("--rank", type=int, default=64, help="table_rank of the config (default: %(default)s)")
parser.add_argument("--bottleneck-dim", type=int, default=16, help="as in the config (default: %(default)s)")
parser.add_argument("--steps", type=int, default=300, help="steps of 32 sentences (default: %(default)s)")
parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (default: %(default)s)")
parser.add_argument("--output", default="outputs/ipt-pretrained", help="folder for the file (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
parser.add_argument("--short", action="store_true", help="does it run? 10 steps and 50 held-out sentences")

N_TEST = 500


class DomainClassifier(nn.Module):
    """What the generator of IPT does up to the encoder's features, and a linear layer on them."""

    def __init__(self, vocab_size, width, args):
        super().__init__()
        self.table = Table(vocab_size, width, args.rank)
        self.encoder = None if args.encoder is None else ENCODERS[args.encoder]
        num_features = width
        if self.encoder is not None:
            # Under the names that they have in the generator.
            for name, parameter in self.encoder.parameters(width, args.bottleneck_dim).items():
                self.register_parameter(name, parameter)
            num_features = self.encoder.features_per_unit * args.bottleneck_dim
        self.head = nn.Linear(num_features, len(FILES))

    def forward(self, ids, mask):
        vectors = rms_norm(self.table(ids))  # (B, S, w), normalised as the generator does
        if self.encoder is None:
            return self.head(mean_pool(vectors, mask))  # (B, domains)
        weights = {name: parameter[0] for name, parameter in self.named_parameters(recurse=False)}
        features = self.encoder.run(vectors, mask.sum(dim=1), weights)  # (B, 1, f)
        return self.head(features[:, 0])  # (B, domains)


def main(args):
    torch.manual_seed(args.seed)
    folder = smollm2_folder()
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sentences = [(text, label) for label, domain in enumerate(FILES) for text, _ in load_sentences(domain)]
    rng = random.Random(args.seed)
    rng.shuffle(sentences)
    test, train = sentences[: args.n_test], sentences[N_TEST:]
    model = DomainClassifier(config.vocab_size, config.hidden_size, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    def tensors(part):
        # Padded on the right: what stands behind a row's tokens is not read.
        batch = tokenizer(
            [text for text, _ in part],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=100,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"].bool(), torch.tensor([label for _, label in part])

    def accuracy():
        with torch.inference_mode():
            return sum(
                int((model(ids, mask).argmax(-1) == labels).sum())
                for ids, mask, labels in (tensors(test[i : i + 50]) for i in range(0, len(test), 50))
            ) / len(test)

    print(
        f"accuracy on {len(test)} held-out sentences of {len(FILES)} domains at the start: {accuracy():.3f}",
        flush=True,
    )
    start = model.table.weight.detach().clone()
    bar = trange(args.steps)
    for step in bar:
        ids, mask, labels = tensors(rng.choices(train, k=32))
        loss = nn.functional.cross_entropy(model(ids, mask), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            bar.write(f"step {step + 1}: loss {loss:.3f}, accuracy {accuracy():.3f}")
    moved = (model.table.weight.detach() - start).abs().mean()
    print(f"accuracy {accuracy():.3f}; the table has moved by {moved:.4f} on average")

    file = Path(args.output, f"{args.encoder or 'lookup'}.safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: x.contiguous() for name, x in model.state_dict().items() if not name.startswith("head.")}
    save_file(kept, file)
    print(f"{sum(x.numel() for x in kept.values()):,} parameters in {file}")


if __name__ == "__main__":
    args = parser.parse_args()
    args.n_test = N_TEST
    if args.short:
        args.steps, args.n_test = min(args.steps, 10), 50
        one_line.short_form(args.steps)
    main(args)
