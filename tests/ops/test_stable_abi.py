"""One compiled library serves every torch >= 2.10, if it calls torch's stable C ABI of 2.10 and nothing else."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from sfllava_fast.ops.backends import registry

LIBRARY = registry.LIBRARY
REPOSITORY = Path(__file__).parents[2]
INCLUDE = Path(torch.__file__).parent / "include"
SHIMS = [INCLUDE / "torch/csrc/inductor/aoti_torch/c/shim.h", INCLUDE / "torch/csrc/stable/c/shim.h"]
OLDEST = (2, 10)

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="installed without compiled kernels")


class Elf:
    """What a 64-bit little-endian ELF library needs: `needed` libraries and `undefined` symbols."""

    SHT_DYNAMIC, SHT_DYNSYM, DT_NEEDED = 6, 11, 1

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        assert self.data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
        (start,), (size, count) = (
            struct.unpack_from("<Q", self.data, 40),
            struct.unpack_from("<HH", self.data, 58),
        )
        # name, type, flags, address, offset, size, link, info, alignment, entry size
        self.sections = [struct.unpack_from("<IIQQQQIIQQ", self.data, start + i * size) for i in range(count)]
        self.needed = {name for tag, name in self.entries(self.SHT_DYNAMIC, "<qQ", 1) if tag == self.DT_NEEDED}
        symbols = self.entries(self.SHT_DYNSYM, "<IBBHQQ", 0)
        self.undefined = {name for name, _, _, section, _, _ in symbols if section == 0 and name}

    def entries(self, kind: int, layout: str, name_at: int):
        """The rows of a section, with the number at `name_at` read as a name."""
        (section,) = (s for s in self.sections if s[1] == kind)
        names = self.sections[section[6]]
        for row in struct.iter_unpack(layout, self.data[section[4] : section[4] + section[5]]):
            start = names[4] + row[name_at]
            name = self.data[start : self.data.index(b"\0", start)] if row[name_at] < names[5] else b""
            yield (*row[:name_at], name.decode(errors="replace"), *row[name_at + 1 :])


def declared(header: Path) -> dict[str, tuple[int, int]]:
    """Functions that a shim header declares, and since which torch: (0, 0) where it does not say."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
    functions, blocks = {}, []
    for line in text.splitlines():
        if re.match(r"\s*#\s*if", line):
            found = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", line)
            blocks.append((int(found[1]), int(found[2])) if found else (0, 0))
        elif re.match(r"\s*#\s*endif", line):
            blocks.pop()
        for name in re.findall(r"\b((?:aoti_)?torch_\w+)\(", line):
            functions[name] = max(blocks, default=(0, 0))
    assert not blocks
    return functions


def allowed() -> set[str]:
    return {name for header in SHIMS for name, since in declared(header).items() if since <= OLDEST}


def test_the_headers_are_understood():
    since = {name: version for header in SHIMS for name, version in declared(header).items()}
    assert len(allowed()) > 80
    assert since["aoti_torch_get_data_ptr"] == (0, 0) and since["torch_parallel_for"] == (2, 10)
    if (newer := "torch_library_def_with_tags") in since:
        assert since[newer] == (2, 12) and newer not in allowed()


@needs_library
def test_the_library_calls_only_torchs_stable_abi():
    undefined = Elf(LIBRARY).undefined
    of_torch = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert of_torch and of_torch <= allowed(), sorted(of_torch - allowed())
    of_cpp = [name for name in undefined if re.match(r"_Z", name) and re.search(r"\d(c10|at|torch|caffe2)[0-9E]", name)]
    assert not of_cpp
    assert not [name for name in undefined if re.match(r"_?Py", name)]


@needs_library
def test_the_library_needs_torch_and_no_python():
    needed = Elf(LIBRARY).needed
    assert "libtorch.so" in needed
    assert not [name for name in needed if re.search(r"python|c10|libtorch_", name)]


@needs_library
def test_our_declarations_are_the_ones_the_library_uses():
    header = (REPOSITORY / "csrc/torch/stable_abi.h").read_text()
    used = {name for name in Elf(LIBRARY).undefined if re.match(r"(aoti_)?torch_", name)}
    assert used == set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", header))


@pytest.fixture(scope="module")
def compiles(tmp_path_factory):
    """Whether our declarations, after replacing one text by another, compile beside torch's own."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")

    def check(old: str = "", new: str = "") -> bool:
        root = tmp_path_factory.mktemp("abi")
        (root / "tests/cpp").mkdir(parents=True)
        (root / "csrc/torch").mkdir(parents=True)
        ours = (REPOSITORY / "csrc/torch/stable_abi.h").read_text()
        assert old in ours
        (root / "csrc/torch/stable_abi.h").write_text(ours.replace(old, new, 1) if old else ours)
        test = shutil.copy(REPOSITORY / "tests/cpp/stable_abi_test.cpp", root / "tests/cpp")
        command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{INCLUDE}", test]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0 or "stable_abi.h" in result.stderr, result.stderr
        return result.returncode == 0

    return check


def test_our_declarations_are_torchs(compiles):
    assert compiles()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("void** data", "void* data"),
        ("uint64_t build_version", "uint32_t build_version"),
    ],
)
def test_a_declaration_that_differs_does_not_compile(compiles, old, new):
    assert not compiles(old, new)
