"""A small Hugging Face hub on loopback: the requests a download makes, and what can go wrong or be hostile in them."""

import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_with_access"
"""The token of an account that was given access to every gated repository."""

LFS = (".safetensors", ".bin", ".gguf")
"""Files of these kinds are stored with LFS."""


def git_blob_id(content: bytes) -> str:
    """What git names a file by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """One repository: its files at one commit, and the branches and tags that stand for it."""

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    names: tuple[str, ...] = ("main",)
    gated: bool = False
    announced: dict[str, dict[str, object]] = field(default_factory=dict)
    """What the listing claims of a file instead of the truth."""
    served: dict[str, bytes] = field(default_factory=dict)
    """What is sent instead of a file."""
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """Headers that replace those of a file's address."""


@dataclass
class Hub:
    """The repositories by name, what was asked for, and the faults to answer with."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    address: str = ""
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    """The `Authorization` headers that came with requests."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes sent of every file."""
    cuts: dict[str, int] = field(default_factory=dict)
    """Close the connection after so many bytes of a file, once."""
    down_after_cut: bool = False
    """Answer 503 to everything after a cut."""
    stalls: dict[str, int] = field(default_factory=dict)
    """Send nothing more after so many bytes of a file, until the download gives up."""
    stalled: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    down: bool = False

    def fetched(self) -> set[str]:
        """The names of the files that were asked for."""
        return {request.split("/resolve/")[1].split("/", 1)[1] for request in self.requests if "/resolve/" in request}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub on a free port of the loopback interface."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the tests; all else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the tests read `Hub.requests`."""

    def do_HEAD(self) -> None:
        """A file's size and checksum, which huggingface_hub asks for before it fetches the file."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer like huggingface.co: the model API, a redirect to the file store, or the store."""
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        if token := self.headers.get("authorization"):
            self.hub.tokens.add(token)
        if self.hub.down:
            self.answer(503)
        elif path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            self.describe(self.hub.repositories.get(name), revision)
        elif "/resolve/" in path:
            name, _, rest = path[1:].partition("/resolve/")
            self.redirect(self.hub.repositories[name], rest.partition("/")[2])
        elif path.startswith("/store/"):
            name, _, file = path.removeprefix("/store/").partition("//")
            self.send_file(self.hub.repositories[name], file)
        else:
            self.answer(404)

    def describe(self, repository: Repository | None, revision: str) -> None:
        """What `HfApi.model_info(files_metadata=True)` asks."""
        if repository is None:
            self.answer(401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (*repository.names, repository.commit):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = []
            for name, content in repository.files.items():
                size = repository.announced.get(name, {}).get("size", len(content))
                sibling: dict[str, object] = {"rfilename": name, "size": size, "blobId": git_blob_id(content)}
                if name.endswith(LFS):
                    sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
                siblings.append(sibling | repository.announced.get(name, {}))
            body = {"id": "org/name", "sha": repository.commit, "siblings": siblings}
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def redirect(self, repository: Repository, file: str) -> None:
        """A file's address leads to the store, for those with access."""
        name = next(name for name, known in self.hub.repositories.items() if known is repository)
        if repository.gated and self.headers.get("authorization") != f"Bearer {TOKEN}":
            self.answer(403 if "authorization" in self.headers else 401, {"X-Error-Code": "GatedRepo"})
        else:
            headers = {"Location": f"/store/{name}//{file}", "X-Repo-Commit": repository.commit}
            self.answer(302, headers | repository.headers.get(file, {}))

    def send_file(self, repository: Repository, name: str) -> None:
        """A file or the rest of it, with this hub's faults."""
        content = repository.served.get(name, repository.files[name])
        etag = hashlib.sha256(content).hexdigest() if name.endswith(LFS) else git_blob_id(content)
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{etag}"'} | repository.headers.get(name, {})
        if self.command == "HEAD":
            self.answer(200, {"Content-Length": str(len(content))} | headers)
            return
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        rest = memoryview(content)[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(rest)))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        cut, stall = self.hub.cuts.pop(name, None), self.hub.stalls.pop(name, None)
        end = next((limit for limit in (cut, stall) if limit is not None), len(rest))
        self.hub.sent[name] += end
        self.wfile.write(rest[:end])
        if stall is not None:
            self.hub.stalled.set()
            self.hub.closing.wait(60)
        if cut is not None:
            self.hub.down = self.hub.down_after_cut
        self.close_connection = end < len(rest)

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        """A response with nothing unusual about it."""
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
