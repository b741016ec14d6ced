"""Which attention kernel the model runs on, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import BackendError

CHOICES = ("auto", "eager", "sdpa", "flash_attention_2")
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Attention:
    """An attention that can serve: its name in transformers, the kernel behind it, and why it was taken."""

    implementation: str
    kernel: str
    reason: str

    def describe(self) -> str:
        """Short form for reports, such as "sdpa (cpu)"."""
        return f"{self.implementation} ({self.kernel})"


def resolve_attention(
    requested: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 128,
) -> Attention:
    """The attention to load a model with.

    "auto" takes flash-attn where it is installed and usable (GPU, 16 bits), else PyTorch's SDPA, whose own
    flash kernel serves 16-bit GPU models. Raises BackendError where a choice by name cannot serve.
    """
    device = torch.device(device)
    if requested not in CHOICES:
        raise BackendError(f"unknown attention {requested!r}: choose one of {', '.join(CHOICES)}")
    if requested == "eager":
        return Attention("eager", device.type, "asked for by name")
    obstacle = flash_attn_obstacle(device, dtype)
    if requested == "flash_attention_2" and obstacle:
        raise BackendError(f"flash_attention_2 cannot serve: {obstacle}; use attention='sdpa'")
    if requested == "flash_attention_2" or (requested == "auto" and not obstacle):
        return Attention("flash_attention_2", device.type, "flash-attn is installed and usable")
    reason = "asked for by name" if requested == "sdpa" else f"flash-attn is not used: {obstacle}"
    return Attention("sdpa", _sdpa_kernel(device, dtype, head_dim), reason)


def flash_attn_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the flash-attn package cannot serve this device and dtype; None where it can."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU and the model is on {device.type}"
    if dtype not in _SIXTEEN_BIT:
        return f"it needs float16 or bfloat16 and the model is {str(dtype).removeprefix('torch.')}"
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return "the flash-attn package is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def _sdpa_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if device.type != "cuda":
        return device.type
    query = torch.empty(1, 1, 16, head_dim, device=device, dtype=dtype)
    params = torch.backends.cuda.SDPAParams(query, query, query, None, 0.0, True, False)
    if torch.backends.cuda.can_use_flash_attention(params):
        return "flash, cuda"
    efficient = torch.backends.cuda.can_use_efficient_attention(params)
    return "memory-efficient, cuda" if efficient else "math, cuda"
