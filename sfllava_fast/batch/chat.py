"""A client of an OpenAI-compatible server, such as vLLM's or a judge's. Each request is one POST of JSON.

Errors never contain the text of a library's exception, which may quote the request's headers and so the key. They name
the URL, the kind of the failure and the server's own reply, with the key removed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import Callable
from threading import Timer
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from ..errors import BackendError, InputError, ServerError, SlowServerError

Json = dict[str, Any]

DEFAULT_TIMEOUT = 600.0
# Too many requests, or a proxy whose server is down or starting.
_BUSY = (408, 429, 502, 503, 504)
_NOT_OURS = (401, 403, 404, 405)
_LONGEST_PAUSE = 30.0
_LARGEST = 16 << 20
_LONGEST_QUOTE = 300  # characters of a server's text


class Chat:
    """A model at a URL such as http://host:8000/v1. The key is read from the environment's OPENAI_API_KEY.

    Redirects are not followed, because the key is for this URL alone.

    Args:
        url: Up to /v1.
        model: None takes the first that the server lists.
        timeout: Seconds for one whole reply (default: 600), even if it arrives bit by bit.
        patience: Seconds to retry, with growing pauses, while the server cannot be reached or is busy.

    Raises:
        InputError: The URL or the key cannot be used.
        BackendError: The server cannot be used; when constructed at once, later after `patience`.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float | None = None, patience: float = 300.0):
        self.url, self._key = check_access(url)
        self.timeout, self.patience = timeout or DEFAULT_TIMEOUT, 0.0
        self._limit = "max_tokens"
        self.model = model or self._first_model()
        self.patience = patience

    def reply(self, messages: list[Json], max_tokens: int) -> str:
        """The text of the model's greedy reply.

        Args:
            messages: In the format of OpenAI's chat completions.
            max_tokens: The longest reply, in tokens.

        Raises:
            InputError: The server refuses this request.
            ServerError: The server fails on this request.
            BackendError: The server cannot be used.
        """
        body = {"model": self.model, "messages": messages, self._limit: max_tokens, "temperature": 0}
        try:
            answer = self._request("/chat/completions", body)
        except InputError as error:
            # Servers of reasoning models accept only the newer name.
            if self._limit != "max_tokens" or "max_completion_tokens" not in str(error):
                raise
            self._limit = "max_completion_tokens"
            return self.reply(messages, max_tokens)
        with contextlib.suppress(LookupError, TypeError):
            text = answer["choices"][0]["message"]["content"]
            if text is None or isinstance(text, str):
                return (text or "").strip()
        raise ServerError(f"{self.url} gave a reply without a message: {self._printable(json.dumps(answer))}")

    def _first_model(self) -> str:
        answer = self._request("/models")
        with contextlib.suppress(LookupError, TypeError):
            if isinstance(answer["data"][0]["id"], str):
                return answer["data"][0]["id"]
        raise BackendError(f"{self.url} names no model: name one")

    def _request(self, path: str, body: Json | None = None) -> Any:
        give_up, pause = time.monotonic() + self.patience, 1.0
        while True:
            try:
                return self._send(path, body)
            except _Unavailable as error:
                if time.monotonic() + pause > give_up:
                    raise BackendError(f"{self.url} cannot be used ({error}): see to it, then run again") from None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _send(self, path: str, body: Json | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = _WatchedRequest(self.url + path, data, headers, self.timeout)
        watch = request.watch
        try:
            status, reason, reply = _exchange(request)
        except (OSError, http.client.HTTPException) as error:  # an URLError is an OSError
            if watch.expired or isinstance(error, TimeoutError):
                raise SlowServerError(f"{self.url} gave no reply within {self.timeout:g} seconds") from None
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(error, URLError) and not isinstance(cause, (BrokenPipeError, ConnectionResetError)):
                raise _Unavailable(_kind(cause)) from None
            raise ServerError(f"{self.url} broke off ({_kind(cause)})") from None
        finally:
            watch.cancel()
        if watch.expired:
            raise SlowServerError(f"{self.url} gave no reply within {self.timeout:g} seconds")
        if len(reply) > _LARGEST:
            raise ServerError(f"{self.url} gave a reply of more than {_LARGEST >> 20} MiB")
        if not 200 <= status < 300:
            raise self._judge(status, self._printable(_message(reply) or reason))
        try:
            return json.loads(reply)
        except (ValueError, RecursionError):
            text = self._printable(reply.decode(errors="replace"))
            raise ServerError(f"{self.url} gave a reply that is not JSON: {text!r}") from None

    def _judge(self, code: int, message: str) -> Exception:
        """The error for a status code."""
        if code in _BUSY:
            return _Unavailable(f"{code} {message}")
        if 300 <= code < 400:
            return BackendError(f"{self.url} redirects ({code}), which is not followed: name the URL it redirects to")
        if code in _NOT_OURS:
            return BackendError(f"{self.url} says {code} {message}: check URL, model and OPENAI_API_KEY")
        return (ServerError if code >= 500 else InputError)(f"{self.url} says {code} {message}")

    def _printable(self, text: str) -> str:
        """The beginning of a server's text, in one line and without the key, plain or as JSON escapes it."""
        for key in filter(None, (self._key, json.dumps(self._key or "")[1:-1])):
            text = text.replace(key, "***")
        return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split())[:_LONGEST_QUOTE])


