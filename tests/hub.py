"""A stand-in for the Hugging Face hub on the loopback: its API, its redirects to where files lie, and its mishaps."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".gguf", ".onnx", ".bin", ".pth")


@dataclass
class Hub:
    """`files` by path in the one repository ORG/NAME. What goes wrong can be set while it runs."""

    files: dict[str, bytes]
    repo: str = "org/name"
    endpoint: str = ""
    cdn: str = ""  # another host, as far as a client can tell
    status: int | None = None  # what the API answers instead
    gated: bool = False
    cut_after: dict[str, int] = field(default_factory=dict)  # bytes until the connection breaks, once
    gone_after_cut: bool = False  # nothing more is answered then
    short: set[str] = field(default_factory=set)  # served without their last byte
    false_checksums: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    tokens: set[str] = field(default_factory=set)
    served: dict[str, int] = field(default_factory=dict)  # bytes of content by path

    @classmethod
    def of(cls, directory: Path) -> "Hub":
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        return cls({path.relative_to(directory).as_posix(): path.read_bytes() for path in paths})

    def sha256(self, path: str) -> str:
        digest = hashlib.sha256(self.files[path]).hexdigest()
        return digest[::-1] if path in self.false_checksums else digest

    def git_sha1(self, path: str) -> str:
        content = self.files[path]
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def info(self) -> dict[str, Any]:
        siblings = []
        for path, content in self.files.items():
            row: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": self.git_sha1(path)}
            if path.endswith(_LARGE):
                row["lfs"] = {"sha256": self.sha256(path), "size": len(content), "pointerSize": 130}
            siblings.append(row)
        return {"id": self.repo, "sha": COMMIT, "siblings": siblings}

    def fetched(self) -> set[str]:
        return set(self.served)


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(send=True)

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def _answer(self, *, send: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if self.headers.get("Authorization"):
                hub.tokens.add(self.headers["Authorization"])
            if hub.status is not None:
                code = {"X-Error-Code": "GatedRepo"} if hub.gated else {}
                self._send(hub.status, b"{}", code)
            elif re.fullmatch(f"/api/models/{hub.repo}(/revision/[^/]+)?", path):
                if "/revision/" in path and not path.endswith(("/main", COMMIT, "/v1")):
                    self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                else:
                    self._send(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
            elif (found := re.fullmatch(f"/{hub.repo}/resolve/{COMMIT}/(.+)", path)) and found[
                1
            ] in hub.files:
                self._resolve(found[1], send=send)
            elif path.startswith("/cdn/") and path[5:] in hub.files:
                self._content(path[5:], {}, send=send)
            else:
                kind = "EntryNotFound" if path.startswith(f"/{hub.repo}/") else "RepoNotFound"
                self._send(404, b"{}", {"X-Error-Code": kind})

        def _resolve(self, name: str, *, send: bool) -> None:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.git_sha1(name)}"'}
            if not name.endswith(_LARGE):
                self._content(name, headers, send=send)
                return
            headers |= {"X-Linked-ETag": f'"{hub.sha256(name)}"', "X-Linked-Size": str(len(hub.files[name]))}
            self._send(302, b"", {**headers, "Location": f"{hub.cdn}/cdn/{name}"})

        def _content(self, name: str, headers: Mapping[str, str], *, send: bool) -> None:
            content, status = hub.files[name][: -1 if name in hub.short else None], 200
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
                status = 206
                headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
                content = content[first : last + 1]
            cut = hub.cut_after.pop(name, None) if send and not wanted else None
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if send:
                self.wfile.write(content[:cut])
                hub.served[name] = hub.served.get(name, 0) + len(content[:cut])
            if cut is not None:
                self.close_connection = True
                hub.status = 418 if hub.gone_after_cut else None

        def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
