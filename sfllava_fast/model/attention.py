"""Choice of the attention kernel that the model runs on."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import BackendError, dtype_name, first_line

log = logging.getLogger("sfllava_fast")

# The flash-attn packages that support a compute capability, the fastest first. FlashAttention 3 is written for Hopper,
# 4 for Hopper and Blackwell: on 8 and 12 its 4.0.0b36 runs Ampere's instructions, untuned on 8.
_FLASH = {
    8: ("flash_attention_2", "flash_attention_4"),
    9: ("flash_attention_3", "flash_attention_4", "flash_attention_2"),
    10: ("flash_attention_4", "flash_attention_2"),
    11: ("flash_attention_4", "flash_attention_2"),
    12: ("flash_attention_2", "flash_attention_4"),
}
_NAMES = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
CHOICES = ("auto", "eager", "sdpa", *_NAMES)
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_HEADS, _TOKENS, _CALLS = 32, 3712, 10  # SDPA's kernels are measured on the paper's prefill of a 7B model


@dataclass(frozen=True)
class Attention:
    """A supported attention.

    Attributes:
        implementation: Its name in transformers.
        kernel: The kernel that computes it, such as "cudnn, cuda".
        reason: Why it was chosen.
    """

    implementation: str
    kernel: str
    reason: str

    def describe(self) -> str:
        """Short text for reports, such as "sdpa (cpu)"."""
        return f"{self.implementation} ({self.kernel})"

    @contextmanager
    def for_prefill(self) -> Iterator[None]:
        """Context in which SDPA uses the kernel that was measured to be the fastest for causal prefill."""
        if not self.kernel.startswith("cudnn"):
            yield
            return
        rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *rest], set_priority=True):
            yield


def resolve_attention(
    requested: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 128,
) -> Attention:
    """The attention to load a model with.

    Args:
        requested: One of CHOICES. "auto" uses the fastest flash-attn package that is installed and supported, else
            PyTorch's SDPA. For the prefill, SDPA uses the faster of its flash and cuDNN kernels, which are measured.
        device: Of the model.
        dtype: Of the model.
        head_dim: Channels of an attention head.

    Raises:
        BackendError: If the attention is unknown, or if one that is requested by name is not supported.
    """
    device = torch.device(device)
    if requested not in CHOICES:
        raise BackendError(f"unknown attention {requested!r}: choose one of {', '.join(CHOICES)}")
    if requested == "eager":
        return Attention("eager", device.type, "asked for by name")
    obstacles = {name: flash_attn_obstacle(name, device, dtype) for name in _NAMES}
    if obstacle := obstacles.get(requested):
        raise BackendError(f"{requested} is not supported: {obstacle}; use attention='sdpa'")
    usable = [name for name in _NAMES if requested in ("auto", name) and not obstacles[name]]
    if usable:
        name = min(usable, key=_FLASH[_capability(device)].index)
        return Attention(name, device.type, "it is installed and usable")
    kernel, measured = _sdpa_kernel(device, dtype, head_dim)
    reason = "asked for by name" if requested == "sdpa" else f"flash-attn is not used: {obstacles['flash_attention_2']}"
    return Attention("sdpa", kernel, reason + measured)


def flash_attn_obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a flash-attn package does not support this device and dtype; None if it does."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU and the model is on {device.type}"
    if dtype not in _SIXTEEN_BIT:
        return f"it needs float16 or bfloat16 and the model is {dtype_name(dtype)}"
    import transformers.utils

    is_available = getattr(transformers.utils, f"is_flash_attn_{name[-1]}_available", None)
    if is_available is None:
        return f"transformers {transformers.__version__} does not support it"
    if not is_available():
        return "the flash-attn package is not installed"
    if name not in _FLASH.get(_capability(device), ()):
        served = [str(capability) for capability, names in _FLASH.items() if name in names]
        return f"it needs a GPU of compute capability {', '.join(served)}"
    return None


def _capability(device: torch.device) -> int:
    """The major number of the compute capability."""
    return torch.cuda.get_device_capability(device)[0]


def _sdpa_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The kernel for causal prefill, and the measured times as text."""
    if device.type != "cuda":
        return device.type, ""
    query = torch.empty(1, 1, 16, head_dim, device=device, dtype=dtype)
    params = torch.backends.cuda.SDPAParams(query, query, query, None, 0.0, True, False)
    if torch.backends.cuda.can_use_flash_attention(params):
        flash, cudnn = _prefill_times(device, dtype, head_dim)
        name = "cudnn" if cudnn < flash else "flash"
        return f"{name}, cuda", f" (prefill: flash {flash:.2f} ms, cudnn {cudnn:.2f} ms)"
    efficient = torch.backends.cuda.can_use_efficient_attention(params)
    return ("memory-efficient, cuda" if efficient else "math, cuda"), ""


@cache
def _prefill_times(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[float, float]:
    """Milliseconds of causal attention over the paper's tokens by SDPA's flash and cuDNN kernels; inf if one fails."""
    times = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            times.append(_time_attention(backend, device, dtype, head_dim))
        except RuntimeError as error:  # a kernel that is missing or runs out of memory is not used
            log.info("SDPA's %s was not measured: %s", backend.name, first_line(error))
            times.append(math.inf)
    return times[0], times[1]


def _time_attention(backend: SDPBackend, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    query = torch.zeros(1, _HEADS, _TOKENS, head_dim, device=device, dtype=dtype)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with sdpa_kernel(backend):
        for call in range(-2, _CALLS):
            if call == 0:
                start.record()
            F.scaled_dot_product_attention(query, query, query, is_causal=True)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _CALLS
