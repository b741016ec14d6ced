"""`bench gpu`: everything that needs a GPU, in two parts of several steps.

- op: figures, tunings, counters, tests, sanitizers.
- pipeline: 7B shapes, the projector, tests, the embedded model, reductions, layouts.

It installs nothing and needs no network: it uses the installed Python and torch, and libraries that `make gpu-build`
built elsewhere. A step that fails does not stop the others. Each step has a time limit, a step that no longer fits is
dropped, and results are written after each step.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata, util
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..harness.record import ROOT, ResultError, folder_name, machine, write_json
from ..op import works
from . import carried

BENCH = [sys.executable, "-m", "bench"]
_PASSED, _FAILED, _SKIPPED, _DROPPED = "passed", "FAILED", "skipped", "DROPPED"
_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
_TOOL_FOLDERS = (f"{_HOME}/bin", str(Path(sys.executable).parent))
_SHOWN = 12  # last lines of a step's output; the log has all
_TOOLS = ("nvcc", "c++", "cmake", "ncu", "compute-sanitizer")
_COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "l1tex__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__waves_per_multiprocessor",
)


@dataclass(frozen=True)
class Step:
    """A step of `bench gpu`.

    Attributes:
        name, command: What runs.
        expected, limit: Seconds.
        why_not: Returns a reason not to run it, which is a failure unless the step is optional.
        why_failed: Returns a reason why it failed in spite of exit status 0.
        optional: Whether it may be skipped.
    """

    name: str
    command: list[str]
    expected: float
    limit: float
    why_not: Callable[[], str | None] = lambda: None
    why_failed: Callable[[], str | None] = lambda: None
    optional: bool = False


def run(results: Path, part: str, seconds: float) -> int:
    """Run the steps of a part.

    Args:
        results: The folder with a folder for each device.
        part: One of PARTS.
        seconds: Time limit.

    Returns:
        0 if no step failed or was dropped, else 1.

    Raises:
        ResultError: There is no GPU.
    """
    start = time.monotonic()
    if not torch.cuda.is_available():
        raise ResultError(f"no CUDA device was found (torch {torch.__version__}): this needs an NVIDIA GPU")
    folder = results.resolve() / folder_name(torch.cuda.get_device_name())
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    workers = torch.cuda.mem_get_info()[1] >> 34  # the largest tests need 12 GB
    steps = PARTS[part](folder, arch, min(8, max(1, workers)))
    if missing := carried.why_not(arch):
        print(f"build/gpu cannot be used: {missing}")
        steps = [_carried_build(arch), *steps]
    else:
        print(f"installed: {', '.join(carried.install()) or 'nothing, the package has the same libraries'}")
    known = {"facts": facts(), "not_carried": missing}
    return run_steps(steps, folder / f"{part}-steps.json", seconds - (time.monotonic() - start), known)


def facts() -> dict:
    """Facts about this machine, and the tools that it has."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem,memory.total", "--format=csv"]
    clocks = subprocess.run(query, capture_output=True, text=True).stdout.split("\n") if shutil.which(query[0]) else []
    tools = {name: find(name) for name in _TOOLS}
    return {"machine": machine("cuda"), "nvidia-smi": clocks, "kernel": os.uname().release, "tools": tools}


def op_steps(folder: Path, arch: str, workers: int) -> list[Step]:
    """The most important first, in case time runs out."""
    report, op = folder / "tests.xml", [*BENCH, "op", "--device", "cuda"]
    tests = [*pytest_command(workers), "tests/ops/test_gpu.py", f"--junitxml={report}"]
    compiled = [str(work) for work in works.MAIN if work.peers == "all"]
    return [
        Step("small calls", [*BENCH, "small-calls"], 35, 90),
        Step("op", [*op, "--peers", "eager", *_json(folder, "op")], 70, 110),
        Step("tune", [*BENCH, "tune", *_json(folder, "tune")], 45, 90),
        _counters(folder),
        Step("op, torch.compile", [*op, "--only", *compiled, *_json(folder, "op-compiled")], 80, 120),
        Step("tests on the device", tests, 70, 130, why_no_tests, lambda: why_no_proof(report, ("cuda", "triton"))),
        _memcheck(),
        _build(arch),
    ]


