# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A real HTTP server on loopback: several processes, several tenants at once."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from served import BASE, CHAT, NEW_TOKENS, OVERLAY, TEXTS

from peft_instance_prompt import encode_prompt_embeds


pytestmark = pytest.mark.slow
LOADED = ("iapt", "iapt_too", "iapt_template", "idpg", "dynamic")


class Server:
    """A server in a process of its own."""

    def __init__(self, served, log, path=""):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        modules = [f"{name}={served.folders[name]}" for name in LOADED]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.base)]
        command += ["--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"]
        command += ["--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager", "--enable-prompt-embeds"]
        command += ["--enable-lora", "--lora-modules", *modules]
        env = {
            **os.environ,
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        env["PYTHONPATH"] = str(path)
        self.log = log
        self.process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=env)

    def wait(self, seconds: int = 1200) -> None:
        for _ in range(seconds):
            if self.process.poll() is not None:
                break
            try:
                return self.get("/health", raw=True)
            except OSError:
                time.sleep(1)
        pytest.fail("the server did not come up:\n" + self.log.read_text()[-5000:])

    def get(self, path: str, raw: bool = False):
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=120) as answer:
            text = answer.read().decode()
        return text if raw else json.loads(text)

    def post(self, path: str, raw: bool = False, **fields):
        """The answer, or the status and the message of an error."""
        data = json.dumps(fields).encode()
        call = Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urlopen(call, timeout=300) as answer:
                text = answer.read().decode()
        except HTTPError as error:
            return error.code, json.loads(error.read())["error"]["message"]
        return text if raw or not text.startswith("{") else json.loads(text)

    def complete(self, model: str, prompt, **fields):
        plain = {"temperature": 0, "max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS, "return_token_ids": True}
        return self.post("/v1/completions", model=model, prompt=prompt, **{**plain, **fields})


@pytest.fixture(scope="module", params=["0.32", "0.33"])
def server(served, tmp_path_factory, request):
    path = OVERLAY if request.param == "0.33" else ""
    if path and not path.is_dir():
        pytest.skip("`make test-vllm` makes the overlay of 0.33")
    server = Server(served, tmp_path_factory.mktemp("server") / "log", path)
    server.wait()
    assert server.get("/version")["version"].startswith(request.param)
    yield server
    server.process.terminate()
    server.process.wait(60)


def ids_of(answer) -> list[int]:
    assert isinstance(answer, dict), answer
    return answer["choices"][0]["token_ids"]


def test_tenants_at_once(server, served) -> None:
    names = {card["id"] for card in server.get("/v1/models")["data"]}
    assert names == {BASE, *LOADED}
    calls = [(name, at) for name in (BASE, "iapt", "iapt_too", "idpg", "dynamic") for at in range(len(TEXTS))]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(lambda call: server.complete(call[0], TEXTS[call[1]]), calls))
    for (name, at), answer in zip(calls, answers):
        assert ids_of(answer) == served.answers[name][at], (name, at)
    slots = {BASE: 0, "iapt": 4}
    used = {
        name: answer["usage"]["prompt_tokens"]
        for (name, at), answer in zip(calls, answers)
        if at == 0 and name in slots
    }
    assert used == {name: len(served.prompts[name][0]) + l for name, l in slots.items()}


def test_streaming(server, served) -> None:
    text = server.complete("iapt", TEXTS[0], stream=True, raw=True)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    found = [token for event in events for token in event["choices"][0].get("token_ids") or []]
    assert found == served.answers["iapt"][0] and len(events) > 2


@pytest.mark.parametrize("model, name", [("iapt_template", "iapt_template"), (BASE, CHAT)])
def test_chat(server, served, model, name) -> None:
    for text, wanted in zip(TEXTS, served.answers[name]):
        answer = server.post(
            "/v1/chat/completions",
            model=model,
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=NEW_TOKENS,
            min_tokens=NEW_TOKENS,
            return_token_ids=True,
        )
        assert ids_of(answer) == wanted


@pytest.mark.parametrize("name", ["idpg_frozen", "dynamic_frozen"])
def test_prompt_embeds(server, served, name) -> None:
    for embeds, wanted in zip(served.embeds[name], served.answers[name]):
        assert ids_of(server.complete(BASE, None, prompt_embeds=encode_prompt_embeds(embeds))) == wanted


