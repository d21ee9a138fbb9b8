# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""Adapters come and go while requests arrive, in the order that an event loop happens to choose. The engine is a stand-in."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest

from peft_instance_prompt.vllm import front_calls, front_end, internals


class Engine:
    """Its workers take a while to load and drop adapters, and keep their keys."""

    def __init__(self, monkeypatch):
        self.vllm_config = SimpleNamespace(additional_config={"instance_prompt": {}}, lora_config=None)
        self.workers: set[str] = set()
        self.calls: list[tuple] = []
        self.threads: set[int] = set()
        self.read = threading.Event()
        self.read.set()
        self.output_processor = SimpleNamespace(request_states={}, parent_requests={})
        monkeypatch.setattr(front_end, "pack", lambda adapter: ("{}", b""))
        monkeypatch.setattr(front_end, "read_adapter", self.read_adapter)
        monkeypatch.setattr(front_end, "is_own", lambda kind: True)
        monkeypatch.setattr(internals, "local_folder", lambda path: path)
        monkeypatch.setattr(front_end.FrontEnd, "info", None)
        self.front = front_calls.front_end(self.vllm_config)

    def read_adapter(self, folder, info):
        assert self.read.wait(20)
        self.threads.add(threading.get_ident())
        weights = str(folder).split("-")[0]  # "a-1" and "a-2" are folders of the same weights
        if weights == "odd":
            raise EOFError("Ran out of input")
        return SimpleNamespace(key=weights, generator=SimpleNamespace(places_by_vector=False, to=lambda device: None))

    async def collective_rpc(self, method, args):
        self.calls.append((method, args[0]))
        await asyncio.sleep(0.01)
        (self.workers.add if method.startswith("load") else self.workers.discard)(args[0])
        return [""]

    async def add_lora(self, named):
        return await front_calls.add_lora_async(never, self, named)

    async def remove_lora(self, number):
        return await front_calls.remove_lora_async(never, self, number)

    async def ask(self, named, wait=0.0):
        """A request that vLLM tokenizes for a while, until it is given to the engine and ends at once."""

        async def original(engine, request_id, prompt, params, arrival_time=None, lora_request=None):
            await asyncio.sleep(wait)
            key = (
                self.front.residents[lora_request.lora_int_id].adapter.key
                if lora_request.lora_int_id in self.front.residents
                else None
            )
            return SimpleNamespace(request_id="r", key=key, there=key in self.workers)

        return await front_calls.add_request_async(original, self, "r", "text", None, lora_request=named)


async def never(*args):
    pytest.fail("vLLM's own LoRA was asked")


@pytest.fixture
def engine(monkeypatch):
    return Engine(monkeypatch)


def test_same_weights_are_kept_while_one_name_goes_and_another_comes(engine) -> None:
    async def run():
        await engine.add_lora(LoRARequest("first", 1, "a-1"))
        await asyncio.gather(engine.remove_lora(1), engine.add_lora(LoRARequest("second", 2, "a-2")))
        assert set(engine.front.residents) == {2} and engine.workers == {"a"}
        await asyncio.gather(engine.add_lora(LoRARequest("third", 3, "a-3")), engine.remove_lora(2))
        assert set(engine.front.residents) == {3} and engine.workers == {"a"}
        await engine.remove_lora(3)
        assert engine.workers == set()

    asyncio.run(run())


def test_requests_keep_their_adapter(engine) -> None:
    """One that is on its way, and one that the engine has."""
    named = LoRARequest("first", 1, "a-1")

    async def run():
        await engine.add_lora(named)
        on_its_way = asyncio.create_task(engine.ask(named, wait=0.05))
        await asyncio.sleep(0.01)
        await engine.remove_lora(1)
        assert engine.workers == {"a"}
        engine.output_processor.request_states["r"] = object()
        await on_its_way
        await engine.add_lora(LoRARequest("other", 2, "b"))
        assert engine.workers == {"a", "b"}
        engine.output_processor.request_states.clear()
        await engine.add_lora(LoRARequest("more", 3, "c"))
        assert engine.workers == {"b", "c"}

    asyncio.run(run())


def test_what_a_server_unloads_is_not_loaded_again_by_a_late_request(engine) -> None:
    named = LoRARequest("first", 1, "a-1")
    models = SimpleNamespace(lora_requests={"first": named}, engine_client=engine)

    async def unload(models, request):
        del models.lora_requests[request.lora_name]
        return "Success"

    async def run():
        await engine.add_lora(named)
        await front_calls.unload_lora_adapter(unload, models, SimpleNamespace(lora_name="first"))
        with pytest.raises(VLLMNotFoundError, match="was unloaded"):
            await engine.ask(named)
        assert not engine.front.residents and not engine.workers
        await engine.add_lora(named)  # loaded anew, it is there
        assert (await engine.ask(named)).there

    asyncio.run(run())


def test_requests_during_a_change_in_place_get_one_of_the_two(engine) -> None:
    old, new = LoRARequest("first", 1, "a-1"), LoRARequest("first", 1, "b-1", load_inplace=True)

    async def run():
        await engine.add_lora(old)
        loading = asyncio.create_task(engine.add_lora(new))
        seen = []
        while not loading.done():
            seen.append(await engine.ask(old, wait=0.002))
        seen.append(await engine.ask(old))  # named before, sent after
        assert all(answer.there for answer in seen) and [seen[0].key, seen[-1].key] == ["a", "b"]
        assert engine.calls.count(("load_instance_prompt", "a")) == 1

    asyncio.run(run())


def test_loop_goes_on_while_a_folder_is_read(engine) -> None:
    async def run():
        engine.read.clear()
        loading = asyncio.create_task(engine.add_lora(LoRARequest("slow", 1, "a")))
        await asyncio.sleep(0.05)
        assert not loading.done()  # and this line runs
        engine.read.set()
        await loading
        assert threading.get_ident() not in engine.threads

    asyncio.run(run())


def test_whatever_a_folder_raises_is_a_refusal(engine) -> None:
    async def run():
        with pytest.raises(VLLMValidationError, match="'bad' cannot be served.*Ran out of input"):
            await engine.add_lora(LoRARequest("bad", 1, "odd"))

    asyncio.run(run())
    assert not engine.front.residents and not engine.calls
