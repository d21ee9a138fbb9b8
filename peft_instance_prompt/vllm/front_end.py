# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""The front end: knows the adapters that requests can name, places their slots and edits, and makes every refusal.

Whatever reaches the engine can be served: all is checked here.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from . import internals
from .adapters import Adapter, describe_base, is_own, pack, read_adapter
from .complaints import serves_lora, settings
from .package import StackInfo, read_kind
from .places import BaseEmbeddings, place, widen
from .plan import Edited


# Calls of the workers, each its method and arguments: a generator, since asynchronous and synchronous code makes them.
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

    Attributes:
        residents (`dict[int, Resident]`): By the number that vLLM gives an adapter.
        unloaded (`set[int]`): The numbers of adapters that a server has unloaded, for good.
        loras (`set[int]`): The numbers of LoRA adapters, which vLLM loads itself.
        loaded (`set[str]`): The keys of the adapters that the workers have. Those that nobody uses are dropped by [`release`].
        lock (`asyncio.Lock`): Held while the workers load or drop adapters, so that both see what the other has done.
    """

    def __init__(self, vllm_config: Any):
        self.vllm_config = vllm_config
        self.residents: dict[int, Resident] = {}
        self.unloaded: set[int] = set()
        self.loras: set[int] = set()
        self.loaded: set[str] = set()
        self.lock = asyncio.Lock()
        self._read: dict[str, Adapter] = {}  # by path: what was read before the engine started
        self._requests: dict[
            str, set[str]
        ] = {}  # by the id of a request that the engine was given: the keys that it may have
        self._many = 1000  # requests, at which ended ones are forgotten
        self._arriving: Counter[str] = Counter()  # the keys of requests on their way there

    @cached_property
    def info(self) -> StackInfo:
        with internals.known_to_models(self.vllm_config):
            return describe_base(self.vllm_config.model_config.hf_config)

    @cached_property
    def embeddings(self) -> BaseEmbeddings:
        return BaseEmbeddings(self.vllm_config)

    # ------------------------------------------------------------------------------------------------------- adapters

    def read_named(self) -> None:
        """Read the folders that were named at the start.

        Raises:
            ValueError: One cannot be served.
        """
        for name, path in settings(self.vllm_config.additional_config).get("folders", {}).items():
            self._read[path] = self._read_folder(name, path)

    def read(self, named: Any) -> Adapter | None:
        """The adapter that a `LoRARequest` names; None if it is a LoRA, which vLLM loads itself. Blocks: files are read and hashed.

        Raises:
            VLLMValidationError: The adapter cannot be served.
        """
        if (known := self._read.pop(named.lora_path, None)) is not None:
            return known
        try:
            return self._read_folder(named.lora_name, named.lora_path)
        except ValueError as error:
            raise internals.VLLMValidationError(str(error)) from error

    def _read_folder(self, name: str, path: str) -> Any:
        try:
            folder = Path(internals.local_folder(path))
            kind = read_kind(folder) if folder.is_dir() else None
            if kind is not None and not is_own(kind):
                if serves_lora(self.vllm_config):
                    return None
                raise ValueError(
                    f"{folder} holds a {kind} adapter, and beside instance-prompt adapters LoRA is off, since it slows every layer: name it "
                    'at the start, or start with `--enable-lora --additional-config \'{"instance_prompt": {"lora": true}}\'`.'
                )
            adapter = read_adapter(folder, self.info)
            if adapter.generator.places_by_vector:
                self.embeddings  # noqa: B018, reads the base model's index now, and not with the first request
            return adapter
        except Exception as error:  # whatever files and the Hub raise is said to whoever named them
            reason = str(error) if isinstance(error, (ValueError, TypeError, OSError)) else repr(error)
            raise ValueError(f"The adapter {name!r} cannot be served. {reason}") from error

    def install(self, named: Any, adapter: Adapter) -> Steps:
        """Let the workers load an adapter, and requests name it.

        Raises:
            VLLMValidationError: A worker cannot load it.
        """
        if adapter.key not in self.loaded:
            complaint = next(filter(None, (yield "load_instance_prompt", adapter.key, *pack(adapter))), "")
            if complaint:
                yield "drop_instance_prompt", adapter.key
                raise internals.VLLMValidationError(f"The adapter {named.lora_name!r} cannot be served. {complaint}")
            self.loaded.add(adapter.key)
        if not adapter.generator.places_by_vector:
            adapter.generator.to("meta")
        self.residents[named.lora_int_id] = Resident(named.lora_name, named.lora_path, adapter)
        self.unloaded.discard(named.lora_int_id)
        self.loras.discard(named.lora_int_id)

    def remove(self, lora_int_id: int) -> bool:
        """Let no request name an adapter any more. Requests that have it are served to their end.

        Returns:
            `bool`: Whether the engine had it.
        """
        return self.residents.pop(lora_int_id, None) is not None

    def release(self, engine: Any) -> Steps:
        """Let the workers drop the adapters that nobody can name and no request has."""
        self._forget_ended(engine)
        used = {resident.adapter.key for resident in self.residents.values()}
        used.update(*self._requests.values(), +self._arriving)
        for key in self.loaded - used:
            self.loaded.discard(key)
            yield "drop_instance_prompt", key

    # ------------------------------------------------------------------------------------------------------- requests

    def find(self, named: Any) -> Resident | None:
        """The adapter of a request; None if it must be loaded first.

        Raises:
            VLLMNotFoundError: A server has unloaded it.
            VLLMValidationError: A different adapter has its number.
        """
        if named.lora_int_id in self.unloaded:
            raise internals.VLLMNotFoundError(f"The adapter {named.lora_name!r} was unloaded: load it again.")
        resident = self.residents.get(named.lora_int_id)
        if resident is None or (named.load_inplace and named.lora_path != resident.path):
            return None
        if resident.name != named.lora_name:
            raise internals.VLLMValidationError(
                f"The adapter {named.lora_name!r} of {named.lora_path} has the number {named.lora_int_id}, which is that of "
                f"{resident.name!r} of {resident.path}: give each adapter a `lora_int_id` of its own."
            )
        return resident

    @contextmanager
    def arriving(self, resident: Resident | None) -> Iterator[Callable[[Any, Any, str], None]]:
        """Keep an adapter while a request with it is on its way to the engine. Yields what is called once the engine has it."""
        key = None if resident is None else resident.adapter.key

        def arrived(engine: Any, named: Any, name: str) -> None:
            now = self.residents.get(named.lora_int_id)  # it may have been replaced on the way
            self._requests[name] = {key for key in (key, now and now.adapter.key) if key is not None}
            if len(self._requests) > self._many:
                self._forget_ended(engine)

        self._arriving[key or ""] += 1
        try:
            yield arrived
        finally:
            self._arriving[key or ""] -= 1

    def _forget_ended(self, engine: Any) -> None:
        self._requests = {name: keys for name, keys in self._requests.items() if internals.has_request(engine, name)}
        self._many = max(1000, 2 * len(self._requests))

    def widen(self, request: Any) -> None:
        """Give an `EngineCoreRequest` the slots or edits of its adapter. One that names none of our adapters stays as it is.

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
            if named is not None and not serves_lora(self.vllm_config):
                raise internals.VLLMNotFoundError(f"The adapter {named.lora_name!r} is not loaded: load it again.")
            return
        try:
            if complaint := internals.refuse_content(request):
                raise ValueError(complaint)
            self._widen(request, resident.adapter)
        except ValueError as error:
            raise internals.VLLMValidationError(f"Adapter {resident.name!r}: {error}") from error

    def _widen(self, request: Any, adapter: Adapter) -> None:
        ids = list(request.prompt_token_ids)
        placed = place(adapter, ids, lambda some: self.embeddings.rows(some))
        limit = self.vllm_config.model_config.max_model_len
        if isinstance(placed, Edited):
            internals.put_placed(request, ids, placed, adapter.key, limit)
            return
        if len(ids) + len(placed.slots) >= limit:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and needs {len(placed.slots)} slots and one new token, but the model takes {limit} "
                "(`max_model_len`): shorten the prompt."
            )
        if not placed.slots:  # the adapter has chosen a prompt of no vectors
            return
        most, option = internals.longest_step(self.vllm_config)
        if placed.end > most:
            raise ValueError(
                f"the instruction and its slots are {placed.end} tokens, which one step must compute, but a step takes {most} of a prompt "
                f"({option}): raise it, or shorten the instruction."
            )
        read = hashlib.sha256(repr((ids[: placed.num_read], placed.slots, placed.vectors)).encode()).hexdigest()
        # Slots depend on text behind them, so only equal instructions of the same adapter share blocks.
        internals.put_placed(request, widen(ids, placed.slots), placed, f"{adapter.key} {read}", limit)