class _Unavailable(Exception):
    """The server cannot be asked now."""


class _Watch:
    """Shuts a connection down after a time; a socket's own timeout restarts with every byte that arrives."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.expired = seconds, False
        self._timer: Timer | None = None
        self._connected: socket.socket | None = None

    def start(self, connected: socket.socket) -> None:
        self._connected = connected.dup()  # TLS detaches the original
        self._timer = Timer(self.seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        if self._timer is not None and self._connected is not None:
            self._timer.cancel()
            self._connected.close()

    def _cut(self) -> None:
        self.expired = True
        if self._connected is not None:
            with contextlib.suppress(OSError):
                self._connected.shutdown(socket.SHUT_RDWR)


class _WatchedRequest(Request):
    def __init__(self, url: str, data: bytes | None, headers: dict[str, str], seconds: float) -> None:
        super().__init__(url, data, headers)
        self.watch = _Watch(seconds)


def _watched(http_class: Any, request: Request) -> Callable[..., Any]:
    """Starts the watch of a request when it is connected, before the TLS handshake."""

    def make(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
        connection = http_class(*args, **kwargs)
        connect = connection._create_connection

        def connect_watched(*args: Any, **kwargs: Any) -> socket.socket:
            connected = connect(*args, **kwargs)
            if isinstance(request, _WatchedRequest):
                request.watch.start(connected)
            return connected

        connection._create_connection = connect_watched
        return connection

    return make


class _Http(HTTPHandler):
    def do_open(self, http_class: Any, req: Request, **options: Any) -> http.client.HTTPResponse:
        return super().do_open(_watched(http_class, req), req, **options)


class _Https(HTTPSHandler):
    def do_open(self, http_class: Any, req: Request, **options: Any) -> http.client.HTTPResponse:
        return super().do_open(_watched(http_class, req), req, **options)


class _NoRedirects(HTTPRedirectHandler):
    def http_error_302(self, *_: Any) -> None:
        """Returns None, so that a redirect is reported as an error like any other status."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302  # type: ignore[assignment]


def _exchange(request: _WatchedRequest) -> tuple[int, str, bytes]:
    """Status, its name and body of a reply; at most `_LARGEST` + 1 bytes of the body."""
    try:
        response = build_opener(_Http, _Https, _NoRedirects).open(request, timeout=request.watch.seconds)
    except HTTPError as error:
        response = error
    with response:
        return response.status, str(response.reason), response.read(_LARGEST + 1)


def check_access(url: str) -> tuple[str, str]:
    """The URL of a server up to /v1, and the key of the environment.

    Raises:
        InputError: The URL or the key cannot be used.
    """
    return _checked_url(url), _key()


def _checked_url(url: str) -> str:
    """The URL up to /v1. The InputError for a URL that may contain a secret does not repeat it."""
    if any(mark in url for mark in "@?#"):
        raise InputError(
            "the URL of a server must have no user name, password, query or fragment: write http://host:8000/v1, and "
            "put its key into OPENAI_API_KEY"
        )
    with contextlib.suppress(ValueError):  # a port that is not a number, unbalanced brackets
        parts = urlsplit(url)
        readable = url.isascii() and url.isprintable() and " " not in url and parts.port != 0
        if readable and parts.scheme in ("http", "https") and parts.hostname:
            return url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
    raise InputError(f"{url!r} is not the URL of a server: write http://host:8000/v1")


def _key() -> str:
    """The key of the environment, without surrounding blanks and line ends."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError("OPENAI_API_KEY has a control or non-ASCII character: set it to the key alone")
    return key


def _kind(error: object) -> str:
    """The operating system's text for a failure, or its type; never a library's text."""
    return getattr(error, "strerror", None) or type(error).__name__


def _message(data: bytes) -> str:
    """The error message in the body of a reply."""
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, AttributeError, RecursionError):
        error = json.loads(text)
        error = error.get("error", error)
        text = str(error["message"] if isinstance(error, dict) else error)
    return text
