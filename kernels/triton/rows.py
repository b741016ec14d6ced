"""Kernels for rows of hidden states: the best of each frame, gather and scatter.

Copies are of bits: tensors are passed as integers of their dtype's size. Strides and channels are counted in vectors of
VECTOR elements, as in elements.py. Every index is checked: rows outside of a tensor are neither read nor written.
"""

import triton
import triton.language as tl

from .elements import elements

_FRAME = tl.constexpr(4)
_BITS = tl.constexpr(32)


@triton.jit(do_not_specialize=["batch_stride", "stride", "frames", "places"])
def top_per_frame(
    scores, table, kept, nan, batch_stride: tl.int64, stride: tl.int64, frames: tl.int32, places: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (batch, frame): which of a frame's at most BLOCK scores are kept.

    Scores become integers that order as they do, NaN above all; the last one kept is found bit by bit, and of those
    that equal it the first are taken.
    """
    program = tl.program_id(0)
    batch, frame = (program // frames).to(tl.int64), table + program % frames * _FRAME
    begin, tokens, keep, first = tl.load(frame), tl.load(frame + 1), tl.load(frame + 2), tl.load(frame + 3)
    at = tl.arange(0, BLOCK)
    present = at < tokens
    score_at = scores + batch * batch_stride + (begin - tl.load(table) + at) * stride
    score = tl.load(score_at, mask=present, other=0.0).to(tl.float32)
    is_nan = score != score
    if tl.max(is_nan.to(tl.int32), 0) > 0:
        tl.store(nan, 1)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    signed = tl.where(is_nan, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    key = tl.where(present, signed.to(tl.int64) + 0x80000000, -1)
    last = tl.zeros([1], tl.int64)
    for bit in range(_BITS):
        higher = last + (tl.full([1], 1, tl.int64) << (_BITS - 1 - bit))
        last = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= keep, higher, last)
    above, equal = key > last, key == last
    room = keep - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    place = first + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(kept + batch * places + place, (begin + at).to(tl.int64), mask=chosen)


@triton.jit
def _copy_row(source, to, channels, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    width = elements(channels, VECTOR)
    for start in range(0, width, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        tl.store(to + channel, tl.load(source + channel, mask=channel < width), mask=channel < width)


@triton.jit(
    do_not_specialize=[
        "index_batch", "index_stride", "places", "tokens",
        "batch0", "row0", "channels0", "batch1", "row1", "channels1", "batch2", "row2", "channels2",
    ],
)  # fmt: skip
def gather_rows(
    index, from0, to0, from1, to1, from2, to2,
    index_batch: tl.int64, index_stride: tl.int64, places: tl.int32, tokens: tl.int64,
    batch0: tl.int64, row0: tl.int64, channels0: tl.int32, batch1: tl.int64, row1: tl.int64, channels1: tl.int32,
    batch2: tl.int64, row2: tl.int64, channels2: tl.int32,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (batch, place): one row of each of COUNT tensors."""
    program = tl.program_id(0).to(tl.int64)
    batch, place = program // places, program % places
    row = tl.load(index + batch * index_batch + place * index_stride)
    if (row >= 0) & (row < tokens):
        source = from0 + batch * elements(batch0, VECTOR) + row * elements(row0, VECTOR)
        _copy_row(source, to0 + program * elements(channels0, VECTOR), channels0, BLOCK, VECTOR)
        if COUNT > 1:
            source = from1 + batch * elements(batch1, VECTOR) + row * elements(row1, VECTOR)
            _copy_row(source, to1 + program * elements(channels1, VECTOR), channels1, BLOCK, VECTOR)
        if COUNT > 2:
            source = from2 + batch * elements(batch2, VECTOR) + row * elements(row2, VECTOR)
            _copy_row(source, to2 + program * elements(channels2, VECTOR), channels2, BLOCK, VECTOR)


@triton.jit
def _blend(before, row, weight):
    before = before.to(tl.float32)
    return before + weight * (row.to(tl.float32) - before)


_SCATTER_NUMBERS = [
    "index_batch", "index_stride", "places", "tokens", "hidden_batch", "hidden_row", "rows_batch", "rows_row",
    "out_batch", "out_row", "channels",
]  # fmt: skip


@triton.jit(do_not_specialize=["half", *_SCATTER_NUMBERS], do_not_specialize_on_alignment=["weights"])
def scatter_rows(
    index, hidden, rows, weights, out,
    index_batch: tl.int64, index_stride: tl.int64, places: tl.int32, tokens: tl.int32,
    hidden_batch: tl.int64, hidden_row: tl.int64, rows_batch: tl.int64, rows_row: tl.int64,
    out_batch: tl.int64, out_row: tl.int64, channels: tl.int32, half: tl.int32,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (batch, ROWS tokens): copies hidden's rows, or those of `rows` for tokens of the index, which ascends.

    half: the largest power of two that is not larger than `places`; 0 for no places.
    """
    blocks = tl.cdiv(tokens, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    present = token < tokens
    index += batch * index_batch
    place = tl.zeros([ROWS], tl.int32)  # how many places are before the token
    while half > 0:
        last = place + half - 1
        before = tl.load(index + last * index_stride, mask=last < places, other=0) < token
        place = tl.where((last < places) & before, place + half, place)
        half = half // 2
    found = present & (place < places)
    found = found & (tl.load(index + place * index_stride, mask=found, other=-1) == token)
    read = present if WEIGHTED else present & (found == 0)
    hidden += batch * elements(hidden_batch, VECTOR) + token[:, None] * elements(hidden_row, VECTOR)
    rows += batch * elements(rows_batch, VECTOR) + place[:, None] * elements(rows_row, VECTOR)
    out += batch * elements(out_batch, VECTOR) + token[:, None] * elements(out_row, VECTOR)
    if WEIGHTED:
        weight = tl.load(weights + batch * places + place, mask=found, other=0.0)[:, None]
    width = elements(channels, VECTOR)
    for start in range(0, width, BLOCK):
        channel = (start + tl.arange(0, BLOCK))[None, :]
        inside = channel < width
        kept = tl.load(hidden + channel, mask=read[:, None] & inside)
        row = tl.load(rows + channel, mask=found[:, None] & inside)
        if WEIGHTED:
            row = _blend(kept, row, weight).to(out.dtype.element_ty)
        tl.store(out + channel, tl.where(found[:, None], row, kept), mask=present[:, None] & inside)


@triton.jit(do_not_specialize=_SCATTER_NUMBERS, do_not_specialize_on_alignment=["weights"])
def scatter_rows_in_place(
    index, hidden, rows, weights, out,
    index_batch: tl.int64, index_stride: tl.int64, places: tl.int32, tokens: tl.int32,
    hidden_batch: tl.int64, hidden_row: tl.int64, rows_batch: tl.int64, rows_row: tl.int64,
    out_batch: tl.int64, out_row: tl.int64, channels: tl.int32,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (batch, place): `scatter_rows` into hidden itself: only rows of the index change."""
    batch, place = (tl.program_id(0) // places).to(tl.int64), tl.program_id(0) % places
    token = tl.load(index + batch * index_batch + place * index_stride)
    if (token >= 0) & (token < tokens):
        rows += batch * elements(rows_batch, VECTOR) + place * elements(rows_row, VECTOR)
        out += batch * elements(out_batch, VECTOR) + token * elements(out_row, VECTOR)
        if WEIGHTED:
            weight = tl.load(weights + batch * places + place)
        width = elements(channels, VECTOR)
        for start in range(0, width, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            row = tl.load(rows + channel, mask=channel < width)
            if WEIGHTED:
                row = _blend(tl.load(out + channel, mask=channel < width), row, weight).to(out.dtype.element_ty)
            tl.store(out + channel, row, mask=channel < width)
