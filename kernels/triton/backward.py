"""The backward kernels: `spread_tiles` for pathways that nest and leave no patch out, `spread_boxes` for every plan.

Each patch's gradient is written once: contributions are added in float32 in the order of the tokens, as the reference
does, and rounded once.
"""

import triton
import triton.language as tl

from .elements import (
    COL_BINS,
    COL_COVER,
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
    REDUCE_MAX,
    REDUCE_MEAN,
    REDUCTION,
    ROW_BINS,
    ROW_COVER,
    beats,
    chunk_channels,
    divide,
    element_weight,
    elements,
    halve,
    load_bin,
    load_strip,
    neutral,
    second_weight,
)

# Columns of a box whose loads are in flight together: the maxima of known layouts are no wider.
_COLUMNS = tl.constexpr(2)


@triton.jit
def _wins(
    features, channel, present, frame, patch, box, first_patch, width, frame_stride, patch_stride, VECTOR: tl.constexpr
):  # fmt: skip
    """In which channels the box's maximum is this patch of this frame: the first of equals, or the last NaN."""
    frame_begin, frame_end, row_begin, row_end, col_begin, col_end = box
    best = neutral(channel, False)
    first = (frame_begin == frame) & (first_patch + row_begin * width + col_begin == patch)
    wins = tl.full(channel.shape, 1, tl.int1) & first  # if all of the box is -inf
    for box_frame in range(frame_begin, frame_end):
        for row in range(row_begin, row_end):
            for first_col in range(col_begin, col_end, _COLUMNS):
                for step in tl.static_range(_COLUMNS):
                    here = first_patch + row * width + first_col + step
                    at = features + (box_frame * frame_stride + here * patch_stride) * VECTOR + channel
                    inside = present & (first_col + step < col_end)
                    x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
                    better = beats(x, best)
                    best = tl.where(better, x, best)
                    wins = tl.where(better, (box_frame == frame) & (here == patch), wins)
    return wins


