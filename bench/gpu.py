"""Everything that needs a GPU, in two parts, each in steps: the op (build, tests, compute-sanitizer, benchmark,
roofline) and the whole pipeline (tests, the projector, 7B shapes, the embedded model).

It installs nothing and needs no network: it runs under the Python and the torch that are there. A step that fails does
not stop the others; each has a limit, and a part ends in time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata, util
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .record import ROOT, ResultError, folder_name, write_json

_SECONDS = 530
_SMALL_CALLS = [sys.executable, "-m", "bench.sanitize"]
_PASSED, _FAILED, _SKIPPED = "passed", "FAILED", "skipped"
_OTHER_TESTS = ("backends", "ops", "table", "reference", "cpu_kernel", "rows", "stable_abi", "config", "bench")
_TOOL_FOLDERS = (f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", str(Path(sys.executable).parent))


@dataclass(frozen=True)
class Step:
    """A command and its seconds. `why_not` may have a reason not to run it, which is a failure unless it is optional;
    `why_failed` one not to believe its exit status."""

    name: str
    command: list[str]
    limit: float
    why_not: Callable[[], str | None] = lambda: None
    why_failed: Callable[[], str | None] = lambda: None
    optional: bool = False


def run(results: Path, part: str = "op") -> int:
    """0 where no step failed; ResultError without a GPU."""
    if not torch.cuda.is_available():
        raise ResultError(f"no CUDA device was found (torch {torch.__version__}): this needs an NVIDIA GPU")
    folder = results / folder_name(torch.cuda.get_device_name())
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    workers = torch.cuda.mem_get_info()[1] >> 34  # the largest tests take up to 12 GB
    return run_steps(PARTS[part](folder, capability, min(8, max(1, workers))), folder, f"{part}-steps.json")


def op_steps(folder: Path, capability: str, workers: int) -> list[Step]:
    """In order: what needs no GPU, and runs alike without one, comes last."""
    python, report, result = sys.executable, folder / "tests.xml", str(folder / "op.json")
    tests = [*_pytest(workers), "tests/test_gpu.py", f"--junitxml={report}"]
    other = [f"tests/test_{name}.py" for name in _OTHER_TESTS]
    return [
        _build(capability),
        Step("tests on the device", tests, 145, _why_no_tests, lambda: why_no_proof(report, ("cuda", "triton"))),
        Step("small calls", _SMALL_CALLS, 40),
        *_sanitizer_steps(),
        Step("benchmark", [python, "-m", "bench", "op", "--device", "cuda", "--slow-peers", "--json", result], 260),
        Step("roofline", [python, "-m", "bench", "plot", result, "--out", str(folder / "roofline.png")], 30),
        Step("other tests", [*_pytest(8), *other], 120, _why_no_tests),
    ]


def pipeline_steps(folder: Path, capability: str, workers: int) -> list[Step]:
    """In the order of what would be missed most, but for the tests, without which nothing counts."""
    report, bench = folder / "tests.xml", [sys.executable, "-m", "bench"]
    files = ("test_gpu_system", "test_triton_project", "test_triton_rows")
    tests = [*_pytest(min(4, workers)), *(f"tests/{name}.py" for name in files), "-m", "gpu", f"--junitxml={report}"]
    pipeline = [*bench, "pipeline", "--device", "cuda"]

    def written(name: str) -> list[str]:
        return ["--json", str(folder / f"{name}.json"), "--plot", str(folder / f"{name}.png")]

    projector, reduction, layouts = (
        [*bench, name, "--device", "cuda", "--json", str(folder / f"{name}.json")]
        for name in ("projector", "reduction", "layouts")
    )
    return [
        _build(capability),
        Step("tests on the device", tests, 150, _why_no_system, lambda: why_no_proof(report, files)),
        Step("projector", projector, 60),
        Step("7B shapes", [*pipeline, "--config", "7b", *written("pipeline-7b")], 130, _why_no_system),
        Step("embedded model", [*pipeline, *written("pipeline-embedded")], 40, _why_no_system),
        Step("reduction", reduction, 50, _why_no_system),
        Step("layouts", layouts, 30),
    ]


PARTS = {"op": op_steps, "pipeline": pipeline_steps}


def _build(capability: str) -> Step:
    settings = ["env", "SFLLAVA_FAST_CPU=1", "SFLLAVA_FAST_CUDA=1", f"CUDAARCHS={capability}-real"]
    return Step("build", [*settings, sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 70, _why_no_build)


def run_steps(steps: list[Step], folder: Path, file: str = "steps.json") -> int:
    """Runs them all and says how each went, here and in a file of the folder."""
    deadline = time.monotonic() + _SECONDS
    outcomes = []
    for step in steps:
        print(f"\n--- {step.name}: {' '.join(step.command)}", flush=True)
        start = time.monotonic()
        status, reason = _run(step, deadline - start)
        outcomes.append({"step": step.name, "status": status, "reason": reason, "seconds": time.monotonic() - start})
    write_json(folder / file, outcomes)
    table = Table("step", "status", "seconds", "reason", title=f"results are in {folder}", title_justify="left")
    for outcome in outcomes:
        table.add_row(outcome["step"], outcome["status"], f"{outcome['seconds']:.0f}", outcome["reason"])
    Console(width=150).print(table)
    return 1 if any(outcome["status"] == _FAILED for outcome in outcomes) else 0


def _run(step: Step, left: float) -> tuple[str, str]:
    if reason := step.why_not():
        return _SKIPPED if step.optional else _FAILED, reason
    limit = min(step.limit, left)
    if limit <= 0:
        return _FAILED, "no time was left"
    status = _call(step.command, limit)
    if status is None:
        return _FAILED, f"took longer than {limit:.0f} s"
    reason = step.why_failed() or (f"exit status {status}" if status else "")
    return (_FAILED, reason) if reason else (_PASSED, "")


def _call(command: list[str], limit: float) -> int | None:
    """The exit status; None where it took too long and was ended, with all that it had started."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_TOOL_FOLDERS])
    modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONPATH": modules, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _pytest(workers: int) -> list[str]:
    """pytest without the options of plugins that may not be there."""
    python = ["env", "OMP_NUM_THREADS=1", sys.executable]  # the workers share the cores
    command = [*python, "-m", "pytest", "-q", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider"]
    return [*command, "-n", str(workers), "--dist", "loadgroup"] if util.find_spec("xdist") else command


def why_no_proof(report: Path, needed: tuple[str, ...]) -> str | None:
    """None where for each word some test ran that has it in its name, else the reason."""
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
    missing = [name for name in ("cmake", "c++", "nvcc") if not _find(name)]
    if not util.find_spec("setuptools") or int(metadata.version("setuptools").split(".")[0]) < 77:
        missing.append("setuptools >= 77")
    return f"missing: {', '.join(missing)}" if missing else None


def _why_no_tests() -> str | None:
    missing = [name for name in ("pytest", "hypothesis") if not util.find_spec(name)]
    return f"missing: {', '.join(missing)}" if missing else None


def _why_no_system() -> str | None:
    missing = [name for name in ("transformers", "tokenizers", "safetensors", "PIL") if not util.find_spec(name)]
    return f"missing: {', '.join(missing)}" if missing else _why_no_tests()


def _sanitizer_steps() -> list[Step]:
    sanitizer = _find("compute-sanitizer") or "compute-sanitizer"
    # Without torch's cache every tensor is an allocation of its own, whose bounds are watched.
    alone = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, "--error-exitcode", "3", "--print-limit", "5"]
    tools = ("memcheck", "racecheck", "initcheck")
    refused = partial(_why_refused, sanitizer)
    return [Step(tool, [*alone, "--tool", tool, *_SMALL_CALLS], 40, refused, optional=True) for tool in tools]


@cache
def _why_refused(sanitizer: str) -> str | None:
    """Why compute-sanitizer cannot watch even a program that does next to nothing."""
    if not shutil.which(sanitizer):
        return "compute-sanitizer was not found"
    touch = "import torch; torch.ones(1, device='cuda').cpu()"
    probe = [sanitizer, "--error-exitcode", "3", sys.executable, "-c", touch]
    try:
        probed = subprocess.run(probe, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"compute-sanitizer: {error}"
    lines = [line.strip("= ") for line in probed.stdout.splitlines() if line.startswith("=") and line.strip("= ")]
    said = next((line for line in lines if "COMPUTE-SANITIZER" not in line), f"exit status {probed.returncode}")
    return f"this machine refuses it: {said}" if probed.returncode else None


def _find(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_TOOL_FOLDERS))
