"""A stand-in of the Hugging Face hub on this machine: it keeps repositories, branches and commits."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Commit:
    repo: str
    revision: str
    message: str
    files: dict[str, bytes]


@dataclass
class HubServer:
    """`refuses`: with this status, whatever is committed, in the words `says`."""

    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    branches: list[str] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuses: int | None = None
    says: str = "no"
    holds: threading.Event | None = None

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            return 200, {"url": f"{self.url}/{asked.get('organization') or 'me'}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repo, _, rest = path.removeprefix("/api/models/").rpartition("/")
        repo, _, act = repo.rpartition("/")
        if act == "branch":
            self.branches.append(rest)
            return 200, {}
        if act == "preupload":
            files = json.loads(body)["files"]
            told = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return 200, {"files": told}
        if act == "commit":
            if self.holds is not None:
                self.holds.wait(60)
            if self.refuses is not None:
                return self.refuses, {"error": self.says}
            lines = [json.loads(line) for line in body.splitlines()]
            (header,) = [line["value"] for line in lines if line["key"] == "header"]
            files = [line["value"] for line in lines if line["key"] == "file"]
            content = {one["path"]: base64.b64decode(one["content"]) for one in files}
            self.commits.append(Commit(repo, rest, header["summary"], content))
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/abc", "commitOid": "abc", "success": True}
        return 404, {"error": path}


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """While it lasts this process asks it where it would ask the hub."""
    hub = HubServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.tokens.add(self.headers.get("Authorization"))
            status, told = hub.answer(self.path, body)
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        try:
            yield hub
        finally:
            if hub.holds is not None:
                hub.holds.set()
            server.shutdown()
            server.server_close()
