"""pytest-benchmark of the op on the CPU: pytest bench --benchmark-enable."""

import pytest
import torch

from sfllava_fast import SlowFastLayout, slowfast_aggregate

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_default_layout(benchmark, backend, dtype):
    features = torch.randn(50, 577, 1024).to(dtype)[:, 1:]
    out = torch.empty(3680, 1024, dtype=dtype)
    benchmark.extra_info["bytes"] = (50 * 576 + 3680) * 1024 * dtype.itemsize
    result = benchmark(slowfast_aggregate, features, SlowFastLayout(), out=out, backend=backend)
    assert torch.equal(result, slowfast_aggregate(features, backend="torch"))
