"""The forward kernels: `pool_tiles` for pathways that nest, `pool_boxes` for every plan.

A program is one warp and handles BLOCK channels. Elements enter a box in (frame, row, column) order and a mean divides
by frames, rows and columns in turn, so results equal the reference bit for bit. Addresses are 64 bits wide.
"""

import triton
import triton.language as tl

from .elements import (
    COL_BINS,
    FIRST_COL_BIN,
    FIRST_PATCH,
    FIRST_ROW_BIN,
    FIRST_TOKEN,
    FRAME_BEGIN,
    FRAME_END,
    GRID_HEIGHT,
    GRID_WIDTH,
    HEADER_SIZE,
    ITEM_SIZE,
    PATHWAY_SIZE,
    PITCH,
    REDUCE_LINEAR,
    REDUCE_MAX,
    REDUCE_MEAN,
    REDUCTION,
    ROW_BINS,
    chunk_channels,
    divide,
    element_weight,
    elements,
    halve,
    join,
    load_bin,
    load_strip,
    neutral,
    second_weight,
)

# Columns of a box whose loads are in flight together.
_COLUMNS = tl.constexpr(4)

_NUMBERS = ["frame_stride", "patch_stride", "token_stride", "channels", "chunks", "groups_at", "items_at"]


@triton.jit
def _pool_box(
    features, channel, present, box, second_weights, first_patch, width, frame_stride, patch_stride,
    REDUCE: tl.constexpr,
):  # fmt: skip
    """The box reduced to one value a channel; a sum is not divided yet. second_weights: its row's and its column's."""
    frame_begin, frame_end, row_begin, row_end, col_begin, col_end = box
    sums: tl.constexpr = REDUCE != REDUCE_MAX
    acc = neutral(channel, sums)
    for frame in range(frame_begin, frame_end):
        for row in range(row_begin, row_end):
            line = features + frame * frame_stride + (first_patch + row * width) * patch_stride + channel
            for first in range(col_begin, col_end, _COLUMNS):
                for step in tl.static_range(_COLUMNS):
                    col = first + step
                    inside = present & (col < col_end)
                    x = tl.load(line + col * patch_stride, mask=inside, other=0.0 if sums else float("-inf"))
                    if REDUCE == REDUCE_LINEAR:
                        row_second, col_second = second_weights
                        weight = element_weight(row_second, row - row_begin)
                        weight *= element_weight(col_second, col - col_begin)
                        x = x.to(tl.float32) * weight
                    acc = join(acc, x, sums)
    return acc


