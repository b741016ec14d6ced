"""The CUDA library as it is built, with no GPU: registers, spills, instructions, symbols, and that it loads.

What the kernels compute is tested on the CPU by tests/cpp/gpu_test.cpp, from the same source.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from sass import most_in_flight
from test_stable_abi import INCLUDE, Elf, allowed

from sfllava_fast.layouts.presets import parse_layout
from sfllava_fast.ops.backends.plan_table import plan_table

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "sfllava_fast/_C_cuda.so"
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
BLOCK = 128  # lanes
BYTES_IN_FLIGHT = 40 << 10  # of a multiprocessor: its bandwidth x latency is 25 KiB on the H200, 44 KiB on the B200
# A symbol that Python's process finds in libtorch, wherever torch has CUDA.
WEAK = "aoti_torch_get_current_cuda_stream"

pytestmark = pytest.mark.xdist_group("cuda")  # they share the build below


def tool(name: str) -> str | None:
    """A CUDA tool: on the path, in the toolkit, or in Triton's wheel."""
    folders = ["/usr/local/cuda/bin", f"{sysconfig.get_path('purelib')}/triton/backends/nvidia/bin"]
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=folder) for folder in folders)), None)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    if INSTALLED.exists():
        return INSTALLED
    if not (nvcc := tool("nvcc")):
        pytest.skip("installed without CUDA kernels, and there is no nvcc to build them")
    build = tmp_path_factory.mktemp("cuda")
    options = ["-DSFLLAVA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    subprocess.run(["cmake", *options, "-S", str(ROOT), "-B", str(build)], check=True, capture_output=True)
    log = subprocess.run(["cmake", "--build", str(build), "--target", "_C_cuda"], capture_output=True, text=True)
    assert log.returncode == 0, log.stdout + log.stderr
    assert "warning" not in log.stdout + log.stderr
    return build / "_C_cuda.so"


def cuobjdump(library: Path, *options: str) -> str:
    if not (program := tool("cuobjdump")):
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit, and with Triton")
    return subprocess.run([program, *options, str(library)], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def resources(library) -> dict[tuple[str, str], dict[str, int]]:
    """What each kernel takes, by (architecture, mangled name): REG, STACK, LOCAL and so on."""
    found, arch = {}, None
    for line in cuobjdump(library, "-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif "STACK:" in line:
            found[arch, name] = {key: int(number) for key, number in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


@pytest.fixture(scope="session")
def instructions(library) -> dict[tuple[str, str], str]:
    """Each kernel's SASS, by (architecture, mangled name)."""
    code = {}
    for part in re.split(r"\n(?=\s*arch = sm_)", cuobjdump(library, "-sass"))[1:]:
        arch = re.search(r"sm_\d+", part)[0]
        for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", part, re.DOTALL):
            code[arch, name] = body
    return code


def of_kernel(table: dict, kernel: str) -> dict:
    found = {key: value for key, value in table.items() if kernel in key[1]}
    assert {arch for arch, _ in found} == set(ARCHS)
    return found


def is_packed(name: str) -> bool:
    """Box kernels end in the number of elements a lane takes; tile kernels take 16 bytes."""
    return "tile_kernel" in name or not re.search(r"box_kernelI\S*?Li1E", name)


def is_backward(name: str) -> bool:
    return "DirectionE1E" in name


def test_every_kernel_is_there_for_every_architecture(resources):
    for arch in ARCHS:
        names = [name for found, name in resources if found == arch]
        # 2 directions, 3 dtypes; tiles: 2 widths x 5 kinds of fine boxes; boxes: by 16 bytes and by element.
        assert len([name for name in names if "tile_kernel" in name]) == 2 * 3 * 2 * 5
        assert len([name for name in names if "box_kernel" in name]) == 2 * 3 * 2
        assert len([name for name in names if is_backward(name)]) == len(names) / 2


def test_newer_devices_get_ptx(library):
    assert "sm_120.ptx" in cuobjdump(library, "-lptx")


def test_nothing_spills(resources):
    spilled = {key: use for key, use in resources.items() if use["STACK"] or use["LOCAL"]}
    assert not spilled


def strip_loads(name: str) -> int:
    """Loads that must be in flight together for a strip: its patches, and in a backward the gradients of its boxes."""
    width, *box, reduce = map(int, re.search(r"ShapeILi(\d)ELi(\d)ELi(\d)ELNS_6ReduceE(\d)E", name).groups())
    if not is_backward(name):
        return width * box[0]
    chooses = reduce == 0 and box != [1, 1]
    return width // box[1] + width * box[0] * chooses


def test_enough_reads_are_in_flight(resources):
    # 64 K registers are dealt out in blocks of BLOCK lanes. Without a maximum a backward is almost all stores.
    for (arch, name), use in of_kernel(resources, "tile_kernel").items():
        warps = 65536 // (-(-use["REG"] // 8) * 8 * BLOCK) * BLOCK // 32
        assert warps >= 12, (arch, name, use)
        if not is_backward(name) or strip_loads(name) > 6:
            assert warps * strip_loads(name) * 512 >= BYTES_IN_FLIGHT, (arch, name, use)


def test_reads_and_writes_are_16_bytes_wide(instructions):
    for (arch, name), code in instructions.items():
        loads = re.findall(r"LDG\.E\.128\S*", code)
        stores = re.findall(r"STG\.E\.128\S*", code)
        narrow = re.findall(r"STG\.E(?!\.128)\S*", code)
        if not is_packed(name):
            assert not loads and narrow, (arch, name)
            continue
        assert loads and all("CONSTANT" in load for load in loads), (arch, name)
        assert stores and not narrow, (arch, name)


def test_a_strip_of_the_tile_is_in_flight_at_once(instructions):
    for (arch, name), code in of_kernel(instructions, "tile_kernel").items():
        assert most_in_flight(code) == strip_loads(name), (arch, name)
        if not is_backward(name):
            assert len(re.findall(r"LDG\.E\.128", code)) == strip_loads(name), (arch, name)


def test_division_is_exact_and_nothing_is_atomic(instructions):
    for (arch, name), code in instructions.items():
        assert "FCHK" in code, (arch, name)  # the operands' check that only IEEE division makes
        assert not re.search(r"\b(ATOM\w*|RED)\b", code), (arch, name)


def test_a_product_is_rounded_before_it_is_added(library):
    """In PTX: what ptxas makes of a division has fused steps of its own."""
    ptx = cuobjdump(library, "-ptx")
    assert {"add.rn.f32", "mul.rn.f32"} <= set(re.findall(r"\b(?:add|mul)\S*\.f32\b", ptx))
    assert not re.search(r"\bmad\S*\.f|\b(add|sub|mul)\.f", ptx)
    kernels = re.findall(r"\.entry (\S+)\((.*?)(?=\.entry|\Z)", ptx, re.DOTALL)
    for name, code in kernels:  # a quotient's two corrections, for each element of a lane, and no others
        width = 1 if not is_packed(name) else 4 if "E1Ef" in name or "E0Ef" in name else 8
        assert len(re.findall(r"\bfma\S*\.f", code)) == 2 * width * len(re.findall(r"\brcp\.rn", code)), name
    assert len(kernels) > 70


def test_the_library_calls_only_torchs_stable_abi(library):
    elf = Elf(library)
    of_torch = {name for name in elf.undefined if re.match(r"(aoti_)?torch_", name)}
    assert WEAK in of_torch and of_torch - {WEAK} <= allowed()
    foreign = re.compile(r"_Z\S*\d(c10|at|torch|caffe2)[0-9E]|_?Py|cuda|cu[A-Z]")
    assert not [name for name in elf.undefined if foreign.match(name)]
    others = elf.needed - {"libtorch.so", "libstdc++.so.6", "libgcc_s.so.1"}
    assert not [name for name in others if not re.match(r"(libc|libm|libdl|librt|libpthread|ld-linux\S*)\.so", name)]


CPUS_ALONE = {
    "torch_delete_list",
    "torch_list_get_item",
    "torch_list_size",
    "torch_parallel_for",
}


def test_our_declarations_are_torchs(library):
    text = "".join((ROOT / f"csrc/torch/{name}.h").read_text() for name in ("stable_abi", "stable_abi_cuda"))
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", text)) - CPUS_ALONE
    assert declared == {name for name in Elf(library).undefined if re.match(r"(aoti_)?torch_", name)}
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{INCLUDE}", ROOT / "tests/cpp/stable_abi_cuda_test.cpp"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_it_loads_without_a_gpu(library):
    """In a process of its own: a library stays loaded."""
    code = f"""
import torch, sfllava_fast
torch.ops.load_library({str(library)!r})
for op in ("pool_gpu", "pool_backward_gpu"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("sfllava_fast::" + op, "CUDA")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("layout", "frames", "grid", "path"),
    [
        ("slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4", 50, (24, 24), b"tile"),
        ("slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4", 4, (24, 24), b"tile"),  # frames repeat
        ("slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4", (8, 33, 1), (24, 24), b"tile"),
        ("slowfast-slow_4frms_spatial_2d_avg_pool-fast_6x6", 16, (24, 24), b"tile"),
        ("slowfast-slow_4frms_concat-fast_4x4", 16, (16, 16), b"tile"),
        ("slowfast-slow_10frms_spatial_1d_max_pool-fast_5x5", 50, (24, 24), b"box"),
        ("slowfast-slow_10frms_spatial_1d_max_pool-fast_4x4", 50, (27, 27), b"box"),
        ("slowfast-slow_10frms_spatial_1d_max_pool", 50, (24, 24), b"box"),
        ("slowfast-fast_4x4", 50, (24, 24), b"box"),
        ("a:each,each,stride2,max+b:each,adaptive4,adaptive4,mean;x@row;y@frame;interleaved", 8, (24, 24), b"tile"),
        ("a:every2,each,stride2,mean,pad9+b:each,adaptive4,adaptive4,mean", 8, (24, 24), b"tile"),
        ("a:each,each,each,max,class+b:each,adaptive3,adaptive3,mean", 8, (24, 24), b"box"),
        ("a:each,linear2,linear2,mean+b:each,adaptive4,adaptive4,mean", 8, (24, 24), b"box"),
    ],
)
def test_which_layouts_are_tiled(library, layout, frames, grid, path):
    table = plan_table(parse_layout(layout).plan(frames, grid))
    assert path_of(library)(table.data_ptr(), table.numel(), False) == path
    assert path_of(library)(table.data_ptr(), table.numel() - 1, False) is None


def path_of(library):
    call = ctypes.CDLL(str(library)).sfllava_cuda_path
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool], ctypes.c_char_p
    return call


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_sanitizers_watch_both_ways(library, backward):
    """The small calls of bench/gpu/sanitize.py reach tiles of either width, and boxes."""
    pytest.importorskip("rich")
    from bench.gpu.sanitize import CASES, LENGTHS

    found = set()
    for layout, grid in CASES:
        table = plan_table(layout.plan(LENGTHS, grid))
        path = path_of(library)(table.data_ptr(), table.numel(), backward)
        found.add((path, grid[1] // layout.fast_grid[1]) if path == b"tile" else path)
    assert found == {b"box", (b"tile", 4), (b"tile", 6)}


def test_what_only_the_benchmark_has_is_built_and_loads(tmp_path, monkeypatch):
    """The copy kernel, and of each direction the variant that is the default."""
    pytest.importorskip("rich")
    if not (nvcc := tool("nvcc")):
        pytest.skip("there is no nvcc")
    from bench.gpu import carried, copies, tune

    monkeypatch.setattr(tune, "BUILT", tmp_path)
    monkeypatch.setattr(copies, "LIBRARY", tmp_path / "bench/copy.so")
    chosen = [tune.Variant(direction, tuning) for direction, tuning in tune.defaults().items()]
    monkeypatch.setattr(tune, "variants", lambda: chosen)
    carried.build_bench([nvcc, *carried.NVCC, "-gencode=arch=compute_90,code=sm_90"])
    libraries = {copies.LIBRARY: "sfllava_copy"} | {variant.library: "sfllava_variant" for variant in chosen}
    for library, name in libraries.items():
        assert carried.newest_glibc(library) <= 34
        assert not {needed for needed in Elf(library).needed if "cuda" in needed}
        code = f"import ctypes; ctypes.CDLL({str(library)!r}).{name}"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    kernels = cuobjdump(chosen[1].library, "-res-usage")
    assert len(re.findall(r"Function \S*tile_kernel", kernels)) == 1 and "DirectionE1E" in kernels


def setup(path: str | None = None, **variables: str) -> subprocess.CompletedProcess:
    """setup.py as far as its choice of libraries."""
    env = {key: value for key, value in os.environ.items() if key != "CXX"} | variables
    env |= {} if path is None else {"PATH": path}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_kernels_that_are_not_wanted_are_named():
    run = setup(SFLLAVA_FAST_CUDA="0")
    assert run.returncode == 0 and "without CUDA kernels: SFLLAVA_FAST_CUDA=0" in run.stderr


def test_kernels_that_must_be_built_fail_loudly(tmp_path):
    run = setup(str(tmp_path), SFLLAVA_FAST_CUDA="1")  # a path with nothing on it
    assert run.returncode and "SFLLAVA_FAST_CUDA=1, but no C++ compiler was found" in run.stderr
    run = setup(SFLLAVA_FAST_CUDA="yes")
    assert run.returncode and "SFLLAVA_FAST_CUDA must be auto, 0 or 1, not 'yes'" in run.stderr
