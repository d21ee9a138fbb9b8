# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The front end: finds the adapter that a request names, places its slots, and makes every refusal.

Whatever reaches the engine can be served. An error in a worker ends the whole engine, so everything is checked here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..adapter_files import read_kind
from ..attaching import embedding_names
from ..config import PAIR_POSITIONS
from ..engine.layout import arrange
from ..engine.place import at_separator
from ..engine.request import Request
from ..engine.scope import Rules, find_scope
from ..engine.stack import StackInfo
from ..generator import Source
from . import internals
from .adapters import Adapter, describe_base, is_own, make_base, no_pass, read_adapter
from .plan import Placed


# Calls of the engine core, each its method and arguments: a generator, since asynchronous and synchronous code makes them.
Steps = Generator[tuple, Any, Any]


class Resident(NamedTuple):
    """An adapter that the engine has.

    Attributes:
        name (`str`): The name that requests use.
        path (`str`): The folder or repository that it was loaded from.
        adapter (`Adapter`): The adapter; without weights, unless the front end needs them to place slots.
    """

    name: str
    path: str
    adapter: Adapter


class FrontEnd:
    """The adapters that requests can name. Each engine has one front end, in the server's process.

    Args:
        vllm_config: The engine's configuration.
    """

    def __init__(self, vllm_config: Any):
        self.vllm_config = vllm_config
        self.residents: dict[int, Resident] = {}

    @cached_property
    def info(self) -> StackInfo:
        with internals.known_to_models(self.vllm_config):
            return describe_base(self.vllm_config.model_config.hf_config)

    @cached_property
    def embeddings(self) -> BaseEmbeddings:
        return BaseEmbeddings(self.vllm_config)

    # ------------------------------------------------------------------------------------------------------- adapters

    def add(self, named: Any) -> Steps:
        """Load the adapter that a `LoRARequest` names.

        Returns:
            `bool`: False if it is a LoRA, which vLLM loads itself.

        Raises:
            VLLMValidationError: The adapter cannot be served.
        """
        folder = Path(internals.local_folder(named.lora_path))
        try:
            kind = read_kind(folder) if folder.is_dir() else None
            if not is_own(kind) and internals.serves_lora(self.vllm_config):
                return False
            if kind is not None and not is_own(kind):
                raise ValueError(
                    f"{folder} holds a {kind} adapter, and beside instance-prompt adapters LoRA is off, since it slows every layer: "
                    'start the engine with `--additional-config \'{"instance_prompt": {"lora": true}}\'`, or with VLLM_PLUGINS set to '
                    "plugins without this one."
                )
            if found := internals.complaints(self.vllm_config):
                raise ValueError(f"This engine cannot serve instance-prompt adapters: {'; '.join(found)}.")
            adapter = read_adapter(folder, self.info)
        except (ValueError, TypeError, OSError) as error:
            raise internals.VLLMValidationError(
                f"The adapter {named.lora_name!r} cannot be served. {error}"
            ) from error
        complaint = yield "load_instance_prompt", adapter.key, str(folder)
        if complaint:
            raise internals.VLLMValidationError(f"The adapter {named.lora_name!r} cannot be served. {complaint}")
        if not adapter.generator.places_by_vector:
            adapter.generator.to("meta")
        before = self.residents.get(named.lora_int_id)
        self.residents[named.lora_int_id] = Resident(named.lora_name, named.lora_path, adapter)
        if before is not None:
            yield from self._forget(before.adapter.key)
        return True

    def remove(self, lora_int_id: int) -> Steps:
        """Unload an adapter. Requests that have it are served to their end.

        Returns:
            `bool`: Whether the engine had it.
        """
        gone = self.residents.pop(lora_int_id, None)
        if gone is not None:
            yield from self._forget(gone.adapter.key)
        return gone is not None

    def _forget(self, key: str) -> Steps:
        if all(key != resident.adapter.key for resident in self.residents.values()):
            yield "remove_instance_prompt", key

    def prepare(self, named: Any) -> Steps:
        """Load the adapter that a request names, if the engine does not have it.

        Raises:
            VLLMValidationError: The adapter cannot be served, or a different adapter has its number.
        """
        resident = self.residents.get(named.lora_int_id)
        if resident is not None and (named.lora_name, named.lora_path) == resident[:2]:
            return
        if resident is not None and not named.load_inplace:
            raise internals.VLLMValidationError(
                f"The adapter {named.lora_name!r} of {named.lora_path} has the number {named.lora_int_id}, which is that of "
                f"{resident.name!r} of {resident.path}: give each adapter a `lora_int_id` of its own."
            )
        yield from self.add(named)

    # ------------------------------------------------------------------------------------------------------- requests

    def widen(self, request: Any) -> None:
        """Give an `EngineCoreRequest` the slots of its adapter. One that names none of our adapters stays as it is.

        Raises:
            VLLMValidationError: The request cannot be served with its adapter.
        """
        named, params = request.lora_request, request.sampling_params
        if params is not None and internals.KEY in (params.extra_args or {}):
            raise internals.VLLMValidationError(
                f"`{internals.KEY}` is set by the server: name the adapter as `model`.", parameter=internals.KEY
            )
        resident = None if named is None else self.residents.get(named.lora_int_id)
        if resident is None:
            if named is not None and not internals.serves_lora(self.vllm_config):
                raise internals.VLLMValidationError(f"The adapter {named.lora_name!r} is not loaded: load it again.")
            return
        try:
            if complaint := internals.refuse_content(request):
                raise ValueError(complaint)
            self._widen(request, resident.adapter)
        except ValueError as error:
            raise internals.VLLMValidationError(f"Adapter {resident.name!r}: {error}") from error

    def _widen(self, request: Any, adapter: Adapter) -> None:
        ids = list(request.prompt_token_ids)
        placed = place(adapter, ids, self.embeddings.rows)
        limit = self.vllm_config.model_config.max_model_len
        if len(ids) + len(placed.slots) >= limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and needs {len(placed.slots)} slots and one new token, but the model takes {limit} "
                "(`max_model_len`): shorten the prompt."
            )
        if not placed.slots:  # the adapter has chosen a prompt of no vectors
            return
        read = hashlib.sha256(repr((ids[: placed.num_read], placed.slots, placed.vectors)).encode()).hexdigest()
        block = min(self.vllm_config.cache_config.block_size or internals.SMALLEST_BLOCK, internals.SMALLEST_BLOCK)
        # Slots depend on text behind them, so only equal instructions of the same adapter share blocks. A slot behind a cached block
        # would lack the states of the text in that block.
        internals.put_slots(
            request,
            widen(ids, placed.slots),
            placed,
            f"{adapter.key} {read}",
            limit,
            reads_cache=max(placed.slots) < block,
        )


def place(adapter: Adapter, ids: list[int], embed: Callable[[list[int]], torch.Tensor]) -> Placed:
    """Where the instruction and the slots of a prompt stand.

    Args:
        adapter (`Adapter`): The adapter.
        ids (`list[int]`): The prompt's S token ids.
        embed (`Callable`): From n token ids to the input embeddings (n, e), for adapters that place slots by a vector.

    Raises:
        ValueError: The prompt has no instruction for this adapter.
    """
    config, generator, S = adapter.config, adapter.generator, len(ids)
    tokens, input_ids = torch.ones(1, S, dtype=torch.bool), torch.tensor([ids])  # (1, S) each
    scope = find_scope(tokens, Request(prompt_length=S), Rules.of(config), input_ids)  # (1, S)
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
