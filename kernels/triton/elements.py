"""What the kernels share: the plan table's format, the arithmetic of boxes, and addresses.

Strides and channels are counted in vectors of VECTOR elements, which gives the compiler the alignment of every address.
"""

import triton
import triton.language as tl
from sfllava_fast.ops.backends.plan_table import HEADER, ITEM, PATHWAY, REDUCE

HEADER_SIZE, PATHWAY_SIZE, ITEM_SIZE = (tl.constexpr(len(fields)) for fields in (HEADER, PATHWAY, ITEM))
(
    FIRST_PATCH, GRID_HEIGHT, GRID_WIDTH, REDUCTION, ROW_BINS, FIRST_ROW_BIN, COL_BINS, FIRST_COL_BIN,
    ROW_COVER, COL_COVER, PITCH,
) = (tl.constexpr(i) for i in range(len(PATHWAY)))  # fmt: skip
_, FRAME_BEGIN, FRAME_END, FIRST_TOKEN = (tl.constexpr(i) for i in range(len(ITEM)))
REDUCE_MAX, REDUCE_MEAN, REDUCE_LINEAR = (tl.constexpr(REDUCE[name]) for name in ("max", "mean", "linear"))


@triton.jit
def beats(x, best):
    """Whether x replaces the maximum so far: a max keeps the first of equals and passes NaN on."""
    return (x > best) | (x != x)


@triton.jit
def join(acc, x, MEAN: tl.constexpr):
    """One more element of a box."""
    x = x.to(tl.float32)
    if MEAN:
        return acc + x
    return tl.where(beats(x, acc), x, acc)


@triton.jit
def neutral(like, MEAN: tl.constexpr):
    """The initial value of every box: adding 0.0 changes no sum, and nothing is less than -inf."""
    return tl.full(like.shape, 0.0 if MEAN else float("-inf"), tl.float32)


@triton.jit
def divide(acc, count):
    """acc / count with IEEE rounding, which `/` does not have."""
    if count != 1:
        acc = tl.div_rn(acc, tl.full(acc.shape, count, tl.float32))
    return acc


@triton.jit
def halve(acc, COUNT: tl.constexpr):
    """`divide` by 1 or 2."""
    return acc * 0.5 if COUNT == 2 else acc


@triton.jit
def elements(vectors, VECTOR: tl.constexpr):
    """A stride as a multiple of VECTOR elements: 64 bits, so that what it is multiplied with becomes that too."""
    return vectors.to(tl.int64) * VECTOR


@triton.jit
def chunk_channels(chunk, channels, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of a chunk's channels, and which of them exist."""
    channel = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return channel, channel < elements(channels, VECTOR)


@triton.jit
def load_bin(bins, i):
    """Start and stop of the table's bin i."""
    return tl.load(bins + 2 * i), tl.load(bins + 2 * i + 1)


@triton.jit
def second_weight(i, count, length, start, stop):
    """The weight of a linear bin's second element, bin i of `count` on an axis of `length`; 0 without one.

    How far the middle of segment i lies past `start`: less than 1, so numbers that wrap on the way do no harm.
    """
    past = (2 * i + 1) * length - count - 2 * count * start
    weight = tl.div_rn(past.to(tl.float32), (2 * count).to(tl.float32))
    return tl.where(stop - start == 2, weight, 0.0)


@triton.jit
def element_weight(second_weight, element):
    """The weight of a linear bin's element, 0 or 1."""
    return tl.where(element == 0, 1.0 - second_weight, second_weight)


@triton.jit
def load_strip(at, present, line_stride, patch_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """ROWS x COLS patches, row by row: all loads are issued before the first store of the strip can hold one back."""
    strip = ()
    for row in tl.static_range(ROWS):
        for col in tl.static_range(COLS):
            strip = strip + (tl.load(at + (row * line_stride + col * patch_stride), mask=present),)
    return strip
