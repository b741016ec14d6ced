"""The forward kernels: `pool_tiles` where pathways nest, `pool_boxes` for every plan.

A program is one warp and handles BLOCK channels. Elements enter a box in (frame, row, column) order and a mean divides
by frames, rows and columns in turn, so results equal the reference bit for bit. Addresses are 64 bits wide; strides
and channels are counted in vectors of VECTOR elements, which tells the compiler how far every address is aligned.
"""

import triton
import triton.language as tl

# The table's format is in csrc/include/sfllava/plan.h.
_HEADER = tl.constexpr(8)
_PATHWAY = tl.constexpr(11)
_FIRST_PATCH, _HEIGHT, _WIDTH, _REDUCE, _ROWS, _FIRST_ROW, _COLS, _FIRST_COL, _ROW_COVER, _COL_COVER, _PITCH = (
    tl.constexpr(i) for i in range(11)
)
_ITEM = tl.constexpr(4)
_MAX, _MEAN, _LINEAR = (tl.constexpr(i) for i in range(3))
# Columns of a box whose loads are in flight together.
_COLUMNS = tl.constexpr(4)

_NUMBERS = ["frame_stride", "patch_stride", "token_stride", "channels", "chunks", "groups_at", "items_at"]


@triton.jit
def _beats(x, best):
    """Where x is the maximum so far: a max keeps the first of equals and passes NaN on."""
    return (x > best) | (x != x)


@triton.jit
def _join(acc, x, MEAN: tl.constexpr):
    """One more element of a box."""
    x = x.to(tl.float32)
    if MEAN:
        return acc + x
    return tl.where(_beats(x, acc), x, acc)


@triton.jit
def _neutral(like, MEAN: tl.constexpr):
    """What every box starts from: adding 0.0 changes no sum, and nothing is less than -inf."""
    return tl.full(like.shape, 0.0 if MEAN else float("-inf"), tl.float32)


@triton.jit
def _divide(acc, count):
    """acc / count rounded as IEEE has it, which `/` is not."""
    if count != 1:
        acc = tl.div_rn(acc, tl.full(acc.shape, count, tl.float32))
    return acc


@triton.jit
def _halve(acc, COUNT: tl.constexpr):
    """`_divide` by 1 or 2."""
    return acc * 0.5 if COUNT == 2 else acc


@triton.jit
def _elements(vectors, VECTOR: tl.constexpr):
    """A stride as a multiple of VECTOR elements: 64 bits, so that what it is multiplied with becomes that too."""
    return vectors.to(tl.int64) * VECTOR


