"""`make gpu-build`: builds build/gpu on a machine with nvcc, to be copied to one with a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..harness.record import BUILT, ROOT, ResultError, built, commit, sources_digest, write_json
from . import copies, tune

_PACKAGE = ROOT / "sfllava_fast"
_NEWEST_GLIBC = 34  # 2.34, of 2021, which the machine with the GPU is assumed to have
NVCC = ["-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "-shared", "-cudart", "static", "-Xlinker=-s"]
NVCC += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-I", str(ROOT / "csrc/include"), "-I", str(ROOT / "csrc/cuda")]


def build(arch: str) -> None:
    """Build the package's libraries, the copy kernel and the variants.

    Args:
        arch: Compute capability, such as 90.

    Raises:
        ResultError: A tool is missing, a compiler fails, or a library needs too new a glibc.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if not nvcc:
        raise ResultError("no nvcc was found: install the CUDA toolkit, 13.0 or newer")
    # Before the old build is removed, whose commit is taken if there is no .git.
    facts = {"commit": commit(), "arch": arch, "nvcc": _output(nvcc, "--version")[-1]}
    shutil.rmtree(BUILT, ignore_errors=True)
    settings = {"SFLLAVA_FAST_CPU": "1", "SFLLAVA_FAST_CUDA": "1", "CUDACXX": nvcc, "CUDAARCHS": f"{arch}-real"}
    extensions = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(BUILT / "lib")]
    _call(extensions, settings)
    for library in (BUILT / "lib/sfllava_fast").glob("*.so"):
        library.rename(BUILT / library.name)
    shutil.rmtree(BUILT / "lib")
    build_bench([nvcc, *NVCC, f"-gencode=arch=compute_{arch},code=sm_{arch}"])
    for library in BUILT.rglob("*.so"):
        if (glibc := newest_glibc(library)) > _NEWEST_GLIBC:
            needs = f"{library.name} needs glibc 2.{glibc}, newer than 2.{_NEWEST_GLIBC}"
            raise ResultError(f"{needs}: build on an older system")
    facts |= {"status": _output("git", "status", "--short"), "sources": sources_digest()}
    write_json(BUILT / "build.json", facts)


def build_bench(nvcc: list[str]) -> None:
    """Build the copy kernel and the variants, several at a time."""
    source = ROOT / "bench/gpu/cuda"
    commands = [[*nvcc, str(source / "copy.cu"), "-o", str(copies.LIBRARY)]]
    commands += [[*nvcc, *v.definitions, str(source / "variant.cu"), "-o", str(v.library)] for v in tune.variants()]
    copies.LIBRARY.parent.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_call, commands))


def _call(command: list[str], settings: dict[str, str] | None = None) -> None:
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | (settings or {}), capture_output=True, text=True)
    if ended.returncode:
        lines = (ended.stderr or ended.stdout).strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else "no output")
        raise ResultError(f"{Path(command[0]).name} failed: {reason}")


def _output(*command: str) -> list[str]:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []


def newest_glibc(library: Path) -> int:
    """The minor version of the newest glibc 2 whose symbols a library needs."""
    return max((int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())), default=0)


def why_not(arch: str) -> str | None:
    """Why build/gpu cannot be used on a GPU of this architecture; None if it can."""
    build = built()
    if build is None:
        return "nothing was built beforehand (make gpu-build)"
    if build["arch"] != arch:
        return f"build/gpu is for sm_{build['arch']}, not sm_{arch}"
    return None if build["sources"] == sources_digest() else "build/gpu was built from other sources"


def install() -> list[str]:
    """Copy the libraries of build/gpu that the package lacks or has in another version; returns their names."""
    others = [library for library in BUILT.glob("*.so") if not _is_copy(_PACKAGE / library.name, library)]
    for library in others:
        (_PACKAGE / library.name).unlink(missing_ok=True)  # processes that have it loaded keep the old file
        shutil.copyfile(library, _PACKAGE / library.name)
    return sorted(library.name for library in others)


def _is_copy(path: Path, library: Path) -> bool:
    return path.exists() and path.read_bytes() == library.read_bytes()
