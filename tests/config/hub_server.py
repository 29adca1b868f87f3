"""A stand-in for the Hugging Face hub: the few routes that `snapshot_download` asks for, over files in memory."""

import hashlib
import http.server
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from tests.in_background import InBackground


@dataclass
class Hub:
    """Repositories: {name: {revision: {file: bytes}}}; `asked` is every request so far, e.g. "GET /api/models/…"."""

    repositories: dict[str, dict[str, dict[str, bytes]]]
    asked: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    cut: str = ""  # a file whose download ends early
    url: str = ""

    def commit(self, name: str, revision: str) -> str:
        """What a revision means: a hash of its files; a commit means itself."""
        revisions = self.repositories[name]
        known = {hashlib.sha1(repr((r, f)).encode()).hexdigest(): r for r, f in revisions.items()}
        return revision if revision in known else next(sha for sha, r in known.items() if r == revision)

    def files(self, name: str, revision: str) -> dict[str, bytes]:
        """Files of a revision or a commit."""
        sha = self.commit(name, revision)
        return next(f for r, f in self.repositories[name].items() if self.commit(name, r) == sha)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.url`, an address of this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if name not in hub.repositories:
                return self.answer(b"", 401, {"X-Error-Message": "Invalid username or password."})
            try:
                if parts[0] == "api":
                    return self.describe(name, parts[4:])
                return self.send_file(name, parts[3], "/".join(parts[4:]))
            except StopIteration:
                return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})

        def describe(self, name: str, rest: list[str]) -> None:
            sha = hub.commit(name, "/".join(rest[1:]) if rest else "main")
            files = hub.files(name, sha)
            if rest[:1] == ["tree"]:
                description: object = [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in files.items()
                ]
            else:
                description = {"id": name, "modelId": name, "sha": sha, "siblings": [{"rfilename": p} for p in files]}
            self.answer(json.dumps(description).encode(), 200, {"Content-Type": "application/json"})

        def send_file(self, name: str, revision: str, file: str) -> None:
            if name in hub.gated:
                return self.answer(b"", 403, {"X-Error-Code": "GatedRepo"})
            data = hub.files(name, revision)[file]
            etag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": hub.commit(name, revision)}
            self.answer(data, 200, etag, cut=file == hub.cut)

        def answer(self, data: bytes, status: int, headers: dict[str, str], cut: bool = False) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    with InBackground(server):
        yield hub