@triton.jit
def _channels(chunk, channels, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of a chunk's channels, and which of them there are."""
    channel = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return channel, channel < _elements(channels, VECTOR)


@triton.jit
def _bin(bins, i):
    """Start and stop of the table's bin i."""
    return tl.load(bins + 2 * i), tl.load(bins + 2 * i + 1)


@triton.jit
def _second_weight(i, count, length, start, stop):
    """The weight of a linear bin's second element, bin i of `count` on an axis of `length`; 0 without one.

    How far the middle of segment i lies past `start`: less than 1, so numbers that wrap on the way do no harm.
    """
    past = (2 * i + 1) * length - count - 2 * count * start
    weight = tl.div_rn(past.to(tl.float32), (2 * count).to(tl.float32))
    return tl.where(stop - start == 2, weight, 0.0)


@triton.jit
def _weight(second_weight, element):
    """The weight of a linear bin's element, 0 or 1."""
    return tl.where(element == 0, 1.0 - second_weight, second_weight)


@triton.jit
def _pool_box(
    features, channel, present, box, second_weights, first_patch, width, frame_stride, patch_stride,
    REDUCE: tl.constexpr,
):  # fmt: skip
    """The box reduced to one value a channel; a sum is not divided yet. second_weights: its row's and its column's."""
    frame_begin, frame_end, row_begin, row_end, col_begin, col_end = box
    sums: tl.constexpr = REDUCE != _MAX
    acc = _neutral(channel, sums)
    for frame in range(frame_begin, frame_end):
        for row in range(row_begin, row_end):
            line = features + frame * frame_stride + (first_patch + row * width) * patch_stride + channel
            for first in range(col_begin, col_end, _COLUMNS):
                for step in tl.static_range(_COLUMNS):
                    col = first + step
                    inside = present & (col < col_end)
                    x = tl.load(line + col * patch_stride, mask=inside, other=0.0 if sums else float("-inf"))
                    if REDUCE == _LINEAR:
                        row_second, col_second = second_weights
                        weight = _weight(row_second, row - row_begin) * _weight(col_second, col - col_begin)
                        x = x.to(tl.float32) * weight
                    acc = _join(acc, x, sums)
    return acc


@triton.jit(do_not_specialize=[*_NUMBERS, "splits", "bins_at"])
def pool_boxes(
    features, table, out,
    frame_stride: tl.int64, patch_stride: tl.int64, token_stride: tl.int64, channels: tl.int64, chunks: tl.int32,
    groups_at: tl.int32, items_at: tl.int32, bins_at: tl.int32, splits: tl.int32,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Every box of any plan; program (group, split, chunk) takes every `splits`-th box of each of the group's items.

    Group by group, so that the cache serves the second pathway's read of a frame.
    """
    program = tl.program_id(0)
    channel, present = _channels(program % chunks, channels, BLOCK, VECTOR)
    split, group = program // chunks % splits, program // chunks // splits
    frame_stride, patch_stride = _elements(frame_stride, VECTOR), _elements(patch_stride, VECTOR)
    token_stride = _elements(token_stride, VECTOR)
    for item in range(tl.load(table + groups_at + group), tl.load(table + groups_at + group + 1)):
        item_at = table + items_at + item * _ITEM
        path_at = table + _HEADER + tl.load(item_at) * _PATHWAY
        frame_begin, frame_end, first_token = tl.load(item_at + 1), tl.load(item_at + 2), tl.load(item_at + 3)
        first_patch, width = tl.load(path_at + _FIRST_PATCH), tl.load(path_at + _WIDTH)
        reduce, pitch = tl.load(path_at + _REDUCE), tl.load(path_at + _PITCH)
        rows, cols = tl.load(path_at + _ROWS), tl.load(path_at + _COLS)
        first_row, first_col = tl.load(path_at + _FIRST_ROW), tl.load(path_at + _FIRST_COL)
        for number in range(split, rows * cols, splits):
            row, col = number // cols, number % cols
            row_begin, row_end = _bin(table + bins_at, first_row + row)
            col_begin, col_end = _bin(table + bins_at, first_col + col)
            box = frame_begin, frame_end, row_begin, row_end, col_begin, col_end
            if reduce == _MAX:
                acc = _pool_box(
                    features, channel, present, box, (), first_patch, width, frame_stride, patch_stride, _MAX
                )
            elif reduce == _MEAN:
                acc = _pool_box(
                    features, channel, present, box, (), first_patch, width, frame_stride, patch_stride, _MEAN
                )
                acc = _divide(acc, frame_end - frame_begin)
                acc = _divide(acc, row_end - row_begin)
                acc = _divide(acc, col_end - col_begin)
            else:
                row_second = _second_weight(row, rows, tl.load(path_at + _HEIGHT), row_begin, row_end)
                col_second = _second_weight(col, cols, width, col_begin, col_end)
                acc = _pool_box(
                    features, channel, present, box, (row_second, col_second), first_patch, width,
                    frame_stride, patch_stride, _LINEAR,
                )  # fmt: skip
                acc = _divide(acc, frame_end - frame_begin)
            token = first_token + row * pitch + col
            tl.store(out + token * token_stride + channel, acc.to(out.dtype.element_ty), mask=present)


@triton.jit
def _load_strip(at, present, line_stride, patch_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ROWS x COLS patches, row by row: all loads are issued before the first store of the strip can hold one back."""
    strip = ()
    for row in tl.static_range(ROWS):
        for col in tl.static_range(COLS):
            strip = strip + (tl.load(at + (row * line_stride + col * patch_stride), mask=present),)
    return strip


@triton.jit
def _store_fine(
    strip, to, present, token_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The ROWS x COLS boxes of a strip, the first at `to`."""
    for box in tl.static_range(WIDTH // COLS):
        acc = tl.full(present.shape, 0.0 if MEAN else float("-inf"), tl.float32)
        for row in tl.static_range(ROWS):
            for col in tl.static_range(COLS):
                acc = _join(acc, strip[row * WIDTH + box * COLS + col], MEAN)
        if MEAN:
            acc = _halve(_halve(acc, ROWS), COLS)
        tl.store(to + box * token_stride, acc.to(to.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=[*_NUMBERS, "width", "tiles", "tile_cols", "strips", "fine_cols"])
def pool_tiles(
    features, table, out,
    frame_stride: tl.int64, patch_stride: tl.int64, token_stride: tl.int64, channels: tl.int64, chunks: tl.int32,
    groups_at: tl.int32, items_at: tl.int32,
    width: tl.int32, tiles: tl.int32, tile_cols: tl.int32, strips: tl.int32, fine_cols: tl.int32,
    TILE_WIDTH: tl.constexpr, FINE_ROWS: tl.constexpr, FINE_COLS: tl.constexpr, FINE_MEAN: tl.constexpr,
    REPEATS: tl.constexpr, EVERY_FRAME: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Both pathways from one read where the fine one's boxes nest in the coarse one's (tiling.py).

    Program (group, tile, chunk) reads one box of the coarse mean from one frame, strip by strip: a strip is one row of
    fine boxes, stored to each of the group's fine items: none on most frames, several only with REPEATS. With
    EVERY_FRAME a group's number is its frame's, so that no patch waits for the table.
    """
    program = tl.program_id(0)
    channel, present = _channels(program % chunks, channels, BLOCK, VECTOR)
    tile, group = program // chunks % tiles, program // chunks // tiles
    frame_stride, patch_stride = _elements(frame_stride, VECTOR), _elements(patch_stride, VECTOR)
    token_stride = _elements(token_stride, VECTOR)
    first, coarse = tl.load(table + groups_at + group), tl.load(table + groups_at + group + 1) - 1
    coarse_at = table + items_at + coarse * _ITEM
    frame, coarse_token = group if EVERY_FRAME else tl.load(coarse_at + 1), tl.load(coarse_at + 3) + tile
    fine_row, col = tile // tile_cols * strips, tile % tile_cols * TILE_WIDTH
    line_stride = patch_stride * width
    at = features + frame * frame_stride + fine_row * (line_stride * FINE_ROWS) + col * patch_stride + channel
    box = fine_row * fine_cols + col // FINE_COLS
    acc = _neutral(channel, True)
    for _ in range(strips):
        strip = _load_strip(at, present, line_stride, patch_stride, FINE_ROWS, TILE_WIDTH)
        for i in tl.static_range(FINE_ROWS * TILE_WIDTH):
            acc = _join(acc, strip[i], True)
        if REPEATS:
            for item in range(first, coarse):
                token = tl.load(table + items_at + item * _ITEM + 3) + box
                _store_fine(
                    strip, out + token * token_stride + channel, present, token_stride,
                    TILE_WIDTH, FINE_ROWS, FINE_COLS, FINE_MEAN,
                )  # fmt: skip
        elif first < coarse:
            token = tl.load(table + items_at + first * _ITEM + 3) + box
            _store_fine(
                strip, out + token * token_stride + channel, present, token_stride,
                TILE_WIDTH, FINE_ROWS, FINE_COLS, FINE_MEAN,
            )  # fmt: skip
        at += line_stride * FINE_ROWS
        box += fine_cols
    acc = _divide(acc, strips * FINE_ROWS)
    acc = _divide(acc, TILE_WIDTH)
    tl.store(out + coarse_token * token_stride + channel, acc.to(out.dtype.element_ty), mask=present)
