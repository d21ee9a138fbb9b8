# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
By which factor of its down-projection does one learning rate suit a generator at every width?

    python benchmarks/down_factor.py
    python benchmarks/down_factor.py --widths 960 --bottleneck 64 --rates 0.003,0.01

IAPT's generator alone, without a model around it. A text is 24 states of width d: a topic and nuisances along directions whose sizes fall
with a power law, and noise. What is generated is read as a layer reads its input, by a matrix whose outputs are of size 1 at every width,
and is to say a function of the topic. AdamW, 300 steps of 8 texts, a warm-up of a tenth, then down to zero. Prints the loss of the last 60.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn.functional import gelu

from peft_instance_prompt.nn.init import fan_in_uniform
from peft_instance_prompt.nn.pooling import attention_pool, rms_norm


TOPIC, NUISANCE, READ, TOKENS, BATCH = 16, 64, 32, 24, 8


def power_law(count: int, width: int) -> torch.Tensor:
    """Directions (count, d) whose sizes fall with the root of their number."""
    return torch.randn(count, width) * torch.arange(1, count + 1).pow(-0.5)[:, None]


def loss_of(width: int, factor: float, rate: float, m: int, slots: int = 4, steps: int = 300, seed: int = 0) -> float:
    """The mean loss of the last fifth of a training; infinite if it overflows."""
    torch.manual_seed(seed)
    topics, nuisances = power_law(TOPIC, width), power_law(NUISANCE, width)
    wanted = 1.5 * torch.randn(TOPIC, READ) * TOPIC**-0.5
    reader = torch.randn(width, READ) * width**-0.5
    down, pool = fan_in_uniform(width, m, factor=factor), fan_in_uniform(m, slots)
    up, slot = nn.Parameter(torch.zeros(m, width)), nn.Parameter(torch.randn(slots, m))
    weights = [down, pool, up, slot]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, 10 * (i + 1) / steps) * (1 - i / steps))
    mask, last = torch.ones(BATCH, TOKENS, dtype=torch.bool), []
    for step in range(steps):
        topic = torch.randn(BATCH, 1, TOPIC)
        states = (topic + 0.7 * torch.randn(BATCH, TOKENS, TOPIC)) @ topics  # (B, n, d)
        states = states + torch.randn(BATCH, TOKENS, NUISANCE) @ nuisances + 0.3 * torch.randn_like(states)
        z = rms_norm(states) @ (down * factor)  # (B, n, m)
        prompts = gelu(attention_pool(z, z @ pool, mask) + slot) @ up  # (B, l, d)
        loss = (prompts.mean(dim=1) @ reader - torch.tanh(topic[:, 0] @ wanted)).square().mean()
        if not loss.isfinite():
            return float("inf")
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step >= 0.8 * steps:
            last.append(loss.item())
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,256,960", help="(default: %(default)s)")
    parser.add_argument("--bottleneck", type=int, default=16, help="m (default: %(default)s)")
    parser.add_argument("--rates", default="0.003,0.01,0.03,0.1", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="how many (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    m, rates = args.bottleneck, [float(rate) for rate in args.rates.split(",")]
    print("| d | factor | " + " | ".join(f"{rate:g}" for rate in rates) + " |\n" + "|---" * (2 + len(rates)) + "|")
    for width in map(int, args.widths.split(",")):
        rules = {
            "1": 1.0,
            "root of m / d": (m / width) ** 0.5,
            "0.1": 0.1,
            "2.4 m / d": 2.4 * m / width,
            "m / d": m / width,
        }
        for name, factor in rules.items():
            losses = [
                sum(loss_of(width, factor, rate, m, seed=s) for s in range(args.seeds)) / args.seeds for rate in rates
            ]
            row = [f"{width}", f"{name} = {factor:.3g}", *(f"{loss:.3f}" for loss in losses)]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
