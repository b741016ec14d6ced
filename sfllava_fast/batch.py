"""Several videos and questions in one forward pass.

Rows of different lengths are padded on the right, where causal attention never looks: no mask over the videos, so the
fast attention kernels serve; every step of decoding reads the weights once for all rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .answer import Answer
from .errors import InputError
from .kv_cache import KvCache
from .prompts import Prompt
from .session import Session
from .stages import Stopwatch

if TYPE_CHECKING:
    from .engine import SlowFastLlava

Asked = tuple[Session, str, Sequence[str] | None, Prompt]


def answer_batch(
    model: SlowFastLlava,
    questions: Sequence[Sequence],
    frames: int | None,
    decoder: str,
    max_new_tokens: int | None,
) -> list[Answer]:
    """What `SlowFastLlava.answer_batch` does."""
    max_new_tokens = model.check_new_tokens(max_new_tokens)
    clock = Stopwatch(model.device)
    asked = _read(model, questions, frames, decoder, max_new_tokens)
    sessions = {session for session, *_ in asked}
    try:
        together = [row for row in asked if not _is_rescaled(model, row, max_new_tokens)]
        answers = dict(zip(map(id, together), _answer_together(model, together, max_new_tokens, clock)))
        return [
            answers[id(row)] if id(row) in answers else row[0].ask(row[1], row[2], max_new_tokens) for row in asked
        ]
    finally:
        for session in sessions:
            session.close()


def _read(
    model: SlowFastLlava, questions: Sequence[Sequence], frames: int | None, decoder: str, max_new_tokens: int
) -> list[Asked]:
    """The questions with their sessions, one for each video, and prompts; every bad one is found before any work."""
    sessions: dict[object, Session] = {}
    asked = []
    for number, entry in enumerate(questions):
        if isinstance(entry, str) or not 2 <= len(entry) <= 3:
            raise InputError(f"entry {number} of the batch must be (video, question) or (video, question, choices)")
        video, question, choices = (*entry, None)[:3]
        key = os.fspath(video) if isinstance(video, (str, os.PathLike)) else id(video)
        if key not in sessions:
            sessions[key] = model.open(video, frames, decoder)
        session, prompt = sessions[key], model.prompt(question, choices)
        model.check_context(prompt, session.plan.tokens["total"], len(session.frames), max_new_tokens)
        asked.append((session, question, choices, prompt))
    return asked


def _is_rescaled(model: SlowFastLlava, row: Asked, max_new_tokens: int) -> bool:
    """Whether a row's rotary embedding would rescale that of all rows."""
    session, _, _, prompt = row
    return model.language.rescales(len(prompt) + session.plan.tokens["total"] + max_new_tokens)


@torch.inference_mode()
def _answer_together(
    model: SlowFastLlava, asked: Sequence[Asked], max_new_tokens: int, clock: Stopwatch
) -> list[Answer]:
    if not asked:
        return []
    prefixes: dict[tuple[Session, tuple[int, ...]], Tensor] = {}
    for session, _, _, prompt in asked:
        key = session, prompt.before
        if key not in prefixes:
            prefixes[key] = session.encode(prompt.before, clock)[0]
    order = list(prefixes)
    source = [order.index((session, prompt.before)) for session, _, _, prompt in asked]
    with clock("prefill"):
        afters = [model.language.embed_tokens(prompt.after) for *_, prompt in asked]
        lengths = [len(prefixes[order[i]]) for i in source]
        capacity = max(lengths) + max(map(len, afters)) + max_new_tokens
        cache = _prefill(model, list(prefixes.values()), source, capacity)
        logits = model.language.extend_rows(cache, afters, lengths)
    first = clock.elapsed()
    lengths = [length + len(after) for length, after in zip(lengths, afters)]
    with clock("generate"):
        ids = model.generate(cache, logits, lengths, max_new_tokens)
    return [model.make_answer(*row, row_ids, clock, first) for row, row_ids in zip(asked, ids)]


def _prefill(model: SlowFastLlava, prefixes: list[Tensor], source: list[int], capacity: int) -> KvCache:
    """A cache whose row i holds prefix source[i]; each is computed once."""
    language = model.language
    language.forget_scale()
    cache = language.new_cache(len(prefixes), capacity)
    language.prefill(cache, torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True))
    if len(source) == len(prefixes):
        return cache
    rows = language.new_cache(len(source), capacity)
    rows.take(cache, source)
    return rows