def test_adapters_come_and_go(server, served) -> None:
    folder = str(served.folders["iapt_first"])
    loaded = server.post("/v1/load_lora_adapter", lora_name="new", lora_path=folder)
    assert "added successfully" in loaded
    assert "new" in {card["id"] for card in server.get("/v1/models")["data"]}
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(server.complete, "new", text) for text in TEXTS]
        longer = pool.submit(server.complete, "new", TEXTS[0], max_tokens=60, min_tokens=60)
        time.sleep(0.5)
        assert "removed successfully" in server.post("/v1/unload_lora_adapter", lora_name="new")
        answers = [call.result() for call in running]
        assert len(ids_of(longer.result())) == 60
    # Each request came before the adapter went, or is told that there is none.
    for answer, wanted in zip(answers, served.answers["iapt_first"]):
        if isinstance(answer, tuple):
            assert answer[0] == 404, answer
        else:
            assert ids_of(answer) == wanted
    assert any(isinstance(answer, dict) for answer in answers)
    assert server.complete("new", TEXTS[0])[0] == 404
    # Another adapter under the name: nothing of the old one is left, in the prefix cache either.
    server.post("/v1/load_lora_adapter", lora_name="new", lora_path=str(served.folders["iapt_end"]))
    assert ids_of(server.complete("new", TEXTS[0])) == served.answers["iapt_end"][0]
    other = str(served.folders["iapt_first"])
    assert "success" in server.post("/v1/load_lora_adapter", lora_name="new", lora_path=other, load_inplace=True)
    assert ids_of(server.complete("new", TEXTS[0])) == served.answers["iapt_first"][0]
    server.post("/v1/unload_lora_adapter", lora_name="new")


def test_refusals_are_400_and_the_server_lives(server, served, tmp_path) -> None:
    text = TEXTS[0]
    refused = {
        "needs 4 slots": server.complete("iapt", (served.prompts["iapt"][2] * 9)[:253], max_tokens=1, min_tokens=1),
        "does not occur": server.complete("iapt_template", text),
        "prompt_logprobs": server.complete("iapt", text, prompt_logprobs=1),
        "echo": server.complete("iapt", text, echo=True),
        "Beam search": server.complete("iapt", text, use_beam_search=True, n=2),
        "set by the server": server.complete("iapt", text, vllm_xargs={"instance_prompt": "x"}),
        "from token ids": server.complete(
            "iapt", None, prompt_embeds=encode_prompt_embeds(served.embeds["idpg_frozen"][0])
        ),
        "There is no adapter folder": server.post(
            "/v1/load_lora_adapter", lora_name="no", lora_path=str(tmp_path / "no")
        ),
        "shows its slots from layer": server.post(
            "/v1/load_lora_adapter", lora_name="late", lora_path=str(served.folders["lpt"])
        ),
        "'hub' cannot be served": server.post("/v1/load_lora_adapter", lora_name="hub", lora_path="nobody/nothing"),
        "'corrupt' cannot be served": server.post(
            "/v1/load_lora_adapter", lora_name="corrupt", lora_path=str(corrupt(served, tmp_path / "corrupt"))
        ),
        "to_prompt_embeds": server.post(
            "/v1/load_lora_adapter", lora_name="f", lora_path=str(served.folders["idpg_frozen"])
        ),
    }
    for words, answer in refused.items():
        assert isinstance(answer, tuple) and answer[0] == 400 and words in answer[1], (words, answer)
    assert server.complete("nobody", text)[0] == 404
    assert ids_of(server.complete("iapt", text)) == served.answers["iapt"][0]
    assert server.process.poll() is None


def corrupt(served, folder):
    """An adapter's folder with weights in the old format, which are none."""
    shutil.copytree(served.folders["iapt"], folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"broken")
    return folder


def test_tokens_of_a_named_adapter(server, served) -> None:
    ids = server.post("/tokenize", model="iapt", prompt=TEXTS[0])["tokens"]
    assert ids == served.prompts["iapt"][0]
    assert server.post("/detokenize", model="iapt", tokens=ids)["prompt"] == TEXTS[0]


def test_engine_has_said_what_it_serves(server) -> None:
    assert "Instance prompts are served; LoRA is off" in server.log.read_text()


def test_metrics_count_requests(server) -> None:
    text = server.get("/metrics", raw=True)
    assert "vllm:prompt_tokens_total" in text and "vllm:request_success_total" in text
    assert "vllm:lora_requests_info" in text


def test_the_client_of_the_example(server, monkeypatch, capsys) -> None:
    file = Path(__file__).parents[2] / "examples/serve_vllm/client.py"
    spec = importlib.util.spec_from_file_location("serve_vllm_client", file)
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    monkeypatch.setattr(client, "MODELS", ("iapt", "idpg", BASE))
    url = f"http://127.0.0.1:{server.port}"
    client.ask(url)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["iapt", "idpg", BASE] * len(client.TEXTS)
    client.load(url, requests=6, at_once=3, max_tokens=4)
    assert "6 requests, 3 at once: 24 tokens in" in capsys.readouterr().out