def pipeline_steps(folder: Path, arch: str, workers: int) -> list[Step]:
    """The most important first, in case time runs out."""
    report, cuda = folder / "tests.xml", ["--device", "cuda"]
    files = ("engine/test_gpu_system", "ops/test_triton_project", "ops/test_triton_rows")
    tests = [
        *pytest_command(min(4, workers)),
        *(f"tests/{name}.py" for name in files),
        "-m",
        "gpu",
        f"--junitxml={report}",
    ]
    pipeline = [*BENCH, "pipeline", *cuda, "--rounds", "5"]
    projector = [*BENCH, "projector", *cuda, "--rounds", "5", "--only", "bfloat16"]
    reduction, layouts = ([*BENCH, name, *cuda, "--rounds", "3"] for name in ("reduction", "layouts"))
    embedded = [*pipeline, "--dtype", "float32"]  # trained weights have near ties in 16 bits
    return [
        Step("7B shapes", [*pipeline, "--config", "7b", *_json(folder, "pipeline-7b")], 60, 130, why_no_system),
        Step("projector", [*projector, *_json(folder, "projector")], 15, 60),
        Step(
            "tests on the device",
            tests,
            70,
            120,
            why_no_system,
            lambda: why_no_proof(report, [Path(name).name for name in files]),
        ),
        Step("embedded model", [*embedded, *_json(folder, "pipeline-embedded")], 20, 50, why_no_system),
        Step("reduction", [*reduction, *_json(folder, "reduction")], 40, 60, why_no_system),
        Step("layouts", [*layouts, *_json(folder, "layouts")], 20, 40),
    ]


PARTS = {"op": op_steps, "pipeline": pipeline_steps}


def _json(folder: Path, name: str) -> list[str]:
    return ["--json", str(folder / f"{name}.json")]


def _carried_build(arch: str) -> Step:
    """Builds and installs here what `make gpu-build` should have built."""
    return Step("build first", [*BENCH, "gpu-build", "--arch", arch, "--install"], 45, 120, _why_no_build)


def _build(arch: str) -> Step:
    """Whether the package builds here."""
    settings = ["env", "SFLLAVA_FAST_CPU=1", "SFLLAVA_FAST_CUDA=1", f"CUDAARCHS={arch}-real"]
    built = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "build/here"]
    return Step("build", [*settings, *built], 20, 70, _why_no_build)


def run_steps(steps: list[Step], file: Path, seconds: float, known: dict | None = None) -> int:
    """Run all steps that fit into the time.

    Args:
        steps: The most important first.
        file: JSON with the outcome of each step; the log of their output is beside it.
        seconds: Time limit.
        known: Further fields of the JSON.

    Returns:
        0 if no step failed or was dropped, else 1.
    """
    deadline, log = time.monotonic() + seconds, file.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    outcomes: list[dict] = []
    for step in steps:
        print(f"\n--- {step.name}: {' '.join(step.command)}", flush=True)
        start = time.monotonic()
        status, reason = _run(step, deadline, log)
        outcome = {"step": step.name, "status": status, "reason": reason, "expected": step.expected}
        outcomes.append(outcome | {"limit": step.limit, "seconds": time.monotonic() - start})
        write_json(file, (known or {}) | {"steps": outcomes})
    Console(width=150).print(_table(outcomes, file.parent))
    return 1 if any(outcome["status"] in (_FAILED, _DROPPED) for outcome in outcomes) else 0


def _table(outcomes: list[dict], folder: Path) -> Table:
    table = Table("step", "status", "seconds", "expected", "limit", "reason", title=f"results are in {folder}")
    table.title_justify = "left"
    for outcome in outcomes:
        numbers = (f"{outcome[name]:.0f}" for name in ("seconds", "expected", "limit"))
        table.add_row(outcome["step"], outcome["status"], *numbers, Text(outcome["reason"]))
    seconds, expected = (sum(outcome[name] for outcome in outcomes) for name in ("seconds", "expected"))
    table.add_section()
    table.add_row("all", "", f"{seconds:.0f}", f"{expected:.0f}", "", "")
    return table


