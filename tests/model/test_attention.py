"""Which attention is taken, and why."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend

from sfllava_fast.errors import BackendError
from sfllava_fast.model import attention
from sfllava_fast.model.attention import resolve_attention

HALF = torch.bfloat16


@pytest.mark.parametrize(
    "requested, device, dtype, expected",
    [
        ("auto", "cpu", torch.float32, "sdpa (cpu)"),
        ("sdpa", "cpu", torch.bfloat16, "sdpa (cpu)"),
        ("eager", "cpu", torch.float32, "eager (cpu)"),
    ],
)
def test_on_a_cpu(requested, device, dtype, expected):
    assert resolve_attention(requested, device, dtype).describe() == expected


def test_says_why():
    assert "needs a CUDA GPU" in resolve_attention("auto").reason
    with pytest.raises(
        BackendError, match="flash_attention_2 is not supported: it needs a CUDA GPU.*use attention='sdpa'"
    ):
        resolve_attention("flash_attention_2", "cpu", HALF)
    with pytest.raises(BackendError, match="unknown attention 'linear': choose one of auto, eager, sdpa"):
        resolve_attention("linear")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some capability with some flash-attn packages, as far as choosing looks at it."""
    import transformers.utils

    def make(capability, packages=(), times=(2.0, 3.0)):
        for version in "234":
            name = f"is_flash_attn_{version}_available"
            monkeypatch.setattr(transformers.utils, name, lambda version=version: version in packages, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "_prefill_times", lambda *_: times)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, device, **k: empty(*a, device="meta", **k))
        monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *_: None)
        monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: True)

    return make


@pytest.mark.parametrize(
    "packages, capability, dtype, outcome",
    [
        ("2", (8, 0), HALF, None),
        ("2", (8, 0), torch.float32, "needs float16 or bfloat16"),
        ("2", (7, 5), torch.float16, "compute capability 8"),
        ("", (9, 0), torch.float16, "not installed"),
    ],
)
def test_flash_attention_2_on_a_gpu(gpu, packages, capability, dtype, outcome):
    gpu(capability, packages)
    if outcome is None:
        assert resolve_attention("auto", "cuda", dtype).describe() == "flash_attention_2 (cuda)"
        assert resolve_attention("flash_attention_2", "cuda", dtype).implementation == "flash_attention_2"
    else:
        with pytest.raises(BackendError, match=outcome):
            resolve_attention("flash_attention_2", "cuda", dtype)


@pytest.mark.parametrize(
    "packages, capability, expected",
    [
        ("234", (9, 0), "flash_attention_3"),
        ("24", (9, 0), "flash_attention_4"),
        ("234", (10, 0), "flash_attention_4"),
        ("23", (10, 0), "flash_attention_2"),
        ("234", (11, 0), "flash_attention_4"),
        ("234", (8, 6), "flash_attention_2"),
        ("34", (8, 0), "flash_attention_4"),
        ("24", (12, 0), "flash_attention_2"),
        ("34", (12, 0), "flash_attention_4"),
        ("3", (12, 0), "sdpa"),
        ("234", (7, 5), "sdpa"),
        ("", (9, 0), "sdpa"),
    ],
)
def test_auto_takes_the_best_flash_attention(gpu, packages, capability, expected):
    gpu(capability, packages)
    assert resolve_attention("auto", "cuda", HALF).implementation == expected


@pytest.mark.parametrize("version, served", [("2", "8, 9, 10, 11, 12"), ("3", "9"), ("4", "8, 9, 10, 11, 12")])
def test_a_flash_attention_by_name_runs_where_its_package_does(gpu, version, served):
    name = f"flash_attention_{version}"
    for capability in (7, 8, 9, 10, 11, 12, 13):
        gpu((capability, 0), "234")
        if str(capability) in served.split(", "):
            assert resolve_attention(name, "cuda", HALF).implementation == name
        else:
            with pytest.raises(BackendError, match=f"needs a GPU of compute capability {served};"):
                resolve_attention(name, "cuda", HALF)


def test_transformers_without_a_later_flash_attention(gpu, monkeypatch):
    gpu((10, 0), "2")
    import transformers.utils

    monkeypatch.delattr(transformers.utils, "is_flash_attn_4_available")
    assert resolve_attention("auto", "cuda", HALF).implementation == "flash_attention_2"
    with pytest.raises(BackendError, match="flash_attention_4 is not supported: transformers .* does not support it"):
        resolve_attention("flash_attention_4", "cuda", HALF)


@pytest.mark.parametrize(
    "times, kernel, first",
    [
        ((2.0, 3.0), "flash", SDPBackend.FLASH_ATTENTION),
        ((3.0, 2.0), "cudnn", SDPBackend.CUDNN_ATTENTION),
        ((2.0, math.inf), "flash", SDPBackend.FLASH_ATTENTION),
    ],
)
def test_the_faster_kernel_of_sdpa_is_taken_for_prefill_and_told(gpu, times, kernel, first):
    gpu((9, 0), "", times)
    chosen = resolve_attention("auto", "cuda", HALF)
    assert chosen.describe() == f"sdpa ({kernel}, cuda)"
    assert f"(prefill: flash {times[0]:.2f} ms, cudnn {times[1]:.2f} ms)" in chosen.reason
    before = torch._C._get_sdp_priority_order()
    with chosen.for_prefill():
        assert torch._C._get_sdp_priority_order()[0] == int(first)
        q = torch.ones(1, 1, 4, 8)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch._C._get_sdp_priority_order() == before


def test_a_kernel_that_fails_is_not_taken(monkeypatch):
    def time_attention(backend, *_):
        if backend == SDPBackend.CUDNN_ATTENTION:
            raise RuntimeError("No available kernel. Aborting execution.")
        return 1.5

    monkeypatch.setattr(attention, "_time_attention", time_attention)
    assert attention._prefill_times.__wrapped__("cuda", HALF, 128) == (1.5, math.inf)
