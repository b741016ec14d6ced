"""Builds the compiled kernels with CMake; everything else is in pyproject.toml.

SFLLAVA_FAST_CPU=auto|0|1: build the CPU kernels if there is a C++ compiler (auto, the default), never, or fail without.
SFLLAVA_FAST_CUDA=auto|0|1: the same for the CUDA kernels and nvcc. Building them needs no GPU, and no torch.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


def why_no_compiler():
    """None where C++ can be compiled, else the reason."""
    if not sys.platform.startswith("linux"):
        return f"compiled kernels are for Linux, not {sys.platform}"
    compilers = [os.environ.get("CXX") or "c++", "g++", "clang++"]
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        return "no C++ compiler was found; install one, such as g++, and install sfllava_fast again"
    return None


def find_nvcc():
    """The CUDA compiler's path: $CUDACXX, in $CUDA_HOME, or on the path; None without one."""
    home = os.environ.get("CUDA_HOME")
    names = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def why_no_nvcc():
    return why_no_compiler() or (None if find_nvcc() else "no nvcc was found")


def why_not_built(variable, why_not):
    """None where the variable's kernels are to be built, else the reason."""
    setting = os.environ.get(variable, "auto")
    if setting not in ("auto", "0", "1"):
        raise SystemExit(f"{variable} must be auto, 0 or 1, not {setting!r}")
    reason = f"{variable}=0" if setting == "0" else why_not()
    if reason and setting == "1":
        raise SystemExit(f"{variable}=1, but {reason}")
    return reason


class CMakeBuild(build_ext):
    """One CMake build for each library; their names have no Python version in them."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        options = ["-G", "Ninja"] if shutil.which("ninja") else []
        if target.stem == "_C_cuda":
            print("sfllava_fast: nvcc compiles the CUDA kernels, which takes some minutes", file=sys.stderr, flush=True)
            options += ["-DSFLLAVA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        # A folder of its own: CMake remembers its tools' paths, and an isolated build's are gone the next time.
        with tempfile.TemporaryDirectory() as build:
            try:
                subprocess.run(["cmake", *options, "-S", str(ROOT), "-B", build], check=True)
                subprocess.run(["cmake", "--build", build, "--target", target.stem], check=True)
            except subprocess.CalledProcessError as error:
                raise CompileError(f"CMake could not build {target.name}") from error
            shutil.copyfile(Path(build) / target.name, target)


class StableWheel(bdist_wheel):
    """The libraries use torch's stable C ABI and nothing of Python's: one wheel for every Python."""

    def get_tag(self):
        platform = super().get_tag()[2]
        return "py3", "none", platform


extensions = []
for name, variable, what, why_not in (
    ("_C", "SFLLAVA_FAST_CPU", "compiled", why_no_compiler),
    ("_C_cuda", "SFLLAVA_FAST_CUDA", "CUDA", why_no_nvcc),
):
    if reason := why_not_built(variable, why_not):
        print(f"sfllava_fast: installing without {what} kernels: {reason}", file=sys.stderr)
        continue
    # An nvcc that is there by chance, and too old or broken, must not stop an installation.
    by_chance = name == "_C_cuda" and os.environ.get(variable, "auto") == "auto"
    extensions.append(Extension(f"sfllava_fast.{name}", sources=[], optional=by_chance))
bench = [f"sfllava_fast._bench.{name}" for name in find_packages("bench")]
setup(
    packages=[*find_packages(include=["sfllava_fast*"]), "sfllava_fast._triton", "sfllava_fast._bench", *bench],
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableWheel},
)