def _run(step: Step, deadline: float, log: Path) -> tuple[str, str]:
    left = deadline - time.monotonic()
    if left < step.expected:
        return _DROPPED, f"{max(left, 0):.0f} s were left"
    if reason := step.why_not():  # the check takes time, too
        return _SKIPPED if step.optional else _FAILED, reason
    left = deadline - time.monotonic()
    limit = min(step.limit, left)
    with log.open("a+", errors="replace") as file:
        print(f"\n--- {step.name}", file=file, flush=True)
        begin = file.tell()
        status = _call(step.command, limit, file)
        file.seek(begin)
        print("".join(file.readlines()[-_SHOWN:]), end="", flush=True)
    if status is None:
        return _FAILED, f"took longer than {limit:.0f} s"
    reason = step.why_failed() or (f"exit status {status}" if status else "")
    return (_FAILED, reason) if reason else (_PASSED, "")


def _call(command: list[str], limit: float, output: TextIO) -> int | None:
    """The exit status; None if the command took too long and was killed with all its processes."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_TOOL_FOLDERS])
    modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONPATH": modules, "PYTHONUNBUFFERED": "1"}
    given = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **given)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def pytest_command(workers: int) -> list[str]:
    """pytest without options of plugins that may be missing."""
    python = ["env", "OMP_NUM_THREADS=1", sys.executable]  # the workers share the cores
    command = [*python, "-m", "pytest", "-q", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
    return [*command, "-n", str(workers), "--dist", "loadgroup"] if util.find_spec("xdist") else command


def why_no_proof(report: Path, needed: Sequence[str]) -> str | None:
    """Why a report proves nothing: for some of the needed words, no test with it in its name ran; None if it does."""
    if not report.exists():
        return "the tests did not run to their end"
    ran = dict.fromkeys(needed, 0)
    for case in xml.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}"
        for word in ran:
            ran[word] += word in name and case.find("skipped") is None
    report.unlink()
    idle = [word for word, count in ran.items() if not count]
    return f"every test of {' and '.join(idle)} was skipped" if idle else None


def _why_no_build() -> str | None:
    missing = [name for name in ("cmake", "c++", "nvcc") if not find(name)]
    if not util.find_spec("setuptools") or int(metadata.version("setuptools").split(".")[0]) < 77:
        missing.append("setuptools >= 77")
    return f"missing: {', '.join(missing)}" if missing else None


def why_no_tests() -> str | None:
    missing = [name for name in ("pytest", "hypothesis") if not util.find_spec(name)]
    return f"missing: {', '.join(missing)}" if missing else None


def why_no_system() -> str | None:
    missing = [name for name in ("transformers", "tokenizers", "safetensors", "PIL") if not util.find_spec(name)]
    return f"missing: {', '.join(missing)}" if missing else why_no_tests()


def _counters(folder: Path) -> Step:
    ncu = find("ncu") or next(map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)), "ncu")
    kernels = ["-k", "regex:tile_kernel|pool_tiles|spread_tiles"]
    output = ["--csv", "--page", "raw", "--log-file", str(folder / "counters.csv")]
    command = [ncu, "--clock-control", "none", "--metrics", ",".join(_COUNTERS), *kernels, *output]
    reason = None if shutil.which(ncu) else "ncu was not found"
    return Step("counters", [*command, *BENCH, "small-calls", "--main-works"], 35, 60, lambda: reason, optional=True)


def _memcheck() -> Step:
    sanitizer = find("compute-sanitizer") or "compute-sanitizer"
    # Without torch's cache every tensor is its own allocation with checked bounds.
    alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--tool", "memcheck", "--error-exitcode", "3"]
    refused = partial(why_refused, sanitizer)
    return Step("memcheck", [*alone, "--print-limit", "5", *BENCH, "small-calls"], 40, 90, refused, optional=True)


@cache
def why_refused(sanitizer: str) -> str | None:
    """Why compute-sanitizer cannot run even a minimal program; None if it can."""
    if not shutil.which(sanitizer):
        return "compute-sanitizer was not found"
    touch = "import torch; torch.ones(1, device='cuda').cpu()"
    probe = [sanitizer, "--error-exitcode", "3", sys.executable, "-c", touch]
    try:
        probed = subprocess.run(probe, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"compute-sanitizer: {error}"
    lines = [line.strip("= ") for line in probed.stdout.splitlines() if line.startswith("=") and line.strip("= ")]
    reason = next((line for line in lines if "COMPUTE-SANITIZER" not in line), f"exit status {probed.returncode}")
    return f"this machine refuses it: {reason}" if probed.returncode else None


def find(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_TOOL_FOLDERS))
