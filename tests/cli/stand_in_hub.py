"""A Hugging Face hub on this machine: repositories of a few files, some gated, some that break off."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as hub
import pytest

SHA = "a" * 40


@dataclass
class Hub:
    """What it holds, by ``models/OWNER/NAME`` or ``datasets/OWNER/NAME``.

    Attributes:
        breaks: bytes after which the next answer with a file ends too early.
        sent: bytes of files that were sent.
    """

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    breaks: int | None = None
    sent: int = 0


@contextmanager
def serve(held: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let huggingface_hub speak to it, with ``cache`` for its cache."""

    class Handler(_Handler):
        pass

    Handler.held = held
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "ENDPOINT", at)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", at + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    held: Hub

    def do_HEAD(self) -> None:
        self._file(send=False)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not path.startswith("/api/"):
            self._file(send=True)
            return
        kind, owner, name, what = path.removeprefix("/api/").split("/")[:4]
        files = self.held.repos.get(f"{kind}/{owner}/{name}")
        if files is None:
            self._refuse(404, "RepoNotFound")
        elif what == "revision":
            listed = [{"rfilename": file} for file in files]
            self._json({"id": f"{owner}/{name}", "sha": SHA, "siblings": listed, "private": False, "tags": []})
        else:
            self._json([{"type": "file", "path": f, "size": len(b), "oid": _tag(b)} for f, b in files.items()])

    def _file(self, *, send: bool) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        repo, _, file = path.replace(f"/resolve/{SHA}/", "|").partition("|")
        repo = repo if repo.startswith("datasets/") else f"models/{repo}"
        if repo in self.held.gated:
            self._refuse(403, "GatedRepo")
            return
        data = self.held.repos[repo][file]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        for name, value in {
            "ETag": f'"{_tag(data)}"',
            "X-Repo-Commit": SHA,
            "Content-Length": len(data) - start,
        }.items():
            self.send_header(name, str(value))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if send:
            body = data[start:] if self.held.breaks is None else data[start : start + self.held.breaks]
            self.held.sent += len(body)  # before anybody can have read them
            self.wfile.write(body)
            self.close_connection = True

    def _json(self, values: object) -> None:
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
