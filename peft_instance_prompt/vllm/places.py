# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Where the instruction and the slots of a prompt stand, or which of its tokens are edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from . import internals
from .adapters import Adapter, make_base, no_pass
from .package import (
    PAIR_POSITIONS,
    PromptGenerator,
    Request,
    Rules,
    Source,
    arrange,
    at_separator,
    embedding_names,
    find_scope,
)
from .plan import Edited, Placed


def place(adapter: Adapter, ids: list[int], embed: Callable[[list[int]], torch.Tensor]) -> Placed | Edited:
    """Where the instruction and the slots of a prompt stand, or which of its tokens are edited.

    Args:
        adapter (`Adapter`): The adapter.
        ids (`list[int]`): The prompt's S token ids.
        embed (`Callable`): From n token ids to the input embeddings (n, e), for adapters that place slots by a vector.

    Raises:
        ValueError: The prompt has no instruction for this adapter.
    """
    config, generator, S = adapter.config, adapter.generator, len(ids)
    tokens, input_ids = torch.ones(1, S, dtype=torch.bool), torch.tensor([ids])  # (1, S) each
    rules = Rules.of(config, edits=generator.edits)
    scope = find_scope(tokens, Request(prompt_length=S), rules, input_ids)  # (1, S)
    if generator.edits:
        return Edited(adapter.key, ranges(scope[0].tolist()))
    assert isinstance(generator, PromptGenerator)  # there are two kinds
    n = int(scope.sum())
    mask, vector = scope[:, :n], None  # (1, n)
    if generator.places_by_vector:
        source = Source(input_ids[:, :n], embed(ids[:n])[None], mask, None, no_pass)
        with torch.no_grad():
            vector = generator.encode(source)  # (1, ...)
    behind, used = generator.place(mask, vector)  # (1, l) each
    vectors = torch.arange(generator.num_slots) if used is None else used[0].nonzero().flatten()  # (L,)
    start = int(config.prompt_position == "after_first")
    if config.prompt_position in PAIR_POSITIONS:
        start = int(at_separator(config, input_ids, tokens, torch.tensor([0]), torch.tensor([n - 1])))
    before_token = torch.where(behind[:, vectors], max(start, n), start)  # (1, L)
    return Placed(adapter.key, n, arrange(before_token, S).slot_index[0].tolist(), vectors.tolist())


def ranges(chosen: list[bool]) -> list[list[int]]:
    """The places that are True, as ranges `[start, stop]` in order."""
    found: list[list[int]] = []
    for at in (at for at, one in enumerate(chosen) if one):
        if found and found[-1][1] == at:
            found[-1][1] += 1
        else:
            found.append([at, at + 1])
    return found


def widen(ids: list[int], slots: list[int]) -> list[int]:
    """A prompt with its slots, as copies of its first token: slots without a vector begin so, and penalties see no new token."""
    tokens, taken = iter(ids), set(slots)
    return [ids[0] if at in taken else next(tokens) for at in range(len(ids) + len(slots))]


class BaseEmbeddings:
    """Reads rows of the base model's input embeddings from its files.

    Args:
        vllm_config: The engine's configuration.

    Raises:
        ValueError: The base model has no safetensors files.
    """

    def __init__(self, vllm_config: Any):
        base, self.dtype = vllm_config.model_config.model, vllm_config.model_config.dtype
        with internals.known_to_models(vllm_config):
            name = f"{embedding_names(make_base(vllm_config.model_config.hf_config))[0]}.weight"
        missing = {"_raise_exceptions_for_missing_entries": False}
        index = cached_file(base, SAFE_WEIGHTS_INDEX_NAME, **missing)
        file = SAFE_WEIGHTS_NAME if index is None else json.loads(Path(index).read_text())["weight_map"][name]
        found = cached_file(base, file, **missing)
        if found is None:
            raise ValueError(f"This adapter reads the embeddings of {base}, which has no safetensors files.")
        self.table = safe_open(found, framework="pt").get_slice(name)

    def rows(self, ids: list[int]) -> torch.Tensor:
        """The embeddings (n, e) of token ids."""
        return torch.cat([self.table[number : number + 1] for number in ids]).to(self.dtype)  # (n, e)
