"""Results as JSON files: facts about the machine and the commit, writing and reading."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from sfllava_fast.errors import BackendError
from sfllava_fast.ops.backends import registry

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build/gpu"  # bench/gpu/carried.py builds it on one machine for another


class ResultError(Exception):
    """A result or an option that cannot be used; the message is one line."""


def machine(device: str, outputs: str = "allocated and touched before timing") -> dict[str, str]:
    """Facts that figures depend on.

    Args:
        device: "cpu" or "cuda".
        outputs: On a CPU, how the outputs of a call are allocated.
    """
    facts = {
        "cpu": _cpu_name(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "commit": commit(),
    }
    if device == "cpu":
        return facts | {"processor": processor(), "isa": _isa(), "allocator": f"glibc malloc; outputs are {outputs}"}
    return facts | {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": str(torch.version.cuda),
        "triton": _version("triton"),
        "l2_bytes": str(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size),
    }


def device_name(result: dict) -> str:
    """The GPU of a result, else its CPU."""
    return result["machine"].get("gpu") or result["machine"]["cpu"]


def folder_name(device: str) -> str:
    """A device's folder in bench/results: nvidia-h200 for NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def guarded(name: str, errors: dict[str, str], measure: Callable[[], None]) -> None:
    """Calls `measure`; if it fails, notes why in `errors`, so that the figures of other works are not lost."""
    try:
        measure()
    except Exception as error:
        errors[name] = first_line(error)


def write_json(path: Path, result: object) -> None:
    """Write a file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def read_result(path: Path) -> dict:
    """Read a result; ResultError if the file has none."""
    try:
        result = json.loads(path.read_text())
        device_name(result)
        assert all(figures["bars"] is not None and figures["providers"] for figures in result["works"].values())
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ResultError(f"{path} is not a result of python -m bench") from error
    return result


def passes(result: dict, margin: float) -> bool:
    """Whether every ratio with a target reaches `margin` times it."""
    measured = [*result["works"].values(), result.get("host", {"bars": {}})]
    bars = (bar for figures in measured for bar in figures["bars"].values() if bar["bar"] is not None)
    return all(bar["ratio"] >= bar["bar"] * margin for bar in bars)


def commit() -> str:
    """The commit of the source tree; without .git, that of the build in it; of an installed package, its version."""
    if (ROOT / ".git").exists():
        return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    if build := built():
        return build["commit"] if build["sources"] == sources_digest() else f"{build['commit']}, changed since"
    return f"release {_version('sfllava_fast')}"


def built() -> dict | None:
    """The facts that bench/gpu/carried.py wrote about its build; None if there is none."""
    try:
        return json.loads((BUILT / "build.json").read_text())
    except (OSError, ValueError):
        return None


def sources_digest() -> str:
    """Digest of all source files that figures depend on."""
    kinds, digest = {".py", ".h", ".cpp", ".cu", ".txt"}, hashlib.sha256()
    folders = (ROOT / name for name in ("csrc", "kernels", "sfllava_fast", "bench"))
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in kinds):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")  # that kernels and matrix products are chosen by


def processor(cpuinfo: str = "/proc/cpuinfo") -> str:
    """Vendor, family, model and flags of the processor; a virtual machine's model name does not identify it."""
    facts = {}
    try:
        with open(cpuinfo) as lines:
            for name, _, value in (line.partition(":") for line in lines):
                facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    if "cpu family" not in facts:
        return platform.machine()
    flags = [name for name in _FLAGS if name in facts.get("flags", "").split()]
    return " ".join([facts["vendor_id"], "family", facts["cpu family"], "model", facts["model"], *flags])


def _isa() -> str:
    """The instruction set of the CPU kernels in use."""
    try:
        return registry.cpu_library().sfllava_isa().decode()
    except BackendError:
        return "no kernels"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
