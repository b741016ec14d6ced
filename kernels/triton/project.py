"""The projector's kernels with mean pooling between its two linear layers, with which it commutes.

`project_tiles` is Linear1 and GELU with the pooling in its epilogue, `add_parts` adds up what its tiles divide,
`project_rows` is Linear2. No contract fixes their bits, only a bound on their error, so the compiler may fuse products
and sums. Every order of addition is fixed all the same: equal calls give equal bits.
"""

import triton
import triton.language as tl

from .elements import elements

# The table's first numbers are the offsets of its sections; project_order.py has the format.
_FRAMES, _PATCHES, _KEPT, _TILES, _SEGMENTS, _TOKENS, _COUNTS = (tl.constexpr(i) for i in range(7))
_SEGMENT = tl.constexpr(4)
_TILE = tl.constexpr(4)


@triton.jit
def _section(table, i):
    return table + tl.load(table + i)


@triton.jit
def _gelu(x):
    """x / 2 (1 + erf(x / sqrt(2))), the exact GELU, closer to it than torch's own in float32.

    log2(erfc(t / sqrt(2)) / 2) is smooth on all of t >= 0: one polynomial is enough, fitted so that the tail keeps its
    leading digits, which 1 + erf cancels. libdevice's erff picks between two: twice the instructions, and spills.
    """
    t = tl.abs(x)
    tail = -8.16835893e-07 * t + 1.41190685e-05
    tail = tail * t - 6.25548564e-05
    tail = tail * t - 4.38325311e-04
    tail = tail * t + 7.45128654e-03
    tail = tail * t - 5.27538359e-02
    tail = tail * t - 4.59128380e-01
    tail = tail * t - 1.15111423e00
    tail = tl.exp2(tail * t - 9.99999821e-01)
    return x * tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def _add_units(x, UNIT: tl.constexpr):
    """[channels, patches] to [channels, patches / UNIT].

    A unit is spread over the first and the last bit of the patch's number (project_order.py). These bits are registers
    of one thread in every layout of the matrix units' sums, so this needs additions and no exchange.
    """
    channels: tl.constexpr = x.shape[0]
    patches: tl.constexpr = x.shape[1]
    if UNIT == 4:
        units = tl.sum(tl.sum(tl.reshape(x, [channels, 2, patches // 4, 2]), 3), 1)
    elif UNIT == 2:
        units = tl.sum(tl.reshape(x, [channels, patches // 2, 2]), 2)
    else:
        units = x
    return units


@triton.jit(
    do_not_specialize=["frame_stride", "patch_stride", "weight_stride", "width", "chunks"],
    do_not_specialize_on_alignment=["bias"],
)
def project_tiles(
    hidden, weight, bias, table, buffer, kept,
    frame_stride: tl.int64, patch_stride: tl.int64, weight_stride: tl.int64, width: tl.int32, chunks: tl.int32,
    EVEN: tl.constexpr, INNER: tl.constexpr, BIAS: tl.constexpr, KEEPS: tl.constexpr, SMALL: tl.constexpr,
    PADDED: tl.constexpr, UNIT: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (tile, chunk): GELU(Linear1) of PATCHES gathered patches in CHANNELS of the INNER channels.

    The product is taken transposed, [channels, patches]: the patches of a channel then lie in the registers of few
    threads, so that a box is added up almost without exchange. Sums are masked, not multiplied by zeros: what is not
    finite stays in its own boxes. Tiles of a chunk's run share A's rows, all of them the weight, through the cache.
    """
    program = tl.program_id(0)
    tile, chunk = program // chunks, program % chunks
    slot = tl.arange(0, PATCHES)
    gathered = tile * PATCHES + slot
    frame, patch = tl.load(_section(table, _FRAMES) + gathered), tl.load(_section(table, _PATCHES) + gathered)
    real = frame >= 0
    if PADDED:
        frame = tl.where(real, frame, ~frame)
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < INNER
    depth = tl.arange(0, DEPTH)
    # Channels past the last repeat it: no mask in the loop, and they are not stored.
    row = weight + tl.minimum(channel, INNER - 1) * elements(weight_stride, VECTOR)
    at = hidden + frame.to(tl.int64) * elements(frame_stride, VECTOR) + patch * elements(patch_stride, VECTOR)
    w_at, x_at = row[:, None] + depth[None, :], at[None, :] + depth[:, None]
    acc = tl.zeros([CHANNELS, PATCHES], tl.float32)
    for k in range(0, width, DEPTH):  # a number of the call: a loop of known length is unrolled, and spills
        if EVEN:
            w, x = tl.load(w_at), tl.load(x_at)
        else:
            w = tl.load(w_at, mask=(k + depth < width)[None, :], other=0.0)
            x = tl.load(x_at, mask=(k + depth < width)[:, None], other=0.0)
        acc = tl.dot(w, x, acc)
        w_at += DEPTH
        x_at += DEPTH
    if BIAS:
        acc += tl.load(bias + channel, mask=present, other=0.0).to(tl.float32)[:, None]
    acc = _gelu(acc)

    tile_at = _section(table, _TILES) + tile * _TILE
    if KEEPS:
        if tl.load(tile_at + 2):
            to = tl.load(_section(table, _KEPT) + gathered)
            kept_at = kept + to.to(tl.int64)[None, :] * INNER + channel[:, None]
            tl.store(kept_at, acc.to(kept.dtype.element_ty), mask=(to >= 0)[None, :] & present[:, None])
    if PADDED:
        acc = tl.where(real[None, :], acc, 0.0)
    units = _add_units(acc, UNIT)
    unit = tl.arange(0, PATCHES // UNIT)
    if SMALL:
        if tl.load(tile_at + 3):
            here = tile * (PATCHES // UNIT) + unit
            token = tl.load(_section(table, _TOKENS) + here)
            token_at = buffer + token.to(tl.int64)[None, :] * INNER + channel[:, None]
            mean = units / tl.load(_section(table, _COUNTS) + here).to(tl.float32)[None, :]
            tl.store(token_at, mean, mask=(token >= 0)[None, :] & present[:, None])
    if UNIT > 1:
        for segment in range(tl.load(tile_at), tl.load(tile_at + 1)):
            segment_at = _section(table, _SEGMENTS) + segment * _SEGMENT
            inside = (unit >= tl.load(segment_at)) & (unit < tl.load(segment_at + 1))
            total = tl.sum(tl.where(inside[None, :], units, 0.0), 1)
            mean = total / tl.load(segment_at + 3).to(tl.float32)
            tl.store(buffer + tl.load(segment_at + 2).to(tl.int64) * INNER + channel, mean, mask=present)


@triton.jit(do_not_specialize=["chunks"])
def add_parts(buffer, sums, chunks: tl.int32, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Program (sum, chunk): row `to` of the buffer is `parts` rows from `first` on, added up in order, by `count`."""
    program = tl.program_id(0)
    at = sums + program // chunks * 4
    to, first, parts, count = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    channel = program % chunks * BLOCK + tl.arange(0, BLOCK)
    present = channel < INNER
    part = buffer + first.to(tl.int64) * INNER + channel
    acc = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        acc += tl.load(part, mask=present)
        part += INNER
    tl.store(buffer + to.to(tl.int64) * INNER + channel, acc / count.to(tl.float32), mask=present)


@triton.jit(
    do_not_specialize=["weight_stride", "out_stride", "rows", "inner"],
    do_not_specialize_on_alignment=["bias"],
)
def project_rows(
    pooled, weight, bias, out,
    weight_stride: tl.int64, out_stride: tl.int64, rows: tl.int32, inner: tl.int32,
    EVEN: tl.constexpr, OUTER: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (chunk, tile): Linear2 of ROWS rows of float32 in CHANNELS of the OUTER channels.

    A row enters as the sum of two 16-bit parts, which hold 16 (bfloat16) or 22 (float16) of its 24 bits; products with
    16-bit weights are exact in float32. The first part is clamped to what is finite, so that a float16 one holds up to
    twice the largest number and no part is infinite for a number that is not.
    """
    program = tl.program_id(0)
    # The tiles that share a chunk of the weight, which is larger than the rows, follow each other.
    tiles = tl.cdiv(rows, ROWS)
    tile, chunk = program % tiles, program // tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)
    depth = tl.arange(0, DEPTH)
    x_at = pooled + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * elements(inner, VECTOR) + depth[None, :]
    w_row = weight + tl.minimum(channel, OUTER - 1) * elements(weight_stride, VECTOR)
    w_at = w_row[None, :] + depth[:, None]
    width = inner * VECTOR
    acc = tl.zeros([ROWS, CHANNELS], tl.float32)
    for k in range(0, width, DEPTH):
        if EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k + depth < width)[None, :], other=0.0)
            w = tl.load(w_at, mask=(k + depth < width)[:, None], other=0.0)
        high = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(w.dtype)
        low = (x - high.to(tl.float32)).to(w.dtype)
        acc = tl.dot(high, w, acc)
        acc = tl.dot(low, w, acc)
        x_at += DEPTH
        w_at += DEPTH
    if BIAS:
        acc += tl.load(bias + channel, mask=channel < OUTER, other=0.0).to(tl.float32)[None, :]
    to = out + row.to(tl.int64)[:, None] * elements(out_stride, VECTOR) + channel[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (channel < OUTER)[None, :])
