"""A client of an OpenAI-compatible server: vLLM's, or a judge's. One POST of JSON a request: no library needed.

What a library says of a request may hold its headers, and the key with them, so no text of a library gets into an
error: a message names the URL, the kind of the failure, and what the server itself replied without the key.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import time
from threading import Timer
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from ..errors import BackendError, InputError, ServerError, SlowServerError

Json = dict[str, Any]

DEFAULT_TIMEOUT = 600.0
# Too many requests; or a proxy in front of a server that is down or starting.
_BUSY = (408, 429, 502, 503, 504)
_NOT_OURS = (401, 403, 404, 405)
_LONGEST_PAUSE = 30.0
_LARGEST = 16 << 20
_TOLD = 300


class Chat:
    """A model behind a URL such as http://host:8000/v1; its key is taken from the environment's OPENAI_API_KEY.

    model: None takes the first that the server has. timeout: seconds for one whole reply (default: 600), however slowly
    it comes. patience: seconds to wait, in longer and longer pauses, for a server that cannot be reached or is busy.
    Redirects are not followed: the key is for this URL alone.

    Raises InputError for a URL or key that cannot be used, BackendError where nothing can be asked there: on
    construction at once, later when patience is at its end.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float | None = None, patience: float = 300.0):
        self.url, self._key = check_access(url)
        self.timeout, self.patience = timeout or DEFAULT_TIMEOUT, 0.0
        self._limit = "max_tokens"
        self.model = model or self._first_model()
        self.patience = patience

    def reply(self, messages: list[Json], max_tokens: int) -> str:
        """The text of the model's greedy reply.

        Raises InputError where the server refuses this request, ServerError where it fails on it.
        """
        body = {"model": self.model, "messages": messages, self._limit: max_tokens, "temperature": 0}
        try:
            answer = self._request("/chat/completions", body)
        except InputError as error:
            # Servers of models that think take the newer name alone.
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
        request = Request(self.url + path, None if body is None else json.dumps(body).encode(), headers)
        request.watch = watch = _Watch(self.timeout)
        try:
            status, reason, data = _exchange(request)
        except (OSError, http.client.HTTPException) as error:  # an URLError is an OSError
            if watch.over or isinstance(error, TimeoutError):
                raise SlowServerError(f"{self.url} gave no reply within {self.timeout:g} seconds") from None
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(error, URLError) and not isinstance(cause, (BrokenPipeError, ConnectionResetError)):
                raise _Unavailable(_kind(cause)) from None
            raise ServerError(f"{self.url} broke off ({_kind(cause)})") from None
        finally:
            watch.cancel()
        if watch.over:
            raise SlowServerError(f"{self.url} gave no reply within {self.timeout:g} seconds")
        if len(data) > _LARGEST:
            raise ServerError(f"{self.url} gave a reply of more than {_LARGEST >> 20} MiB")
        if not 200 <= status < 300:
            raise self._judge(status, self._printable(_message(data) or reason))
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            text = self._printable(data.decode(errors="replace"))
            raise ServerError(f"{self.url} gave a reply that is not JSON: {text!r}") from None

    def _judge(self, code: int, message: str) -> Exception:
        """The error that a status code stands for."""
        if code in _BUSY:
            return _Unavailable(f"{code} {message}")
        if 300 <= code < 400:
            return BackendError(f"{self.url} redirects ({code}), which is not followed: name the URL it redirects to")
        if code in _NOT_OURS:
            return BackendError(f"{self.url} says {code} {message}: check URL, model and OPENAI_API_KEY")
        return (ServerError if code >= 500 else InputError)(f"{self.url} says {code} {message}")

    def _printable(self, text: str) -> str:
        """The beginning of a server's text in a line; some repeat the key."""
        for key in filter(None, (self._key, json.dumps(self._key or "")[1:-1])):  # as it is, and as it stands in JSON
            text = text.replace(key, "***")
        return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split())[:_TOLD])


class _Unavailable(Exception):
    """The server cannot be asked now."""


class _Watch:
    """Cuts a connection off when its time is over: a socket's own time-out begins again with every byte that comes."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.over = seconds, False
        self._timer: Timer | None = None
        self._connected: socket.socket | None = None

    def start(self, connected: socket.socket) -> None:
        self._connected = connected.dup()  # TLS takes the other one over
        self._timer = Timer(self.seconds, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._connected.close()

    def _cut(self) -> None:
        self.over = True
        with contextlib.suppress(OSError):
            self._connected.shutdown(socket.SHUT_RDWR)


class _Watched:
    """Has the watch of a request begin when it is connected, before the handshake of TLS."""

    def do_open(self, http_class: Any, request: Request, **options: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
            connection = http_class(*args, **kwargs)
            connect = connection._create_connection

            def connect_watched(*args: Any, **kwargs: Any) -> socket.socket:
                connected = connect(*args, **kwargs)
                request.watch.start(connected)
                return connected

            connection._create_connection = connect_watched
            return connection

        return super().do_open(make, request, **options)


class _Http(_Watched, HTTPHandler):
    pass


class _Https(_Watched, HTTPSHandler):
    pass


class _NoRedirects(HTTPRedirectHandler):
    def http_error_302(self, *_: Any) -> None:
        """None: the reply is an error, as any other status; where it points to is not even read."""

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _exchange(request: Request) -> tuple[int, str, bytes]:
    """Status, its name and body of a reply, of the body no more than shows that it is too long."""
    try:
        response = build_opener(_Http, _Https, _NoRedirects).open(request, timeout=request.watch.seconds)
    except HTTPError as error:
        response = error
    with response:
        return response.status, str(response.reason), response.read(_LARGEST + 1)


def check_access(url: str) -> tuple[str, str]:
    """The URL of a server up to /v1, and the key of the environment. Raises InputError for what cannot be used."""
    return _checked_url(url), _key()


def _checked_url(url: str) -> str:
    """The URL up to /v1. Raises InputError for others; one that may hold a secret is not repeated."""
    if any(mark in url for mark in "@?#"):
        raise InputError(
            "the URL of a server has no user name, password, query or fragment: write http://host:8000/v1, and put its "
            "key into OPENAI_API_KEY"
        )
    with contextlib.suppress(ValueError):  # a port that is no number, brackets that do not close
        parts = urlsplit(url)
        readable = url.isascii() and url.isprintable() and " " not in url and parts.port != 0
        if readable and parts.scheme in ("http", "https") and parts.hostname:
            return url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
    raise InputError(f"{url!r} is not the URL of a server: write http://host:8000/v1")


def _key() -> str:
    """The key of the environment, without the blanks and line ends that files leave around it."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError("OPENAI_API_KEY holds a control character or one beyond ASCII: set it to the key alone")
    return key


def _kind(error: object) -> str:
    """What is said of a failure: the system's words for it, never a library's."""
    return getattr(error, "strerror", None) or type(error).__name__


def _message(data: bytes) -> str:
    """What the body says of an error."""
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, AttributeError, RecursionError):
        told = json.loads(text)
        told = told.get("error", told)
        text = str(told["message"] if isinstance(told, dict) else told)
    return text
