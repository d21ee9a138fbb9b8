# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0
"""
What dynamic prompting costs beyond a fixed prompt: its insertion into the text, forward and backward, against the loop over
rows and candidates that the released code has.

    python benchmarks/dp_reference.py

Both choose position and length of each row's prompt, from the same weights, and must give the same embeddings and gradients.
"""

import argparse
import statistics
import time

import torch

from peft_instance_prompt import slots
from peft_instance_prompt.nn.straight_through import attach_position_gradient, length_gate


def loop(weights, lengths, prompts, tokens, start, end):
    """`out[b] = sum_c w_c C_c` over the candidates c of row b: each place for the split, and of these each length."""
    l, rows = prompts.shape[1], []
    for b in range(len(tokens)):
        before, text, behind = tokens[b, : start[b]], tokens[b, start[b] : end[b]], tokens[b, end[b] :]
        row = 0
        for i in range(l + 1) if lengths is not None else [l]:
            prompt = torch.cat([prompts[b, :i], torch.zeros_like(prompts[b, i:])])  # (l, d)
            for j in range(l + 1):
                candidate = torch.cat([before, prompt[: l - j], text, prompt[l - j :], behind])  # (S + l, d)
                row = row + (weights[b, j] if lengths is None else weights[b, j] * lengths[b, i]) * candidate
        rows.append(row)
    return torch.stack(rows)  # (B, S + l, d)


def at_once(weights, lengths, prompts, tokens, start, end):
    """The same, of which only the chosen arrangement is built."""
    l = prompts.shape[1]
    gated = prompts if lengths is None else prompts * length_gate(lengths)[:, :, None]  # (B, l, d)
    behind = torch.arange(l) >= l - weights.argmax(dim=-1)[:, None]  # (B, l)
    layout = slots.arrange(torch.where(behind, end[:, None], start[:, None]), tokens.shape[1])
    out = slots.insert(tokens, gated, layout)  # (B, S + l, d)
    return attach_position_gradient(out, weights, gated.detach(), tokens, start, end)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=20)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    B, S, l, d = args.rows, args.tokens, args.prompt, args.width
    tokens, seen = torch.randn(B, S, d), torch.randn(B, S + l, d)
    prompts = torch.randn(B, l, d, requires_grad=True)
    start, end = torch.ones(B, dtype=torch.long), torch.randint(S // 2, S, (B,))
    scores = [torch.randn(B, l + 1, requires_grad=True) for _ in range(2)]
    for choices in ("position", "position and length"):
        results, times = {}, {"loop": [], "at once": []}
        for _ in range(args.repeats + 1):
            for name, function in (("loop", loop), ("at once", at_once)):
                learned = scores if "length" in choices else scores[:1]
                soft = [score.softmax(dim=-1) for score in learned]
                hard = [torch.nn.functional.one_hot(p.argmax(dim=-1), l + 1) + p - p.detach() for p in soft]
                began = time.perf_counter()
                out = function(*hard, *[None] * (2 - len(hard)), prompts, tokens, start, end)
                grads = torch.autograd.grad(out, [prompts, *learned], seen)
                times[name].append(time.perf_counter() - began)
                results[name] = [out, *grads]
        for ours, reference in zip(results["at once"], results["loop"]):
            torch.testing.assert_close(ours, reference, atol=1e-3 * float(reference.abs().max()), rtol=0)
        ratio = statistics.median(a / b for a, b in zip(times["loop"][1:], times["at once"][1:]))
        medians = ", ".join(f"{name} {1000 * statistics.median(values[1:]):.1f} ms" for name, values in times.items())
        print(f"{choices}: {medians}: {ratio:.1f} x")


if __name__ == "__main__":
    main()
