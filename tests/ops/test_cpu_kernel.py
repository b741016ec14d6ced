"""The compiled CPU kernel against the reference, bit for bit, with every instruction set there is here."""

from __future__ import annotations

import math
import re
import resource
import shutil
import subprocess
import threading

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    SOURCES,
    GuardedRows,
    any_calls,
    assert_same,
    bits,
    features,
    few_values,
    normal,
    rows_without_patches,
    slowfast_calls,
)

from sfllava_fast import slowfast_aggregate
from sfllava_fast.errors import LayoutError
from sfllava_fast.layouts.pathway_layout import Pathways
from sfllava_fast.layouts.plan import Plan
from sfllava_fast.layouts.slowfast import SLOW_POOLS, SlowFastLayout
from sfllava_fast.ops.backends import reference, registry
from sfllava_fast.ops.backends.plan_table import find_sections, plan_table

if reason := registry.load_library():
    pytest.skip(reason, allow_module_level=True)

LIBRARY = registry.cpu_library()
CHANNELS = (1, 7, 15, 16, 31, 32, 33, 64, 65, 127, 256, 1024)
PAPER = SlowFastLayout()


def available(name: bytes) -> bool:
    try:
        return LIBRARY.sfllava_force_isa(name)
    finally:
        LIBRARY.sfllava_force_isa(None)


ISAS = [name for name in (b"avx512", b"avx2", b"generic") if available(name)]
# With the prefetching of this processor, and of the others.
TUNED = [(isa, tuning) for isa in ISAS for tuning in (b"next step", b"streams")]
TUNED.remove((b"generic", b"streams"))  # which has one way alone
pytestmark = pytest.mark.parametrize("isa", TUNED, indirect=True, ids=[b"-".join(name).decode() for name in TUNED])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def isa(request):
    isa, tuning = request.param
    assert LIBRARY.sfllava_force_isa(isa) and LIBRARY.sfllava_force_tuning(tuning)
    yield isa
    LIBRARY.sfllava_force_isa(None)
    LIBRARY.sfllava_force_tuning(None)


def check_plan(x: torch.Tensor, plan: Plan) -> None:
    out = GuardedRows(plan.offsets[-1], x.shape[2], x.dtype)
    torch.ops.sfllava_fast.pool(x, plan_table(plan), out.rows)
    room = rows_without_patches(plan)  # the op's to fill
    assert (out.rows[room].view(out.buffer.dtype) == out.poison).all()
    assert_same(out.rows.index_fill(0, torch.tensor(room, dtype=torch.long), 0), reference.aggregate(x, plan))
    out.check()
    check_backward(x, plan)


def check_backward(x: torch.Tensor, plan: Plan) -> None:
    frames, patches, channels = x.shape
    shape = plan.offsets[-1], channels + 3
    grad = torch.where(torch.rand(shape) < 0.9, normal(shape, x.dtype), few_values(shape, x.dtype))[:, 1:-2]
    grad[rows_without_patches(plan)] = math.nan
    out = GuardedRows(frames * patches, channels, x.dtype, left=0, right=0)
    torch.ops.sfllava_fast.pool_backward(grad, x, plan_table(plan), out.rows.view(x.shape))
    assert_same(out.rows.view(x.shape), reference.aggregate_backward(grad, x, plan))
    out.check()


@st.composite
def field_calls(draw):
    """(features, plan) of texts with class tokens, linear bins, separators, zeros, frames apart and interleaved."""
    number = st.integers(1, 4)
    bins = st.just("each") | st.builds("{}{}".format, st.sampled_from(["stride", "adaptive"]), number)
    frames = bins | st.builds("{}{}".format, st.sampled_from(["linspace", "repeat", "every", "others"]), number)
    boxes = st.builds("{},{},{}".format, bins, bins, st.sampled_from(["max", "mean", "max,flat", "mean,flat"]))
    linear = st.builds("linear{},linear{},mean".format, number, number)
    shape = boxes | linear | st.sampled_from(["each,each,max,class", "each,each,mean,class"])
    pad = st.sampled_from(["", "", "", ",pad3"])
    paths = draw(st.lists(st.builds("{},{}{}".format, frames, shape, pad), min_size=1, max_size=3))
    options = draw(st.lists(st.sampled_from(["a@row", "b@row", "c@frame", "d@between", "e@end"]), unique=True))
    if draw(st.booleans()):
        options.append("interleaved")
        paths = ["each," + path.split(",", 1)[1].replace(",pad3", "") for path in paths]
    text = ";".join(["+".join(f"p{i}:{path}" for i, path in enumerate(paths)), *options])
    lengths = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    grid = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    try:
        plan = Pathways.parse(text).plan(lengths, grid)
    except LayoutError:
        reject()
    return draw(features(sum(lengths), plan.patches, CHANNELS, "cpu")), plan


@settings(max_examples=150)
@given(slowfast_calls(CHANNELS))
def test_slowfast_layouts(isa, call):
    check_plan(*call)


