"""What answers in a worker: a model in its own process, or a server that it asks."""

from __future__ import annotations

import base64
import mimetypes
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, VideoError
from ..prompts import pick_option, user_words
from .chat import Chat
from .questions import Question, find_video
from .workers import MakeAnswerer

if TYPE_CHECKING:
    from ..engine import SlowFastLlava
    from ..session import Session

_NEW_TOKENS = 128  # as published; what a server takes by itself is much longer
_DECIDE = ("layout", "frames", "dtype", "projector", "reduction", "decoder", "max_new_tokens")


class ModelAnswerer:
    """A model of this process; questions about the same video, one after another, share its session."""

    def __init__(self, model: SlowFastLlava, videos: Path, max_new_tokens: int | None = None, **opening: Any) -> None:
        self.model, self.videos, self.max_new_tokens, self.opening = model, videos, max_new_tokens, opening
        self.video: str | None = None
        self.session: Session | None = None

    def __call__(self, question: Question) -> dict[str, Any]:
        if question.video != self.video:
            self._open(question.video)
        said = self.session.ask(question.question, question.choices, self.max_new_tokens)
        answer = _answer(said.text, question.choices)
        return answer | {"damage": said.damage} if said.damage else answer

    def _open(self, video: str) -> None:
        if self.session is not None:
            self.session.close(spare=True)
        self.video = self.session = None
        self.session = self.model.open(find_video(self.videos, video), **self.opening)
        self.video = video


class ServerAnswerer:
    """A vLLM server. upload: send the video's bytes, for a server that does not see the same files."""

    def __init__(self, chat: Chat, videos: Path, max_new_tokens: int, upload: bool = False) -> None:
        self.chat, self.videos, self.max_new_tokens = chat, videos, max_new_tokens
        self.url = lru_cache(maxsize=1)(_data_url) if upload else _file_url

    def __call__(self, question: Question) -> dict[str, Any]:
        if not question.question.strip():
            raise InputError("the question is empty: ask something about the video")
        words = user_words(question.question.strip(), question.choices)
        video = {"type": "video_url", "video_url": {"url": self.url(find_video(self.videos, question.video))}}
        content = [video, {"type": "text", "text": words}]
        text = self.chat.reply([{"role": "user", "content": content}], self.max_new_tokens)
        return _answer(text, question.choices)


def model_answerer(model: str | None, videos: Path, **options: Any) -> tuple[MakeAnswerer, dict[str, Any]]:
    """What makes the answerer of each worker, and the settings that decide its answers.

    options: those of `SlowFastLlava.from_pretrained`, `SlowFastLlava.open` and max_new_tokens.
    """
    # Workers may be somewhere else: actors of a cluster are.
    model = os.path.abspath(model) if model and os.path.exists(model) else model
    told = {name: options[name] and str(options[name]) for name in _DECIDE}
    return partial(make_model, model=model, videos=videos.absolute(), **options), {"model": model or "embedded", **told}


def server_answerer(
    url: str,
    model: str | None,
    videos: Path,
    max_new_tokens: int | None = None,
    timeout: float | None = None,
    upload: bool = False,
) -> tuple[MakeAnswerer, dict[str, Any]]:
    """The same for a server; its URL decides nothing, as it may be another one in each job of a cluster."""
    decide = {"model": model, "max_new_tokens": max_new_tokens or _NEW_TOKENS}
    make = partial(make_client, url=url, timeout=timeout, videos=videos, upload=upload, **decide)
    return make, {"server": True, **decide}


def make_model(
    number: int,
    count: int,
    model: str | None,
    videos: Path,
    device: str | None,
    frames: int | None,
    decoder: str,
    max_new_tokens: int | None,
    **options: Any,
) -> ModelAnswerer:
    """The answerer of worker `number` of `count`: a CUDA device each in turn, its part of the CPU's cores."""
    import torch

    from ..engine import SlowFastLlava

    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{number % torch.cuda.device_count()}"
    loaded = SlowFastLlava.from_pretrained(model, device=device, **options)
    return ModelAnswerer(loaded, videos, max_new_tokens, frames=frames, decoder=decoder)


def make_client(
    number: int,
    count: int,
    url: str,
    model: str | None,
    timeout: float | None,
    videos: Path,
    max_new_tokens: int,
    upload: bool,
) -> ServerAnswerer:
    return ServerAnswerer(Chat(url, model, timeout), videos, max_new_tokens, upload)


def _answer(text: str, choices: list[Any] | None) -> dict[str, Any]:
    if choices is None:
        return {"answer": text}
    option = pick_option(text, choices)
    return {"answer": text, "choice": None if option is None else str(choices[option]), "option": option}


def _file_url(video: Path) -> str:
    return video.absolute().as_uri()


def _data_url(video: Path) -> str:
    try:
        data = video.read_bytes()
    except IsADirectoryError as error:
        raise InputError(f"{video} is a folder of frames: a server takes video files") from error
    except OSError as error:
        raise VideoError(f"{video} cannot be read: {error.strerror}") from error
    kind = mimetypes.guess_type(video.name)[0] or "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
