# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The table and the small networks of IPT.

A network is two functions: one makes its parameters, one computes with them. In a mixed batch, the parameters have a dimension over
the instances in front.

Shapes: G instances; T tokens, of which the first `counts[g]` of instance g are real; w the width of their vectors; m the inner width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from .init import fan_in_uniform
from .pooling import mean_pool


Weights = Mapping[str, torch.Tensor]  # parameters by name


class Table(nn.Module):
    """A second embedding table (V, w), stored in full or as the product of a (V, r) and an (r, w) matrix.

    Args:
        vocab_size (`int`): V.
        width (`int`): w.
        rank (`int`, *optional*): r. Default: a full table.
        trainable (`bool`): Whether it is trained. Defaults to True. If False, its tensors are buffers, since PEFT trains all parameters.
    """

    weight: torch.Tensor
    up: torch.Tensor

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
        """The vectors (G, T, w) of token ids (G, T)."""
        vectors = nn.functional.embedding(ids, self.weight)  # (G, T, w) or (G, T, r)
        return vectors @ self.up if self.low_rank else vectors  # (G, T, w)


class Encoder(NamedTuple):
    """A small network from the vectors of the tokens to features of the instance.

    Attributes:
        parameters (`Callable`): From (w, m) to the initial parameters by name, with a first dimension of 1.
        run (`Callable`): From the vectors (G, T, w), the number (G,) of real tokens, and the parameters by name to features (G, 1, f). The
            parameters come without their first dimension, or with one over the instances in its place.
        features_per_unit (`int`): f / m.
    """

    parameters: Callable[[int, int], dict[str, nn.Parameter]]
    run: Callable[[torch.Tensor, torch.Tensor, Weights], torch.Tensor]
    features_per_unit: int


def counted_tokens(vectors: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which tokens are real, (G, T), as bools."""
    return torch.arange(vectors.shape[1], device=counts.device) < counts[:, None]


KERNELS = (3, 4, 5)  # tokens


def cnn_parameters(w: int, m: int) -> dict[str, nn.Parameter]:
    """Three kernels (1, size * w, m) and their biases (1, 1, m), by name."""
    kernels = {f"encoder_kernel_{size}": fan_in_uniform(1, size * w, m) for size in KERNELS}
    return kernels | {f"encoder_bias_{size}": fan_in_uniform(1, 1, m, fan_in=size * w) for size in KERNELS}


def run_cnn(vectors: torch.Tensor, counts: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The maximum over time of each of m channels, for kernels of 3, 4 and 5 tokens: (G, T, w) to (G, 1, 3m).

    A window must lie within the real tokens. An instance with fewer tokens than the kernel has one window, padded with zeros.
    """
    vectors = vectors.masked_fill(~counted_tokens(vectors, counts)[..., None], 0.0)  # (G, T, w)
    vectors = nn.functional.pad(vectors, (0, 0, 0, max(KERNELS[-1] - vectors.shape[1], 0)))  # (G, max(T, 5), w)
    maxima = []
    for size in KERNELS:
        windows = vectors.unfold(1, size, 1).mT.flatten(2)  # (G, windows, size * w)
        responses = windows @ weights[f"encoder_kernel_{size}"] + weights[f"encoder_bias_{size}"]  # (G, windows, m)
        first = torch.arange(responses.shape[1], device=counts.device)  # (windows,)
        inside = (first + size <= counts[:, None]) | (first == 0)  # (G, windows)
        maxima.append(responses.masked_fill(~inside[..., None], -torch.inf).amax(dim=1, keepdim=True))  # (G, 1, m)
    return torch.relu(torch.cat(maxima, dim=-1))  # (G, 1, 3m)


def mlp_parameters(w: int, m: int) -> dict[str, nn.Parameter]:
    """A matrix (1, w, m) and its bias (1, 1, m), by name."""
    return {"encoder_hidden": fan_in_uniform(1, w, m), "encoder_bias": fan_in_uniform(1, 1, m, fan_in=w)}


def run_mlp(vectors: torch.Tensor, counts: torch.Tensor, weights: Weights) -> torch.Tensor:
    """A hidden layer of m units on the mean over real tokens: (G, T, w) to (G, 1, m)."""
    mean = mean_pool(vectors, counted_tokens(vectors, counts))[:, None]  # (G, 1, w)
    return torch.relu(mean @ weights["encoder_hidden"] + weights["encoder_bias"])  # (G, 1, m)


def lstm_parameters(w: int, m: int) -> dict[str, nn.Parameter]:
    """The parameters of a two-layer bidirectional LSTM with m units per direction, by name; the last dimension is the 4m gates."""
    shapes: dict[str, tuple[int, ...]] = {"input_0": (1, 2, w), "input_1": (1, 2, 2 * m)}  # (1, directions, width)
    shapes |= {
        "hidden": (1, 2, 2, m),
        "bias_input": (1, 2, 2, 1),
        "bias_hidden": (1, 2, 2, 1),
    }  # (1, layers, directions, .)
    return {f"encoder_{name}": fan_in_uniform(*shape, 4 * m, fan_in=m) for name, shape in shapes.items()}


def run_lstm(vectors: torch.Tensor, counts: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The last states of both directions of a two-layer LSTM with m units each: (G, T, w) to (G, 1, 2m).

    This is a loop, since torch's LSTM needs a copy to the host to skip padding, and cannot take weights per instance.
    """
    G, T = vectors.shape[:2]
    counted = counted_tokens(vectors, counts)  # (G, T)
    counted = torch.stack([counted, counted.flip(1)], dim=1)[..., None]  # (G, 2, T, 1), in the order of reading
    for layer in range(2):
        recurrent = weights["encoder_hidden"][..., layer, :, :, :]  # (2, m, 4m) or (G, 2, m, 4m)
        bias = (weights["encoder_bias_input"] + weights["encoder_bias_hidden"])[
            ..., layer, :, :, :
        ]  # (2, 1, 4m) or with G
        # Both directions at once: one reads the tokens from the first on, one from the last.
        read = torch.stack([vectors, vectors.flip(1)], dim=1)  # (G, 2, T, w)
        read = read @ weights[f"encoder_input_{layer}"] + bias  # (G, 2, T, 4m)
        h = c = read.new_zeros(G, 2, 1, recurrent.shape[-2])  # (G, 2, 1, m)
        states = []
        for t in range(T):
            i, f, g, o = (read[:, :, t : t + 1] + h @ recurrent).chunk(4, dim=-1)  # (G, 2, 1, m) each
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            now = counted[:, :, t : t + 1]  # (G, 2, 1, 1)
            h = torch.where(now, o.sigmoid() * new_c.tanh(), h)
            c = torch.where(now, new_c, c)
            states.append(h)
        onward, backward = torch.cat(states, dim=2).unbind(1)  # (G, T, m) each
        vectors = torch.cat([onward, backward.flip(1)], dim=-1)  # (G, T, 2m)
    return h.transpose(1, 2).flatten(2)  # (G, 1, 2m)


ENCODERS = {
    "cnn": Encoder(cnn_parameters, run_cnn, features_per_unit=3),
    "mlp": Encoder(mlp_parameters, run_mlp, features_per_unit=1),
    "lstm": Encoder(lstm_parameters, run_lstm, features_per_unit=2),
}
