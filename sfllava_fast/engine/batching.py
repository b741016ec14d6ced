"""Several videos and questions in one forward pass.

Rows of different lengths are padded on the right, where causal attention never looks: no mask over the videos, so the
fast attention kernels serve; every step of decoding reads the weights once for all rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.prompts import Prompt
from .answer import Answer
from .session import Session
from .stages import Stopwatch

if TYPE_CHECKING:
    from ..model.kv_cache import KvCache
    from ..reduction.prefilling import Place
    from .pipeline import Pipeline

Asked = tuple[Session, str, Sequence[str] | None, Prompt]


def answer_batch(
    model: Pipeline, questions: Sequence[tuple[Session, str, Sequence[str] | None]], max_new_tokens: int
) -> list[Answer]:
    """Answers to (session, question, choices or None), in order; the sessions are new ones, to be closed behind it."""
    asked = [(session, question, choices, model.prompt(question, choices)) for session, question, choices in questions]
    for session, _, _, prompt in asked:
        model.check_context(prompt, session.plan.tokens["total"], len(session.frames), max_new_tokens)
    alike = defaultdict(list)
    for row in asked:
        alike[_kind(model, row, max_new_tokens)].append(row)
    answers = {}
    for kind, rows in alike.items():
        if kind is not None:
            answers |= zip(map(id, rows), _answer_together(model, rows, max_new_tokens))
    return [answers[id(row)] if id(row) in answers else row[0].answer(row[1], row[2], max_new_tokens) for row in asked]


def _kind(model: Pipeline, row: Asked, max_new_tokens: int) -> Hashable:
    """Rows of one kind can be answered together; those of kind None cannot, with any other."""
    session, _, _, prompt = row
    # Its rotary embedding would rescale that of all rows.
    if model.language.rescales(len(prompt) + session.plan.tokens["total"] + max_new_tokens):
        return None
    return model.prefilling.kind(session.place(prompt.before))


@torch.inference_mode()
def _answer_together(model: Pipeline, asked: Sequence[Asked], max_new_tokens: int) -> list[Answer]:
    clock = Stopwatch(model.device)
    prefixes: dict[tuple[Session, tuple[int, ...]], Tensor] = {}
    for session, _, _, prompt in asked:
        key = session, prompt.before
        if key not in prefixes:
            prefixes[key] = session.encode(prompt.before, clock)[0]
    order = list(prefixes)
    source = [order.index((session, prompt.before)) for session, _, _, prompt in asked]
    with clock("prefill"):
        afters = [model.language.embed_tokens(prompt.after) for *_, prompt in asked]
        lengths = [len(prefixes[order[i]]) + model.prefilling.adds for i in source]
        capacity = max(lengths) + max(map(len, afters)) + max_new_tokens
        session, before = order[0]  # of rows whose places matter, all have the same
        cache = _prefill(model, list(prefixes.values()), session.place(before), source, capacity)
        logits = model.language.extend_rows(cache, afters, lengths)
    first = clock.elapsed()
    lengths = [length + len(after) for length, after in zip(lengths, afters)]
    with clock("generate"):
        ids = model.generate(cache, logits, lengths, max_new_tokens)
    return [session.make_answer(*row, row_ids, clock, first, cache) for (session, *row), row_ids in zip(asked, ids)]


def _prefill(model: Pipeline, prefixes: list[Tensor], place: Place, source: list[int], capacity: int) -> KvCache:
    """A cache whose row i holds prefix source[i]; each is computed once."""
    language = model.language
    language.forget_scale()
    chosen = model.prefilling.choose(torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True), place)
    cache = language.new_cache(len(prefixes), capacity, chosen.skipped)
    model.prefilling.prefill(cache, chosen, place)
    if len(source) == len(prefixes):
        return cache
    rows = language.new_cache(len(source), capacity, chosen.skipped)
    rows.take(cache, source)
    return rows
