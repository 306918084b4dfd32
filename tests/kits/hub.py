"""A hub on this machine: the few answers of the Hugging Face hub that datasets and tokenizers ask for."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


@contextmanager
def hub(repository: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve one repository, a model and a dataset alike; gives the address for ``HF_ENDPOINT``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"repo": repository, "files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    repo: str
    files: Mapping[str, bytes]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(rf"/(?:datasets/)?{self.repo}/resolve/[^/]+/(.*)", path):
            self._send_file(found[1])
        elif re.fullmatch(rf"/api/(models|datasets)/{self.repo}(/revision/[^/]+)?", path):
            self._send_json({"id": self.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})
        elif found := re.fullmatch(rf"/api/datasets/{self.repo}/tree/[^/]+/?(.*)", path):
            self._send_json(list(self._children(found[1] and found[1] + "/")))
        else:
            self._refuse("RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _children(self, folder: str) -> Iterator[dict[str, Any]]:
        names = [name for name in self.files if name.startswith(folder)]
        for child in sorted({folder + name.removeprefix(folder).split("/")[0] for name in names}):
            kind = "file" if child in self.files else "directory"
            yield {"type": kind, "path": child, "size": len(self.files.get(child, b"")), "oid": "b" * 40}

    def _send_file(self, name: str) -> None:
        if name not in self.files:
            return self._refuse("EntryNotFound")
        content, headers, status = self.files[name], {"ETag": f'"{"c" * 40}"', "X-Repo-Commit": COMMIT}, 200
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(part[1]), int(part[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
            content, status = content[start : stop + 1], 206
        return self._send(status, content, headers)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: str) -> None:
        self._send(404, b"", {"X-Error-Code": code})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
