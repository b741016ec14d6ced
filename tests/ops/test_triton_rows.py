"""The Triton kernels for rows and attention: interpreted, compiled ahead of time, and on a device."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
import torch
from kernel_cases import DTYPES, assert_same, normal
from rows_cases import best_tokens, check_received, merged, taken
from triton_process import HERE, in_registers, interpret, run

from sfllava_fast.errors import InputError
from sfllava_fast.ops.rows import attention_received, gather_rows_of, scatter_rows, top_per_frame

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

on_a_device = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")]


def test_in_the_interpreter():
    interpret("triton_interpreted_rows.py")


# --- compiled ahead of time


@pytest.fixture(scope="module", params=["80", "90", "100"], ids="sm_{}".format)
def compiled(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton")
    script, cache = str(HERE / "triton_ahead_rows.py"), str(out / "cache")
    run(script, request.param, str(out / "kernels.json"), TRITON_CACHE_DIR=cache)
    return json.loads((out / "kernels.json").read_text())


def test_compiled_kernels(compiled):
    """In registers; rows, keys and queries 16 bytes at a time; blends of two roundings."""
    assert len({kernel["kernel"] for kernel in compiled}) == 6
    for kernel in compiled:
        ptx, sass, name = kernel["ptx"], kernel["sass"], (kernel["kernel"], kernel["name"])
        assert in_registers(kernel), name
        if kernel["kernel"] != "top_per_frame":
            assert "LDG.E.128" in sass and not re.search(r"ld\.global\.(b16|v[24]\.b16|v2)", ptx), name
        if "rows" in kernel["kernel"]:
            assert set(re.findall(r"st\.global\.(\S+)", ptx)) == {"v4.b32"}, name
            assert "fma" not in ptx, name


# --- on a device


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestOnADevice:
    pytestmark = on_a_device

    def test_rows(self, dtype):
        """Real sizes against the loops; the same bits twice."""
        frames = tuple(range(30, 30 + 288 * 11, 288))
        scores = normal((1, frames[-1] - frames[0]), dtype)
        kept = top_per_frame(scores.cuda(), frames, 0.2, backend="triton")
        assert kept.tolist() == [best_tokens(scores[0].float().tolist(), frames, 0.2)]
        hidden, cos, index = normal((1, 3740, 4096), dtype), normal((1, 3740, 128), dtype), kept.cpu()
        rows, of_cos = gather_rows_of((hidden.cuda(), cos.cuda()), kept, backend="triton")
        assert_same(rows.cpu(), taken(hidden, index))
        assert_same(of_cos.cpu(), taken(cos, index))
        weights = torch.rand(index.shape)
        for weight in (None, weights):
            expected = merged(hidden, index, -taken(hidden, index), weight)
            call = (kept, -rows, weight if weight is None else weight.cuda())
            assert_same(scatter_rows(hidden.cuda(), *call, backend="triton").cpu(), expected)
            out = hidden.cuda()
            assert_same(scatter_rows(out, *call, out=out, backend="triton").cpu(), expected)

    @pytest.mark.parametrize("count", [1, 16])
    @pytest.mark.parametrize("groups", [8, 2])
    def test_attention_received(self, dtype, count, groups):
        queries, keys = normal((1, 8, count, 128), dtype), normal((1, groups, 1000, 128), dtype)
        calls = [attention_received(queries.cuda(), keys.cuda(), 128**-0.5, backend="triton") for _ in range(2)]
        assert torch.equal(*calls)
        check_received(calls[0].cpu(), queries, keys, 128**-0.5)

    def test_a_score_that_is_nan(self, dtype):
        scores, nan = torch.zeros(1, 8, dtype=dtype, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
        scores[0, 3] = torch.nan
        assert top_per_frame(scores, (0, 8), 0.1, nan=nan).tolist() == [[3]] and nan.item() == 1
        with pytest.raises(InputError, match="NaN"):
            top_per_frame(scores, (0, 8), 0.1)
