"""A small OpenAI-compatible server in a thread; the test defines its answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class OpenAiServer(ThreadingHTTPServer):
    """A server of chat completions.

    Attributes:
        requests: Bodies of the chat requests so far, in order.
        headers: Headers of the last request.
        models: Names of its models.
        answer: Called with a body; returns the text of the reply, (status, body of an error), a function that writes
            the reply to a binary file, or None to close the connection.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any]], Any], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.requests = answer, []
        self.models = ["first", "second"]
        self.headers: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        """A client that has left is no error of the test's."""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.headers = dict(self.headers)
        self._send(200, {"data": [{"id": name} for name in self.server.models]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.headers = dict(self.headers)
        self.server.requests.append(body)
        said = self.server.answer(body)
        if isinstance(said, str):
            self._send(200, {"choices": [{"message": {"role": "assistant", "content": said}}]})
        elif callable(said):
            said(self.wfile)
        elif said is not None:
            self._send(*said)

    def _send(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Any], port: int = 0) -> Iterator[OpenAiServer]:
    server = OpenAiServer(answer, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
