"""A server on this machine that speaks the Hugging Face Hub's protocol for files, and its ways of failing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 39 + "1"


@dataclass
class Hub:
    """What the server has and does.

    Attributes
    ----------
    files
        Content by ``owner/repository/file``; the revision is always main.
    fault
        ``""``; ``"error"``: answers 500; ``"half"``: sends half of each file and hangs up; ``"wrong"``: sends other
        bytes than it describes.
    asked
        Method and path of each request.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    fault: str = ""
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the server on a free port of this machine; its address is ``hub.url`` meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            repository, _, file = self.path.lstrip("/").partition("/resolve/main/")
            content = hub.files.get(f"{repository}/{file}")
            if hub.fault == "error" or content is None:
                known = any(name.startswith(f"{repository}/") for name in hub.files)
                self.send_response(500 if hub.fault == "error" else 404)
                if hub.fault != "error":
                    self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                    self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for name, value in {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                "ETag": '"of-the-server"',
                "Content-Length": str(len(content)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                sent = content[: len(content) // 2] if hub.fault == "half" else content
                self.wfile.write(bytes(len(sent)) if hub.fault == "wrong" else sent)
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