@triton.jit(do_not_specialize=[*_NUMBERS, "splits", "bins_at"])
def pool_boxes(
    features, table, out,
    frame_stride: tl.int64, patch_stride: tl.int64, token_stride: tl.int64, channels: tl.int64, chunks: tl.int32,
    groups_at: tl.int32, items_at: tl.int32, bins_at: tl.int32, splits: tl.int32,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Every box of any plan; program (group, split, chunk) takes every `splits`-th box of each of the group's items.

    Group by group, so that the second pathway reads a frame from the cache.
    """
    program = tl.program_id(0)
    channel, present = chunk_channels(program % chunks, channels, BLOCK, VECTOR)
    split, group = program // chunks % splits, program // chunks // splits
    frame_stride, patch_stride = elements(frame_stride, VECTOR), elements(patch_stride, VECTOR)
    token_stride = elements(token_stride, VECTOR)
    for item in range(tl.load(table + groups_at + group), tl.load(table + groups_at + group + 1)):
        item_at = table + items_at + item * ITEM_SIZE
        path_at = table + HEADER_SIZE + tl.load(item_at) * PATHWAY_SIZE
        frame_begin, frame_end, first_token = (
            tl.load(item_at + FRAME_BEGIN),
            tl.load(item_at + FRAME_END),
            tl.load(item_at + FIRST_TOKEN),
        )
        first_patch, width = tl.load(path_at + FIRST_PATCH), tl.load(path_at + GRID_WIDTH)
        reduce, pitch = tl.load(path_at + REDUCTION), tl.load(path_at + PITCH)
        rows, cols = tl.load(path_at + ROW_BINS), tl.load(path_at + COL_BINS)
        first_row, first_col = tl.load(path_at + FIRST_ROW_BIN), tl.load(path_at + FIRST_COL_BIN)
        for number in range(split, rows * cols, splits):
            row, col = number // cols, number % cols
            row_begin, row_end = load_bin(table + bins_at, first_row + row)
            col_begin, col_end = load_bin(table + bins_at, first_col + col)
            box = frame_begin, frame_end, row_begin, row_end, col_begin, col_end
            if reduce == REDUCE_MAX:
                acc = _pool_box(
                    features, channel, present, box, (), first_patch, width, frame_stride, patch_stride, REDUCE_MAX
                )
            elif reduce == REDUCE_MEAN:
                acc = _pool_box(
                    features, channel, present, box, (), first_patch, width, frame_stride, patch_stride, REDUCE_MEAN
                )
                acc = divide(acc, frame_end - frame_begin)
                acc = divide(acc, row_end - row_begin)
                acc = divide(acc, col_end - col_begin)
            else:
                row_second = second_weight(row, rows, tl.load(path_at + GRID_HEIGHT), row_begin, row_end)
                col_second = second_weight(col, cols, width, col_begin, col_end)
                acc = _pool_box(
                    features, channel, present, box, (row_second, col_second), first_patch, width,
                    frame_stride, patch_stride, REDUCE_LINEAR,
                )  # fmt: skip
                acc = divide(acc, frame_end - frame_begin)
            token = first_token + row * pitch + col
            tl.store(out + token * token_stride + channel, acc.to(out.dtype.element_ty), mask=present)


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
                acc = join(acc, strip[row * WIDTH + box * COLS + col], MEAN)
        if MEAN:
            acc = halve(halve(acc, ROWS), COLS)
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
    """Both pathways from one read, for fine boxes that nest in coarse ones (tiling.py).

    Program (group, tile, chunk) reads one box of the coarse mean from one frame, strip by strip: a strip is one row of
    fine boxes, stored to each of the group's fine items: none on most frames, several only with REPEATS. With
    EVERY_FRAME a group's number is its frame's, so that no patch waits for the table.
    """
    program = tl.program_id(0)
    channel, present = chunk_channels(program % chunks, channels, BLOCK, VECTOR)
    tile, group = program // chunks % tiles, program // chunks // tiles
    frame_stride, patch_stride = elements(frame_stride, VECTOR), elements(patch_stride, VECTOR)
    token_stride = elements(token_stride, VECTOR)
    first, coarse = tl.load(table + groups_at + group), tl.load(table + groups_at + group + 1) - 1
    coarse_at = table + items_at + coarse * ITEM_SIZE
    frame, coarse_token = (
        group if EVERY_FRAME else tl.load(coarse_at + FRAME_BEGIN),
        tl.load(coarse_at + FIRST_TOKEN) + tile,
    )
    fine_row, col = tile // tile_cols * strips, tile % tile_cols * TILE_WIDTH
    line_stride = patch_stride * width
    at = features + frame * frame_stride + fine_row * (line_stride * FINE_ROWS) + col * patch_stride + channel
    box = fine_row * fine_cols + col // FINE_COLS
    acc = neutral(channel, True)
    for _ in range(strips):
        strip = load_strip(at, present, line_stride, patch_stride, FINE_ROWS, TILE_WIDTH)
        for i in tl.static_range(FINE_ROWS * TILE_WIDTH):
            acc = join(acc, strip[i], True)
        if REPEATS:
            for item in range(first, coarse):
                token = tl.load(table + items_at + item * ITEM_SIZE + FIRST_TOKEN) + box
                _store_fine(
                    strip, out + token * token_stride + channel, present, token_stride,
                    TILE_WIDTH, FINE_ROWS, FINE_COLS, FINE_MEAN,
                )  # fmt: skip
        elif first < coarse:
            token = tl.load(table + items_at + first * ITEM_SIZE + FIRST_TOKEN) + box
            _store_fine(
                strip, out + token * token_stride + channel, present, token_stride,
                TILE_WIDTH, FINE_ROWS, FINE_COLS, FINE_MEAN,
            )  # fmt: skip
        at += line_stride * FINE_ROWS
        box += fine_cols
    acc = divide(acc, strips * FINE_ROWS)
    acc = divide(acc, TILE_WIDTH)
    tl.store(out + coarse_token * token_stride + channel, acc.to(out.dtype.element_ty), mask=present)
