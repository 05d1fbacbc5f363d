"""A web server on this machine that counts what is asked of it, and fails when it is told to."""

from __future__ import annotations

import socket
import threading
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Web:
    """What the server serves, what it has been asked for, and what is to go wrong next."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}"
        self.asked: Counter[str] = Counter()
        # A path's next answers: a status, "cut" (half of the body) or "reset"; then all is well.
        self.faults: dict[str, list[int | str]] = {}


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.lstrip("/"))
        self.web.asked[path] += 1
        faults = self.web.faults.get(path)
        fault = faults.pop(0) if faults else 200
        file = self.web.folder / path
        if isinstance(fault, int) and (fault != 200 or not file.is_file()):
            self.send_error(fault if fault != 200 else 404)
            return
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Web]:
    """Serve a folder on a free port of 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    web = Web(folder, server.server_address[1])
    server.RequestHandlerClass = type("Handler", (_Handler,), {"web": web})
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