@settings(max_examples=100)
@given(any_calls(CHANNELS))
def test_any_pathways_of_packed_videos(isa, call):
    check_plan(*call)


@settings(max_examples=200)
@given(field_calls())
def test_layouts_of_the_field(isa, call):
    check_plan(*call)


@dtypes
@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("pool", SLOW_POOLS)
def test_the_papers_grid(isa, dtype, make, pool):
    check_plan(make((5, 577, 72), dtype)[:, 1:], SlowFastLayout(4, pool).plan(5, (24, 24)))


@dtypes
@pytest.mark.parametrize("shift", [0, 1, 4], ids=["aligned", "element off", "16 bytes off"])
def test_outputs_that_outgrow_the_cache(isa, dtype, shift):
    """Aligned rows from 4 MB on are written around the cache; rows that are not aligned must not be."""
    channels, plan = 1024, SlowFastLayout(8, "concat", (4, 4)).plan(3, (24, 24))
    x = normal((3, 577, channels), dtype)[:, 1:]
    tokens = plan.tokens["total"]
    buffer = torch.full((tokens * channels + 128,), 7.0, dtype=dtype)
    start = -(buffer.data_ptr() // buffer.element_size()) % 64 + shift
    out = buffer[start : start + tokens * channels].view(tokens, channels)
    assert out.nbytes >= 4 << 20 and (out.data_ptr() % 64 == 0) == (shift == 0)
    torch.ops.sfllava_fast.pool(x, plan_table(plan), out)
    assert_same(out, reference.aggregate(x, plan))
    assert (buffer[:start] == 7).all() and (buffer[start + tokens * channels :] == 7).all()


@pytest.mark.parametrize("pitch", [1024 + 1, 1024 + 64])
def test_large_outputs_with_a_pitch(isa, pitch):
    plan = SlowFastLayout(8, "spatial_1d_max_pool", (4, 4)).plan(3, (24, 24))
    x = normal((3, 576, 1024), torch.bfloat16)
    buffer = torch.full((plan.tokens["total"], pitch), 7.0, dtype=torch.bfloat16)
    torch.ops.sfllava_fast.pool(x, plan_table(plan), buffer[:, :1024])
    assert_same(buffer[:, :1024], reference.aggregate(x, plan))
    assert (buffer[:, 1024:] == 7).all()


@dtypes
def test_sums_longer_than_the_cache(isa, dtype):
    check_plan(normal((2, 12, 20001), dtype), SlowFastLayout(2, "spatial_1d_avg_pool", (2, 3)).plan(2, (3, 4)))


def test_no_product_is_fused_with_a_sum(isa):
    if (objdump := shutil.which("objdump")) is None:
        pytest.skip("there is no objdump")
    code = subprocess.run([objdump, "-d", LIBRARY._name], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"\b(vfn?m(add|sub)\w*|fn?m(add|sub)|fml[as])\b", code)


def lazily_backed(shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Memory that the system hands out page by page, as it is touched."""
    reach = sum((size - 1) * step for size, step in zip(shape, stride)) + 1
    assert reach > 2**31
    return torch.empty(reach, dtype=torch.bfloat16).as_strided(shape, stride)


@pytest.mark.parametrize(
    "shape, stride",
    [((9000, 16, 8), (2**18, 8, 1)), ((3, 16, 8), (8, 2**27 + 2**24, 1))],
    ids=["far frames", "far patches"],
)
def test_features_past_2_to_the_31(isa, shape, stride):
    x = lazily_backed(shape, stride)
    config = SlowFastLayout(3, "spatial_1d_avg_pool", None)
    picked = config.plan(shape[0], (4, 4)).slow_frames
    near = normal((3, 16, 8), torch.bfloat16)
    for frame, values in zip(picked, near):
        x[frame] = values
    got = slowfast_aggregate(x, config, backend="cpu")
    assert_same(got, reference.aggregate(near, config.plan(3, (4, 4))))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20  # kilobytes


def test_tokens_past_2_to_the_31(isa):
    plan = SlowFastLayout(3, "concat", (1, 1)).plan(3, (4, 4))
    out = lazily_backed((plan.tokens["total"], 8), (2**26, 1))
    x = normal((3, 16, 8), torch.bfloat16)
    assert_same(
        slowfast_aggregate(x, "slowfast-slow_3frms_concat-fast_1x1", out=out, backend="cpu"),
        reference.aggregate(x, plan),
    )


@dtypes
def test_same_bits_in_every_run_with_any_number_of_threads(isa, dtype, torch_threads):
    x = normal((12, 576, 320), dtype)  # 2.2 million elements: work for several threads
    first = slowfast_aggregate(x, PAPER, backend="cpu")
    for threads in (1, 2, 3, 2):
        torch_threads(threads)
        assert torch.equal(bits(slowfast_aggregate(x, PAPER, backend="cpu")), bits(first))


def test_calls_from_two_threads_at_once(isa):
    inputs = [normal((4, 576, channels), torch.float32) for channels in (64, 1000)]
    expected = [reference.aggregate(x, PAPER.plan(4, (24, 24))) for x in inputs]
    start, wrong = threading.Barrier(2), []

    def work(mine: int) -> None:
        start.wait()
        for turn in range(6):
            which = (mine + turn) % 2  # the running sums of a thread grow, and are used again for fewer channels
            if not torch.equal(slowfast_aggregate(inputs[which], PAPER, backend="cpu"), expected[which]):
                wrong.append((mine, turn))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_channel_needs_no_unit_stride(isa):
    x = normal((3, 16, 6), torch.float32)[:, :, 2:3].as_strided((3, 16, 1), (96, 6, 5))
    plan = SlowFastLayout(2).plan(3, (4, 4))
    assert_same(slowfast_aggregate(x, SlowFastLayout(2), backend="cpu"), reference.aggregate(x, plan))


def test_the_instruction_set_is_chosen_by_name(isa):
    assert LIBRARY.sfllava_isa() == isa
    assert not LIBRARY.sfllava_force_isa(b"mmx") and LIBRARY.sfllava_isa() == isa
    LIBRARY.sfllava_force_isa(None)
    assert LIBRARY.sfllava_isa() == ISAS[0]


def test_the_tuning_is_chosen_by_name(isa):
    for name in (b"streams", b"next step"):
        assert LIBRARY.sfllava_force_tuning(name) and LIBRARY.sfllava_tuning() == name
    assert not LIBRARY.sfllava_force_tuning(b"none") and LIBRARY.sfllava_tuning() == b"next step"


def without_memory(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


PLAN = plan_table(SlowFastLayout(2).plan(3, (4, 4)))
ROWS = 2 * 8 + 3 * 16
BAD_KERNEL_CALLS = {
    "fewer frames than the plan": lambda x, out: (x[1:], PLAN, out),
    "fewer patches than the plan": lambda x, out: (x[:, 1:], PLAN, out),
    "fewer tokens than the plan": lambda x, out: (x, PLAN, out[1:]),
    "other channels": lambda x, out: (x, PLAN, out[:, 1:]),
    "another dtype": lambda x, out: (x, PLAN, out.half()),
    "float64": lambda x, out: (x.double(), PLAN, out.double()),
    "features of 2-D": lambda x, out: (x[0], PLAN, out),
    "no unit stride": lambda x, out: (x.transpose(1, 2).contiguous().transpose(1, 2), PLAN, out),
    "a plan of another type": lambda x, out: (x, PLAN.long(), out),
    "a plan with gaps": lambda x, out: (x, torch.stack([PLAN, PLAN], 1)[:, 0], out),
    "a plan cut short": lambda x, out: (x, PLAN[:-1], out),
    "an empty plan": lambda x, out: (x, PLAN[:0], out),
    "features without memory": lambda x, out: (without_memory(x), PLAN, out),
    "tokens without memory": lambda x, out: (x, PLAN, without_memory(out.clone())),
    "a plan of another version": lambda x, out: (x, PLAN + (torch.arange(len(PLAN)) == 0), out),
}


@pytest.mark.parametrize("call", BAD_KERNEL_CALLS)
def test_the_kernel_itself_refuses_what_it_cannot_read(isa, call):
    out = torch.full((ROWS, 8), 7.0)
    with pytest.raises(RuntimeError):
        torch.ops.sfllava_fast.pool(*BAD_KERNEL_CALLS[call](torch.zeros(3, 16, 8), out))
    assert (out == 7).all()


@pytest.mark.parametrize(
    "call, message",
    [
        ("fewer frames than the plan", "features have 2 frames, the plan 3"),
        ("fewer patches than the plan", "features have 15 patches, the plan 16"),
        ("fewer tokens than the plan", "there are 63 rows of tokens, the plan has 64"),
        ("another dtype", r"not float32 \[3, 16, 8\], .* and float16 \[64, 8\]"),
        ("tokens without memory", "needs 2048 bytes, and its memory has 0"),
        ("a plan of another version", "version 4, and this library reads version 3"),
    ],
)
def test_errors_of_the_kernel_print_what_clashes(isa, call, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sfllava_fast.pool(*BAD_KERNEL_CALLS[call](torch.zeros(3, 16, 8), torch.full((ROWS, 8), 7.0)))


def test_the_error_of_a_table_names_the_item_and_its_rows(isa):
    table, out = PLAN.clone(), torch.zeros(ROWS, 8)
    table[find_sections(PLAN).items_at + 3] += 1000  # the first token of item 0
    with pytest.raises(RuntimeError, match=r"the plan's item 0: its tokens are rows 1000 to 1007 of 64"):
        torch.ops.sfllava_fast.pool(torch.zeros(3, 16, 8), table, out)
