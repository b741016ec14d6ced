"""pytest-benchmark of the op on the CPU: pytest tests/bench/test_op_benchmark.py --benchmark-enable."""

import pytest
import torch

from sfllava_fast import SlowFastLayout, slowfast_aggregate

pytest.importorskip("pytest_benchmark")

TOKENS = 3680


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_default_layout(benchmark, backend, dtype):
    features = torch.randn(50, 577, 1024).to(dtype)[:, 1:]
    out = torch.empty(TOKENS, 1024, dtype=dtype)
    benchmark.extra_info["bytes"] = (50 * 576 + TOKENS) * 1024 * dtype.itemsize
    result = benchmark(slowfast_aggregate, features, SlowFastLayout(), out=out, backend=backend)
    if benchmark.enabled:
        benchmark.extra_info["tokens/s"] = TOKENS / benchmark.stats.stats.median
    assert torch.equal(result, slowfast_aggregate(features, backend="torch"))
