# SPDX-FileCopyrightText: 2026-present the peft_instance_prompt authors
# SPDX-License-Identifier: Apache-2.0

"""A model hub in miniature, on this machine: what `huggingface_hub` asks of the real one to push and to download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Keeps one branch per repository.

    Attributes:
        repos (`dict[str, dict[str, bytes]]`): The files of each repository.
        objects (`dict[str, bytes]`): Large files by SHA-256, as git-lfs keeps them.
        unknown (`list[str]`): Requests that it has no answer to.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit_id(self, repo: str) -> str:
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in self.repos[repo].items())
        return hashlib.sha1(repr(content).encode()).hexdigest()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self, status: int = 200, body: bytes | dict | list = b"", **headers: str) -> None:
        if isinstance(body, (dict, list)):
            body, headers = json.dumps(body).encode(), {"Content_Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self) -> None:
        chunks = []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            chunks.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        self.body = b"".join(chunks)
        path = self.path.split("?")[0]
        for method, pattern, reply in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return reply(self, *match.groups())
        self.server.unknown.append(f"{self.command} {self.path}")
        self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, *args) -> None:
        pass

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        known = repo in self.server.repos
        self.server.repos.setdefault(repo, {})
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def validate(self) -> None:
        assert json.loads(self.body)["content"].startswith("---")
        self.answer(body={"errors": [], "warnings": []})

    def preupload(self, repo: str) -> None:
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
        self.answer(
            body={"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in zip(paths, modes)]}
        )

    def lfs_batch(self, repo: str) -> None:
        wanted = json.loads(self.body)["objects"]
        where = {"upload": {"href": f"{self.server.url}/objects/"}, "verify": {"href": f"{self.server.url}/verify"}}
        actions = {
            n: {"upload": {"href": where["upload"]["href"] + o["oid"]}, "verify": where["verify"]}
            for n, o in enumerate(wanted)
        }
        self.answer(
            body={"transfer": "basic", "objects": [{**o, "actions": actions[n]} for n, o in enumerate(wanted)]}
        )

    def lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.answer()

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        self.answer(200 if len(self.server.objects[asked["oid"]]) == asked["size"] else 422)

    def commit(self, repo: str) -> None:
        for line in self.body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                self.server.repos[repo][value["path"]] = self.server.objects[value["oid"]]
        oid = self.server.commit_id(repo)
        self.answer(body={"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    def resolve(self, repo: str, path: str) -> None:
        files = self.server.repos.get(repo)
        if files is None or path not in files:
            kind = "RepoNotFound" if files is None else "EntryNotFound"
            commit = {} if files is None else {"X_Repo_Commit": self.server.commit_id(repo)}
            return self.answer(404, X_Error_Code=kind, **commit)
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self.answer(body=files[path], ETag=etag, X_Repo_Commit=self.server.commit_id(repo))

    def info(self, repo: str) -> None:
        files = [{"rfilename": path} for path in self.server.repos[repo]]
        self.answer(body={"id": repo, "sha": self.server.commit_id(repo), "siblings": files})

    def tree(self, repo: str) -> None:
        files = self.server.repos[repo].items()
        self.answer(
            body=[{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in files]
        )

    routes = (
        ("POST", "/api/repos/create", create),
        ("POST", "/api/validate-yaml", validate),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", preupload),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
        ("PUT", r"/objects/(\w+)", lfs_put),
        ("POST", "/verify", lfs_verify),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", commit),
        (("GET", "HEAD"), r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", resolve),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", info),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/[^/]+", tree),
    )


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
