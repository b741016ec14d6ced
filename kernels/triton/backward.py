"""The backward kernel of tiled plans: each gradient row is read once, each patch's gradient is written once.

Contributions are added in float32 in the reference's order, fine before coarse, and rounded once.
"""

import triton
import triton.language as tl

from .forward import _ITEM, _channels, _divide, _elements, _halve, _load_strip


@triton.jit
def _winner(strip, first, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which element of the box that begins at `first` its maximum is: the first of equals, or the last NaN."""
    best = strip[first].to(tl.float32)
    winner = tl.zeros(best.shape, tl.int32)
    for i in tl.static_range(1, ROWS * COLS):
        x = strip[first + i // COLS * WIDTH + i % COLS].to(tl.float32)
        better = (x > best) | (x != x)
        best = tl.where(better, x, best)
        winner = tl.where(better, i, winner)
    return winner


@triton.jit
def _spread_strip(
    at, fine_at, to, coarse, present, line_stride, patch_stride, token_stride, line_step, patch_step,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Gradients of a strip of fine boxes: of the features at `at`, from the boxes' own at `fine_at` and `coarse`."""
    fine = _load_strip(fine_at, present, 0, token_stride, 1, WIDTH // COLS)
    if not MEAN:
        strip = _load_strip(at, present, line_stride, patch_stride, ROWS, WIDTH)
    for box in tl.static_range(WIDTH // COLS):
        grad = fine[box].to(tl.float32)
        if MEAN:
            grad = _halve(_halve(grad, ROWS), COLS)
        else:
            winner = _winner(strip, box * COLS, WIDTH, ROWS, COLS)
        for i in tl.static_range(ROWS * COLS):
            # From 0.0 on, as the reference adds: it has no negative zeros.
            mine = 0.0 + (grad if MEAN else tl.where(winner == i, grad, 0.0)) + coarse
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
    BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (group, tile, chunk) as in pool_tiles, where no frame repeats; `out` [T, N, D] is contiguous."""
    program = tl.program_id(0)
    channel, present = _channels(program % chunks, channels, BLOCK, VECTOR)
    tile, group = program // chunks % tiles, program // chunks // tiles
    frame_stride, patch_stride = _elements(frame_stride, VECTOR), _elements(patch_stride, VECTOR)
    token_stride, patch_step = _elements(token_stride, VECTOR), _elements(channels, VECTOR)
    first, last = tl.load(table + groups_at + group), tl.load(table + groups_at + group + 1) - 1
    last_at = table + items_at + last * _ITEM
    frame, token = tl.load(last_at + 1), tl.load(last_at + 3) + tile
    fine_row, col = tile // tile_cols * strips, tile % tile_cols * TILE_WIDTH
    line_stride, line_step = patch_stride * width, patch_step * width
    at = features + frame * frame_stride + fine_row * (line_stride * FINE_ROWS) + col * patch_stride + channel
    to = out + frame * (patch_step * patches) + fine_row * (line_step * FINE_ROWS) + col * patch_step + channel
    coarse = tl.load(grad + token * token_stride + channel, mask=present).to(tl.float32)
    coarse = _divide(_divide(coarse, strips * FINE_ROWS), TILE_WIDTH)
    fine_at = grad + channel
    if first < last:
        fine_token = tl.load(table + items_at + first * _ITEM + 3) + fine_row * fine_cols + col // FINE_COLS
        fine_at += fine_token * token_stride
    for _ in range(strips):
        if first < last:
            _spread_strip(
                at, fine_at, to, coarse, present, line_stride, patch_stride, token_stride, line_step, patch_step,
                TILE_WIDTH, FINE_ROWS, FINE_COLS, FINE_MEAN,
            )  # fmt: skip
        else:
            for i in tl.static_range(FINE_ROWS * TILE_WIDTH):
                step = i // TILE_WIDTH * line_step + i % TILE_WIDTH * patch_step
                tl.store(to + step, (0.0 + coarse).to(out.dtype.element_ty), mask=present)
        at += line_stride * FINE_ROWS
        to += line_step * FINE_ROWS
        fine_at += token_stride * fine_cols
