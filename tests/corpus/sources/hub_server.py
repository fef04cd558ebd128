"""A stand-in for the hub: the parts of its HTTP interface that reading a data set uses.

It serves the files that it is given, counts requests and bytes, and fails when a test says so.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request.

    Attributes:
        kind: status, stall, cut, drip, other_bytes, whole, or damage.
        status, headers: of the answer, for `status`.
    """

    kind: str
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)


class HubServer(ThreadingHTTPServer):
    """Serves one data set on a free port of 127.0.0.1, as a context."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo, self.files = repo, files
        self.revisions = {"main": COMMIT, COMMIT: COMMIT}
        self.page_entries = 2  # of a listing
        self.token: str | None = None  # the only one that is let in
        self.faults: dict[int, Fault] = {}  # by the number of the request for a part of a file
        self.always: Fault | None = None  # for each request
        self.n_requests = self.n_parts = self.n_bytes = self.running = self.most_running = 0
        self.paths: list[str] = []
        self.pause = 0.0  # before each part
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def store(self) -> str:
        """Another host, as far as a client can tell: where the hub keeps large files."""
        return f"http://localhost:{self.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *unused: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, parts = self.server, urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parts.path)
        with hub.lock:
            hub.n_requests += 1
            hub.paths.append(path)
        if hub.always is not None and self._fail(hub.always):
            return
        is_hub = not path.startswith("/store/")
        if (
            is_hub
            and hub.token is not None
            and self.headers.get("Authorization") != f"Bearer {hub.token}"
        ):
            self._send(401, b"", {"X-Error-Code": "GatedRepo"})
            return
        api, files = f"/api/datasets/{hub.repo}/", f"/datasets/{hub.repo}/resolve/"
        if path.startswith(f"{api}revision/"):
            self._send_revision(path.removeprefix(f"{api}revision/"))
        elif path.startswith(f"{api}tree/{COMMIT}"):
            self._send_tree(urllib.parse.parse_qs(parts.query))
        elif path.startswith(files):
            self._send_redirect(path.removeprefix(files))
        elif path.startswith("/store/"):
            self._send_part(hub.files[path.removeprefix("/store/")])
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(
            200,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"} | (headers or {}),
        )

    def _send_revision(self, revision: str) -> None:
        if revision not in self.server.revisions:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in self.server.files]
        self._send_json({"id": self.server.repo, "sha": COMMIT, "siblings": siblings})

    def _send_tree(self, query: dict[str, list[str]]) -> None:
        names = sorted(self.server.files)
        begin = int(query.get("cursor", ["0"])[0])
        end = begin + self.server.page_entries
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "data", "oid": "0" * 40}]
        for name in names[begin:end]:
            content = self.server.files[name]
            digest = hashlib.sha256(content).hexdigest()
            entry = {"type": "file", "path": name, "oid": digest[:40], "size": len(content)}
            if name.endswith(".parquet"):
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        place = f"{self.server.url}/api/datasets/{self.server.repo}/tree/{COMMIT}"
        link = {"Link": f'<{place}?recursive=true&cursor={end}>; rel="next"'}
        self._send_json(entries, link if end < len(names) else None)

    def _send_redirect(self, place: str) -> None:
        commit, name = place.split("/", 1)
        if commit != COMMIT or name not in self.server.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = self.server.files[name]
        if not name.endswith(".parquet"):
            self._send(200, content)
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "Location": f"{self.server.store}/store/{urllib.parse.quote(name)}",
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{digest}"',
            "X-Repo-Commit": COMMIT,
        }
        self._send(302, b"", headers)

    def _send_part(self, content: bytes) -> None:
        hub = self.server
        with hub.lock:
            fault = hub.faults.pop(hub.n_parts, None)
            hub.n_parts += 1
            hub.running += 1
            hub.most_running = max(hub.most_running, hub.running)
        try:
            time.sleep(hub.pause)
            if fault is None or not self._fail(fault):
                self._send_range(content, fault)
        finally:
            with hub.lock:
                hub.running -= 1

    def _fail(self, fault: Fault) -> bool:
        """Whether the fault was the whole answer."""
        if fault.kind == "status":
            self._send(fault.status, b"busy", fault.headers)
        elif fault.kind == "stall":
            time.sleep(3)
            self.close_connection = True
        return fault.kind in ("status", "stall")

    def _send_range(self, content: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or kind == "whole":
            self._send(200, content)
            return
        begin, end = int(match[1]), int(match[2]) + 1
        body = content[begin:end]
        if kind == "damage":
            body = body[: len(body) // 2] + bytes(255 - b for b in body[len(body) // 2 :])
        shift = int(kind == "other_bytes")
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin + shift}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)
        with self.server.lock:
            self.server.n_bytes += len(body)