@triton.jit(
    do_not_specialize=[
        "frame_stride", "patch_stride", "token_stride", "channels", "chunks", "items_at", "frames_at", "readers_at",
        "bins_at", "patches", "splits",
    ]
)  # fmt: skip
def spread_boxes(
    grad, features, table, out,
    frame_stride: tl.int64, patch_stride: tl.int64, token_stride: tl.int64, channels: tl.int64, chunks: tl.int32,
    items_at: tl.int32, frames_at: tl.int32, readers_at: tl.int32, bins_at: tl.int32,
    patches: tl.int32, splits: tl.int32,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (frame, split, chunk) takes a run of the frame's patches, which share tokens, hence the cache.

    `out` [T, N, D] is contiguous. Strides become elements, and numbers are loaded, only at their use: registers
    are scarce.
    """
    program = tl.program_id(0)
    channel, present = chunk_channels(program % chunks, channels, BLOCK, VECTOR)
    split, frame = program // chunks % splits, program // chunks // splits
    frame_stride, patch_stride = frame_stride.to(tl.int64), patch_stride.to(tl.int64)
    token_stride, patch_step = token_stride.to(tl.int64), channels.to(tl.int64)
    bins = table + bins_at
    reader_begin, reader_end = tl.load(table + frames_at + frame), tl.load(table + frames_at + frame + 1)
    run = tl.cdiv(patches, splits)
    for patch in range(split * run, tl.minimum(split * run + run, patches)):
        acc = neutral(channel, True)
        for reader in range(reader_begin, reader_end):
            item_at = table + items_at + tl.load(table + readers_at + reader) * ITEM_SIZE
            path_at = table + HEADER_SIZE + tl.load(item_at) * PATHWAY_SIZE
            frame_begin, frame_end, first_token = (
                tl.load(item_at + FRAME_BEGIN),
                tl.load(item_at + FRAME_END),
                tl.load(item_at + FIRST_TOKEN),
            )
            first_patch, width = tl.load(path_at + FIRST_PATCH), tl.load(path_at + GRID_WIDTH)
            first_row, first_col = tl.load(path_at + FIRST_ROW_BIN), tl.load(path_at + FIRST_COL_BIN)
            reduce, pitch = tl.load(path_at + REDUCTION), tl.load(path_at + PITCH)
            place = patch - first_patch
            if (place >= 0) & (place < tl.load(path_at + GRID_HEIGHT) * width):
                row_begin, row_end = load_bin(bins, tl.load(path_at + ROW_COVER) + place // width)
                col_begin, col_end = load_bin(bins, tl.load(path_at + COL_COVER) + place % width)
                for row in range(row_begin, row_end):
                    for col in range(col_begin, col_end):
                        top, bottom = load_bin(bins, first_row + row)
                        left, right = load_bin(bins, first_col + col)
                        token = first_token + row * pitch + col
                        share_at = grad + token * token_stride * VECTOR + channel
                        if reduce == REDUCE_MAX:
                            wins = _wins(
                                features, channel, present, frame, patch,
                                (frame_begin, frame_end, top, bottom, left, right),
                                first_patch, width, frame_stride, patch_stride, VECTOR,
                            )  # fmt: skip
                            share = tl.where(wins, tl.load(share_at, mask=present).to(tl.float32), 0.0)
                        else:
                            share = tl.load(share_at, mask=present).to(tl.float32)
                            share = divide(share, frame_end - frame_begin)
                            if reduce == REDUCE_MEAN:
                                share = divide(share, bottom - top)
                                share = divide(share, right - left)
                            else:
                                height, rows = tl.load(path_at + GRID_HEIGHT), tl.load(path_at + ROW_BINS)
                                row_second = second_weight(row, rows, height, top, bottom)
                                col_second = second_weight(col, tl.load(path_at + COL_BINS), width, left, right)
                                row_weight = element_weight(row_second, place // width - top)
                                share *= row_weight * element_weight(col_second, place % width - left)
                        acc += share
        to = out + (frame.to(tl.int64) * patches + patch) * patch_step * VECTOR + channel
        tl.store(to, acc.to(out.dtype.element_ty), mask=present)


@triton.jit
def _winner(strip, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which element of the box that begins at `first` its maximum is: the first of equals, or the last NaN."""
    best = strip[first].to(tl.float32)
    winner = tl.zeros(best.shape, tl.int32)
    for i in tl.static_range(1, ROWS * COLS):
        x = strip[first + i // COLS * WIDTH + i % COLS].to(tl.float32)
        better = beats(x, best)
        best = tl.where(better, x, best)
        winner = tl.where(better, i, winner)
    return winner


@triton.jit
def _load_boxes(
    at, grad_at, present, line_stride, patch_stride, token_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """A strip's patches, if a maximum is to be found, and the gradients of its boxes' tokens in one item."""
    patches = () if MEAN else load_strip(at, present, line_stride, patch_stride, ROWS, WIDTH)
    return patches, load_strip(grad_at, present, 0, token_stride, 1, WIDTH // COLS)


@triton.jit
def _add_shares(sums, grads, ROWS: tl.constexpr, COLS: tl.constexpr, MEAN: tl.constexpr):
    """`sums`, box by box, plus the shares of each box's elements in an item's `grads`."""
    added = ()
    for box in tl.static_range(len(sums)):
        grad = grads[box].to(tl.float32)
        if MEAN:
            grad = halve(halve(grad, ROWS), COLS)
        added = added + (sums[box] + grad,)
    return added


@triton.jit
def _store_strip(
    patches, sums, to, coarse, present, line_step, patch_step,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Gradients of a strip of fine boxes: of its `patches`, from the boxes' own `sums` and `coarse`."""
    for box in tl.static_range(WIDTH // COLS):
        if not MEAN:
            winner = _winner(patches, box * COLS, WIDTH, ROWS, COLS)
        for i in tl.static_range(ROWS * COLS):
            mine = (sums[box] if MEAN else tl.where(winner == i, sums[box], 0.0)) + coarse
            step = i // COLS * line_step + (box * COLS + i % COLS) * patch_step
            tl.store(to + step, mine.to(to.dtype.element_ty), mask=present)


@triton.jit(
    do_not_specialize=[
        "frame_stride", "patch_stride", "token_stride", "channels", "chunks", "groups_at", "items_at", "patches",
        "width", "tiles", "tile_cols", "strips", "fine_cols",
    ]
)  # fmt: skip
def spread_tiles(
    grad, features, table, out,
    frame_stride: tl.int64, patch_stride: tl.int64, token_stride: tl.int64, channels: tl.int64, chunks: tl.int32,
    groups_at: tl.int32, items_at: tl.int32, patches: tl.int32,
    width: tl.int32, tiles: tl.int32, tile_cols: tl.int32, strips: tl.int32, fine_cols: tl.int32,
    TILE_WIDTH: tl.constexpr, FINE_ROWS: tl.constexpr, FINE_COLS: tl.constexpr, FINE_MEAN: tl.constexpr,
    REPEATS: tl.constexpr, EVERY_FRAME: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (group, tile, chunk) as in pool_tiles; each gradient row is read once. `out` [T, N, D] is contiguous.

    The loads of the next strip are issued before this one's numbers are used: ptxas moves loads to their use, one wait
    after the other, but not across iterations of the loop.
    """
    program = tl.program_id(0)
    channel, present = chunk_channels(program % chunks, channels, BLOCK, VECTOR)
    tile, group = program // chunks % tiles, program // chunks // tiles
    frame_stride, patch_stride = elements(frame_stride, VECTOR), elements(patch_stride, VECTOR)
    token_stride, patch_step = elements(token_stride, VECTOR), elements(channels, VECTOR)
    first, last = tl.load(table + groups_at + group), tl.load(table + groups_at + group + 1) - 1
    last_at = table + items_at + last * ITEM_SIZE
    frame, token = group if EVERY_FRAME else tl.load(last_at + FRAME_BEGIN), tl.load(last_at + FIRST_TOKEN) + tile
    fine_row, col = tile // tile_cols * strips, tile % tile_cols * TILE_WIDTH
    line_stride, line_step = patch_stride * width, patch_step * width
    to = out + frame * (patch_step * patches) + fine_row * (line_step * FINE_ROWS) + col * patch_step + channel
    coarse = tl.load(grad + token * token_stride + channel, mask=present).to(tl.float32)
    coarse = divide(divide(coarse, strips * FINE_ROWS), TILE_WIDTH)
    if first < last:
        at = features + frame * frame_stride + fine_row * (line_stride * FINE_ROWS) + col * patch_stride + channel
        box = fine_row * fine_cols + col // FINE_COLS
        grad_at = grad + (tl.load(table + items_at + first * ITEM_SIZE + FIRST_TOKEN) + box) * token_stride + channel
        strip, grads = _load_boxes(
            at, grad_at, present, line_stride, patch_stride, token_stride, TILE_WIDTH, FINE_ROWS, FINE_COLS, FINE_MEAN
        )
        for row in range(strips):
            at += line_stride * FINE_ROWS
            grad_at += token_stride * fine_cols
            next_strip, next_grads = _load_boxes(
                at, grad_at, present & (row + 1 < strips), line_stride, patch_stride, token_stride,
                TILE_WIDTH, FINE_ROWS, FINE_COLS, FINE_MEAN,
            )  # fmt: skip
            # From 0.0 on, as the reference adds: it has no negative zeros.
            sums = _add_shares((neutral(channel, True),) * len(grads), grads, FINE_ROWS, FINE_COLS, FINE_MEAN)
            if REPEATS:
                for item in range(first + 1, last):
                    token = tl.load(table + items_at + item * ITEM_SIZE + FIRST_TOKEN) + box
                    more = load_strip(
                        grad + token * token_stride + channel, present, 0, token_stride, 1, TILE_WIDTH // FINE_COLS
                    )
                    sums = _add_shares(sums, more, FINE_ROWS, FINE_COLS, FINE_MEAN)
            _store_strip(
                strip, sums, to, coarse, present, line_step, patch_step, TILE_WIDTH, FINE_ROWS, FINE_COLS, FINE_MEAN
            )
            strip, grads = next_strip, next_grads
            to += line_step * FINE_ROWS
            box += fine_cols
    else:
        for _ in range(strips):
            for i in tl.static_range(FINE_ROWS * TILE_WIDTH):
                step = i // TILE_WIDTH * line_step + i % TILE_WIDTH * patch_step
                tl.store(to + step, (0.0 + coarse).to(out.dtype.element_ty), mask=present)
            to += line_step * FINE_ROWS
