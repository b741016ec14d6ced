"""Several videos and questions in one forward pass.

Rows are padded on the right, where causal attention never looks: no mask covers the videos, so the fast attention
kernels can be used. Each decoding step reads the weights once for all rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..model.prompts import Prompt
from .answer import Answer
from .pipeline import Pipeline
from .session import Session
from .stages import Stopwatch

if TYPE_CHECKING:
    from ..model.kv_cache import KvCache
    from ..reduction.prefilling import Place


class Row(NamedTuple):
    """A question of the batch."""

    session: Session
    question: str
    choices: Sequence[str] | None
    prompt: Prompt


def answer_batch(
    pipeline: Pipeline, questions: Sequence[tuple[Session, str, Sequence[str] | None]], max_new_tokens: int
) -> list[Answer]:
    """Answers to (session, question, choices or None), in order; the sessions are new, and closed by the caller."""
    rows = [Row(*asked, pipeline.prompts.prompt(asked[1], asked[2])) for asked in questions]
    for row in rows:
        pipeline.check_context(row.prompt, row.session.tokens["total"], len(row.session.frames), max_new_tokens)
    together = defaultdict(list)
    for number, row in enumerate(rows):
        together[_batch_key(pipeline, row, max_new_tokens)].append(number)
    answers: dict[int, Answer] = {}
    for number in together.pop(None, []):
        row = rows[number]
        answers[number] = row.session.answer(row.question, row.choices, max_new_tokens)
    for numbers in together.values():
        answers |= zip(numbers, _answer_together(pipeline, [rows[number] for number in numbers], max_new_tokens))
    return [answers[number] for number in range(len(rows))]


def _batch_key(pipeline: Pipeline, row: Row, max_new_tokens: int) -> Hashable:
    """Rows with equal keys are answered together; None: a row that is answered alone."""
    # Dynamic RoPE scaling of one row would rescale all of them.
    if pipeline.language.rescales(len(row.prompt) + row.session.tokens["total"] + max_new_tokens):
        return None
    return pipeline.prefilling.batch_key(row.session.place(row.prompt.before))


@torch.inference_mode()
def _answer_together(pipeline: Pipeline, rows: Sequence[Row], max_new_tokens: int) -> list[Answer]:
    clock = Stopwatch(pipeline.device)
    prefixes: dict[tuple[Session, tuple[int, ...]], Tensor] = {}
    for row in rows:
        key = row.session, row.prompt.before
        if key not in prefixes:
            prefixes[key] = row.session.encode(row.prompt.before, clock)[0]
    order = list(prefixes)
    source = [order.index((row.session, row.prompt.before)) for row in rows]
    with clock("prefill"):
        afters = [pipeline.language.embed_tokens(row.prompt.after) for row in rows]
        lengths = [pipeline.prefilling.length(len(prefixes[order[i]])) for i in source]
        capacity = max(lengths) + max(map(len, afters)) + max_new_tokens
        session, before = order[0]  # if places matter, they are the same in all rows
        cache = _prefill(pipeline, list(prefixes.values()), session.place(before), source, capacity)
        logits = pipeline.language.extend_rows(cache, afters, lengths)
    ttft = clock.elapsed()
    lengths = [length + len(after) for length, after in zip(lengths, afters)]
    with clock("generate"):
        ids = pipeline.generate(cache, logits, lengths, max_new_tokens)
    return [
        row.session.make_answer(row.question, row.choices, row.prompt, row_ids, clock, ttft, cache)
        for row, row_ids in zip(rows, ids)
    ]


def _prefill(pipeline: Pipeline, prefixes: list[Tensor], place: Place, source: list[int], capacity: int) -> KvCache:
    """A cache whose row i holds prefix source[i]; each prefix is computed once."""
    language = pipeline.language
    language.forget_scale()
    chosen = pipeline.prefilling.choose(torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True), place)
    cache = language.new_cache(len(prefixes), capacity, chosen.skipped)
    pipeline.prefilling.prefill(cache, chosen, place)
    if len(source) == len(prefixes):
        return cache
    rows = language.new_cache(len(source), capacity, chosen.skipped)
    rows.take(cache, source)
    return rows
