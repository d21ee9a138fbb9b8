# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The table and the small networks of IPT. Shapes: B rows, T tokens of which the first few of each row count, width w."""

from __future__ import annotations

import math

import torch
from torch import nn

from ...nn.pooling import mean_pool


class Table(nn.Module):
    """A second embedding table (V, w), in full or as the product of a (V, r) and an (r, w) matrix.

    Args:
        vocab_size (`int`): V.
        width (`int`): w.
        rank (`int`, *optional*): r. Default: a full table.
        trainable (`bool`): Whether it is trained. If not, its tensors are buffers: PEFT trains all of an adapter's parameters.
    """

    def __init__(self, vocab_size: int, width: int, rank: int | None = None, trainable: bool = True):
        super().__init__()
        tensors = {"weight": torch.empty(vocab_size, rank or width).uniform_(-0.5, 0.5)}
        if rank is not None:
            tensors["up"] = torch.randn(rank, width) / math.sqrt(rank)
        for name, tensor in tensors.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.low_rank = rank is not None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = nn.functional.embedding(ids, self.weight)  # (B, T, w) or (B, T, r)
        return found @ self.up if self.low_rank else found  # (B, T, w)


class TextCNN(nn.Module):
    """For each kernel of 3, 4 and 5 tokens and each of m channels the maximum over time: (B, T, w) to (B, 3m).

    Only windows that lie within a row's tokens count; a row with fewer tokens than a kernel has one window, filled up with
    zeros.
    """

    def __init__(self, width: int, m: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(width, m, size) for size in (3, 4, 5))
        self.num_features = 3 * m

    def forward(self, vectors: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        counted = torch.arange(vectors.shape[1], device=counts.device) < counts[:, None]  # (B, T)
        vectors = vectors.masked_fill(~counted[..., None], 0.0).mT  # (B, w, T)
        vectors = nn.functional.pad(vectors, (0, max(5 - vectors.shape[-1], 0)))  # (B, w, max(T, 5))
        maxima = []
        for convolution in self.convolutions:
            responses = convolution(vectors)  # (B, m, windows)
            start = torch.arange(responses.shape[-1], device=counts.device)
            inside = (start + convolution.kernel_size[0] <= counts[:, None]) | (start == 0)  # (B, windows)
            maxima.append(responses.masked_fill(~inside[:, None], -torch.inf).amax(dim=-1))  # (B, m)
        return torch.relu(torch.cat(maxima, dim=-1))  # (B, 3m)


class MLP(nn.Module):
    """A hidden layer of m units on the mean over tokens: (B, T, w) to (B, m)."""

    def __init__(self, width: int, m: int):
        super().__init__()
        self.hidden = nn.Linear(width, m)
        self.num_features = m

    def forward(self, vectors: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        counted = torch.arange(vectors.shape[1], device=counts.device) < counts[:, None]  # (B, T)
        return torch.relu(self.hidden(mean_pool(vectors, counted)))  # (B, m)


class BiLSTM(nn.Module):
    """The last states of both directions of a two-layer LSTM with m units each: (B, T, w) to (B, 2m).

    Written as a loop, since torch's own can neither skip padding without a detour over the host nor be batched by vmap.
    """

    def __init__(self, width: int, m: int):
        super().__init__()
        self.forwards = nn.ModuleList(nn.LSTMCell(size, m) for size in (width, 2 * m))
        self.backwards = nn.ModuleList(nn.LSTMCell(size, m) for size in (width, 2 * m))
        self.num_features = 2 * m

    def forward(self, vectors: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        for pair in zip(self.forwards, self.backwards):
            runs = [self._run(cell, vectors, counts, back) for cell, back in zip(pair, (False, True))]
            vectors = torch.cat([states for states, _ in runs], dim=-1)  # (B, T, 2m)
        return torch.cat([last for _, last in runs], dim=-1)  # (B, 2m)

    @staticmethod
    def _run(
        cell: nn.LSTMCell, vectors: torch.Tensor, counts: torch.Tensor, back: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states (B, T, m) of one direction and the one that it ends with (B, m)."""
        T = vectors.shape[1]
        from_input = nn.functional.linear(vectors, cell.weight_ih, cell.bias_ih + cell.bias_hh)  # (B, T, 4m)
        h = c = torch.zeros_like(from_input[:, 0, : cell.hidden_size])  # (B, m)
        states = [h] * T
        for t in reversed(range(T)) if back else range(T):
            i, f, g, o = (from_input[:, t] + h @ cell.weight_hh.T).chunk(4, dim=-1)  # (B, m)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            counted = (t < counts)[:, None]  # (B, 1)
            h = torch.where(counted, o.sigmoid() * new_c.tanh(), h)
            c = torch.where(counted, new_c, c)
            states[t] = h
        return torch.stack(states, dim=1), h


ENCODERS = {"cnn": TextCNN, "mlp": MLP, "lstm": BiLSTM}
