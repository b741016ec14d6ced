"""Builds the compiled kernels with CMake; everything else is in pyproject.toml.

SFLLAVA_FAST_CPU=auto|0|1: build the CPU kernels if there is a C++ compiler (auto, the default), never, or fail without.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SETTING = os.environ.get("SFLLAVA_FAST_CPU", "auto")


def why_not_compiled():
    """None where the kernels can be built, else the reason."""
    if SETTING not in ("auto", "0", "1"):
        raise SystemExit(f"SFLLAVA_FAST_CPU must be auto, 0 or 1, not {SETTING!r}")
    if SETTING == "0":
        return "SFLLAVA_FAST_CPU=0"
    if not sys.platform.startswith("linux"):
        return f"compiled kernels are for Linux, not {sys.platform}"
    compilers = [os.environ.get("CXX") or "c++", "g++", "clang++"]
    if not any(shutil.which(compiler.split()[0]) for compiler in compilers):
        return "no C++ compiler was found"
    return None


class CMakeBuild(build_ext):
    """One CMake build makes the one library; its name has no Python version in it."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # A folder of its own: CMake remembers its tools' paths, and an isolated build's are gone the next time.
        with tempfile.TemporaryDirectory() as build:
            subprocess.run(["cmake", *generator, "-S", str(ROOT), "-B", build], check=True)
            subprocess.run(["cmake", "--build", build, "--target", "_C"], check=True)
            shutil.copyfile(Path(build) / "_C.so", target)


class StableWheel(bdist_wheel):
    """The library uses torch's stable C ABI and nothing of Python's: one wheel for every Python."""

    def get_tag(self):
        platform = super().get_tag()[2]
        return "py3", "none", platform


reason = why_not_compiled()
if reason and SETTING == "1":
    raise SystemExit(f"SFLLAVA_FAST_CPU=1, but {reason}")
if reason:
    print(f"sfllava_fast: installing without compiled kernels: {reason}", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("sfllava_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableWheel},
)
