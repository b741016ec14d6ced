"""A client of an OpenAI-compatible server: vLLM's, or a judge's. One POST of JSON a request: no library needed."""

from __future__ import annotations

import http.client
import json
import os
import time
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ..errors import BackendError, InputError, ServerError

Json = dict[str, Any]

# Too many requests; or a proxy in front of a server that is down or starting.
_BUSY = (408, 429, 502, 503, 504)
_NOT_OURS = (401, 403, 404, 405)
_LONGEST_PAUSE = 30.0
_TOLD = 300


class Chat:
    """A model behind a URL such as http://host:8000/v1; its key is taken from the environment's OPENAI_API_KEY.

    model: None takes the first that the server has. timeout: seconds for one reply. patience: seconds to wait, in
    longer and longer pauses, for a server that cannot be reached or is busy.

    Raises BackendError where nothing can be asked there: on construction at once, later when patience is at its end.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float | None = None, patience: float = 300.0):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(f"{url!r} is not the URL of a server: write http://host:8000/v1")
        self.url = url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
        self.timeout, self.patience = timeout, 0.0
        self.model = model or self._first_model()
        self.patience = patience

    def reply(self, messages: list[Json], max_tokens: int) -> str:
        """The text of the model's greedy reply.

        Raises InputError where the server refuses this request, ServerError where it fails on it.
        """
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        answer = self._request("/chat/completions", body)
        try:
            return str(answer["choices"][0]["message"]["content"] or "").strip()
        except (LookupError, TypeError) as error:
            raise ServerError(f"{self.url} gave a reply without a message: {json.dumps(answer)[:_TOLD]}") from error

    def _first_model(self) -> str:
        answer = self._request("/models")
        try:
            return answer["data"][0]["id"]
        except (LookupError, TypeError) as error:
            raise BackendError(f"{self.url} names no model: name one") from error

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
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, headers), timeout=self.timeout) as response:
                return json.load(response)
        except HTTPError as error:
            raise self._judge(error.code, _message(error)) from error
        except URLError as error:
            if isinstance(error.reason, (BrokenPipeError, ConnectionResetError)):
                raise ServerError(f"{self.url} broke off while it was sent the request") from error
            raise _Unavailable(error.reason) from error
        except TimeoutError as error:
            raise ServerError(f"{self.url} gave no reply in time") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServerError(f"{self.url} broke off ({type(error).__name__}: {error})") from error

    def _judge(self, code: int, message: str) -> Exception:
        """The error that a status code stands for."""
        if code in _BUSY:
            return _Unavailable(f"{code} {message}")
        if code in _NOT_OURS:
            return BackendError(f"{self.url} says {code} {message}: check URL, model and OPENAI_API_KEY")
        return (ServerError if code >= 500 else InputError)(f"{self.url} says {code} {message}")


class _Unavailable(Exception):
    """The server cannot be asked now."""


def _message(error: HTTPError) -> str:
    """What the body says of an error, in a line."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        text = ""
    try:
        told = json.loads(text)
        told = told.get("error", told)
        text = told["message"] if isinstance(told, dict) else str(told)
    except (ValueError, KeyError, AttributeError):
        pass
    return " ".join((text or error.reason or "").split())[:_TOLD]
