"""What a worker asks: a model in its own process, or a server."""

from __future__ import annotations

import base64
import mimetypes
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, SfllavaError, VideoError, first_line
from ..model.prompts import check_question, pick_option, user_words
from .chat import Chat, check_access
from .questions import Question, find_video
from .stamps import stamp_checkpoint, stamp_video
from .workers import MakeAnswerer

if TYPE_CHECKING:
    from ..engine.options import ModelOptions
    from ..engine.session import Session
    from ..engine.slowfast_llava import SlowFastLlava

MAX_UPLOAD = 256  # MiB of a video that is sent
_KEPT = 32 << 20  # characters of a video that are kept for the next question
_NEW_TOKENS = 128  # as published; a server's own default is much longer
_DECIDE = ("layout", "dtype", "projector", "reduction")  # options that change answers


class ModelAnswerer:
    """A model in this process. Consecutive questions about one video share a session."""

    def __init__(self, model: SlowFastLlava, videos: Path, max_new_tokens: int | None = None, **opening: Any) -> None:
        self.model, self.videos, self.max_new_tokens, self.opening = model, videos, max_new_tokens, opening
        self.video: str | None = None
        self.session: Session | None = None

    def __call__(self, question: Question) -> dict[str, Any]:
        if self.session is None or question.video != self.video:
            self.session = self._open(question.video)
        answer = self.session.ask(question.question, question.choices, self.max_new_tokens)
        fields = {name: text for name in ("caveat", "damage") if (text := getattr(answer, name))}
        if question.choices is not None and self.model.pipeline.prompts.asks_openly:
            fields["openly"] = True  # a letter in the answer names no choice
        return _answer(answer.text, question.choices, answer.option) | fields

    def _open(self, video: str) -> Session:
        if self.session is not None:
            self.session.close(spare=True)
        self.video = self.session = None
        path = find_video(self.videos, video)
        try:
            session = self.model.open(path, **self.opening)
        except SfllavaError:
            raise
        except Exception as error:  # of any kind: it is the video's fault, not the question's
            raise VideoError(f"{path} cannot be opened ({type(error).__name__}: {first_line(error)})") from error
        self.video = video
        return session


class ServerAnswerer:
    """A vLLM server.

    Args:
        chat: The server.
        videos: Folder of the videos.
        max_new_tokens: Where an answer is cut.
        upload: Send the video's bytes, for a server that cannot read the files. Only videos under `videos` are sent.
        upload_any: Send other videos, too.
        max_upload: Largest video to send, in MiB.
    """

    def __init__(
        self,
        chat: Chat,
        videos: Path,
        max_new_tokens: int,
        upload: bool = False,
        upload_any: bool = False,
        max_upload: int = MAX_UPLOAD,
    ) -> None:
        self.chat, self.videos, self.max_new_tokens = chat, videos, max_new_tokens
        self._upload = upload or upload_any
        self._data_url = partial(_data_url, folder=None if upload_any else videos, most=max_upload)
        self._kept: tuple[Path | None, str] = None, ""

    def __call__(self, question: Question) -> dict[str, Any]:
        check_question(question.question, question.choices)
        words = user_words(question.question, question.choices)
        video = {"type": "video_url", "video_url": {"url": self._url(find_video(self.videos, question.video))}}
        content = [video, {"type": "text", "text": words}]
        text = self.chat.reply([{"role": "user", "content": content}], self.max_new_tokens)
        option = None if question.choices is None else pick_option(text, question.choices)
        return _answer(text, question.choices, option)

    def _url(self, video: Path) -> str:
        """The URL of a file, or its bytes; those of a small video are kept for the next question about it."""
        if not self._upload:
            return _file_url(video)
        if self._kept[0] == video:
            return self._kept[1]
        self._kept = None, ""  # before the next one takes memory
        url = self._data_url(video)
        if len(url) <= _KEPT:
            self._kept = video, url
        return url


def model_answerer(
    model: str | None,
    videos: Path,
    options: ModelOptions,
    frames: int | None,
    decoder: str,
    max_new_tokens: int | None,
) -> tuple[MakeAnswerer, dict[str, Any]]:
    """A function that makes the answerer of each worker, and the settings that decide its answers."""
    # Workers may run in other folders: actors of a cluster do.
    model = os.path.abspath(model) if model and os.path.exists(model) else model
    chosen = {name: getattr(options, name) for name in _DECIDE}
    chosen |= {"frames": frames, "decoder": decoder, "max_new_tokens": max_new_tokens}
    settings = {
        "model": model or "embedded",
        **{name: value and str(value) for name, value in chosen.items()},
        "model_files": model and stamp_checkpoint(model),
        "reduction_file": _reduction_file(options.reduction),
    }
    make = partial(
        make_model,
        model=model,
        videos=videos.absolute(),
        options=options,
        frames=frames,
        decoder=decoder,
        max_new_tokens=max_new_tokens,
    )
    return make, settings


def _reduction_file(reduction: object) -> str | None:
    """The stamp of the file that a reduction is read from, if there is one."""
    from ..reduction.settings import parse_reduction

    file = getattr(parse_reduction(reduction), "file", None) if isinstance(reduction, str) else None
    return file and stamp_video(file)


def server_answerer(
    url: str,
    model: str | None,
    videos: Path,
    max_new_tokens: int | None = None,
    timeout: float | None = None,
    upload: bool = False,
    upload_any: bool = False,
    max_upload: int = MAX_UPLOAD,
) -> tuple[MakeAnswerer, dict[str, Any]]:
    """The same for a server. Its URL is no setting: it may differ in each job of a cluster. Its model is one: without
    `model`, the server is asked for the name of its own."""
    check_access(url)  # once and early, not in each worker
    model, most = model or Chat(url).model, max_new_tokens or _NEW_TOKENS
    make = partial(
        make_client,
        url=url,
        model=model,
        timeout=timeout,
        videos=videos,
        max_new_tokens=most,
        upload=upload,
        upload_any=upload_any,
        max_upload=max_upload,
    )
    return make, {"server": True, "model": model, "max_new_tokens": most}


def make_model(
    number: int,
    count: int,
    model: str | None,
    videos: Path,
    options: ModelOptions,
    frames: int | None,
    decoder: str,
    max_new_tokens: int | None,
) -> ModelAnswerer:
    """The answerer of worker `number` of `count`: each has the next CUDA device in turn, and its part of the cores."""
    import torch

    from ..engine.slowfast_llava import SlowFastLlava

    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    if options.device in (None, "cuda") and torch.cuda.is_available():
        options = replace(options, device=f"cuda:{number % torch.cuda.device_count()}")
    return ModelAnswerer(SlowFastLlava.load(model, options), videos, max_new_tokens, frames=frames, decoder=decoder)


def make_client(
    number: int,
    count: int,
    url: str,
    model: str | None,
    timeout: float | None,
    videos: Path,
    max_new_tokens: int,
    **send: Any,
) -> ServerAnswerer:
    return ServerAnswerer(Chat(url, model, timeout), videos, max_new_tokens, **send)


def _answer(text: str, choices: list[Any] | None, option: int | None) -> dict[str, Any]:
    if choices is None:
        return {"answer": text}
    return {"answer": text, "choice": None if option is None else str(choices[option]), "option": option}


def _file_url(video: Path) -> str:
    try:
        return video.absolute().as_uri()
    except UnicodeEncodeError as error:
        raise VideoError(f"{str(video)!a} is no name that a file can have") from error


def _data_url(video: Path, folder: Path | None, most: int) -> str:
    """The bytes of a video as a data: URL.

    A question file names the video, so it may name any file. Refused are files outside `folder` (None: no limit), also
    by a link, files of more than `most` MiB, and files that are no video.
    """
    from ..video import open_video

    try:
        file = video.resolve(strict=True)
        inside = folder is None or file.is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "no file has that name"
        raise VideoError(f"{str(video)!a} cannot be read: {reason}") from error
    if not inside:
        raise InputError(f"{video} is not under {folder}, so it is not sent: move it there, or give --upload-any")
    if file.is_dir():
        raise InputError(f"{video} is a folder of frames: a server takes video files")
    try:
        size = file.stat().st_size
        if size > most << 20:
            limit = f"{video} has {size / 2**20:.1f} MiB, and the limit is {most}"
            raise InputError(f"{limit}: cut or compress it, or raise --max-upload")
        open_video(file)
        with file.open("rb") as opened:
            data = opened.read(size)
    except OSError as error:
        raise VideoError(f"{video} cannot be read: {error.strerror}") from error
    kind = mimetypes.guess_type(video.name)[0] or "video/mp4"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
