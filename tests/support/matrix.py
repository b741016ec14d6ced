"""python tests/support/matrix.py [ROW ...]: tests with the oldest and newest supported versions, and a table.

`make test` runs every test with the versions of constraints.txt. A row changes some of them: on top of the environment
that runs this script, or, if the row names a Python, in an environment of its own. Rows with a Python and torch take
several gigabytes each. --keep DIR leaves the environments there, for another run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONS = "3.10", "3.11", "3.12", "3.13", "3.14"
# Folders and files of tests/, without their test_ and .py.
MODELS = (
    "reduction engine model/generation batch/batch patch/patch_transformers bench/pipeline_bench bench/reduction_bench"
)
_OP = "aggregate videos gradients misuse modules rows cpu_kernel stable_abi projector stream memory_stream"
OP = " ".join(f"ops/{name}" for name in _OP.split())
TRITON = "ops/triton ops/triton_rows ops/triton_project"
DECODERS = "numpy", "pillow", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "imageio-ffmpeg"
OUTCOMES = {True: "passed", False: "FAILED", None: "not run"}
PINNED = "-c", "constraints.txt"
FOUND = """
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "triton", "transformers", "av", "numpy", "pillow"):
    try:
        print(name, version(name), end="  ")
    except PackageNotFoundError:
        pass
"""


@dataclass(frozen=True)
class Row:
    """A row of the matrix.

    packages: what pip installs. tests: what test_path takes; "": every test. python: such as
        "3.12", or "newest" of what this machine has; None: on top of the environment that runs this script.
    """

    packages: tuple[str, ...]
    tests: str = ""
    python: str | None = None


def requirements(extra: str) -> Iterator[str]:
    """What pyproject.toml asks for with this extra, its own extras resolved."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    yield from project["dependencies"] if extra == "test" else ()
    for asked in project["optional-dependencies"][extra]:
        if own := re.fullmatch(r"sfllava_fast\[(.+)\]", asked):
            for name in own[1].split(","):
                yield from requirements(name)
        else:
            yield asked


def expand(package: str) -> Iterator[str]:
    """`oldest` and `test` are the lower bounds and the requirements of pyproject.toml, but for torch and Triton, which
    have rows of their own; anything else goes to pip as it is."""
    if package not in ("oldest", "test"):
        yield package
        return
    for text in requirements("test"):
        if not text.startswith(("torch", "triton")):
            yield text.replace(">=", "==", 1) if package == "oldest" else text


ROWS = {
    "decoding": Row(("av", *DECODERS), "video", "newest"),
    "transformers-newest": Row(("transformers",), MODELS),
    "transformers-5.23": Row(("transformers==5.23.0",), MODELS),
    "oldest": Row(("oldest",)),
    "av-14": Row(("av==14.1.0", *DECODERS), "video", "3.11"),
    "av-18": Row(("av==18.1.0", *DECODERS), "video", "3.11"),
    "triton-3.6": Row(("triton==3.6.0",), TRITON),
    "triton-newest": Row(("triton",), TRITON),
    "torch-2.10": Row(("torch==2.10.0", "triton==3.6.0", "test"), OP, "3.11"),
    "torch-newest": Row(("torch", "test"), OP, "newest"),
    "python-3.10": Row((*PINNED, "-e", ".[test]"), f"{OP} video {MODELS}", "3.10"),
    "python-3.12": Row((*PINNED, "-e", ".[test]"), f"{OP} video {MODELS}", "3.12"),
    "python-3.13": Row((*PINNED, "-e", ".[test]"), f"{OP} video {MODELS}", "3.13"),
    "newest": Row(("-e", ".[test]"), python="newest"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"(default: all) {', '.join(ROWS)}")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the environments in this folder")
    parser.add_argument("--jobs", default="2", metavar="N", help="test processes (default: 2)")
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no row {unknown[0]}: take {', '.join(ROWS)}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.rows or ROWS:
            print(f"== {name}", flush=True)
            results[name] = run(ROWS[name], (args.keep or Path(folder)) / name, args.jobs)
    print()
    for name, (version, good, said) in results.items():
        print(f"{name:<20} Python {version:<5} {OUTCOMES[good]}: {said}")
    return int(any(good is False for _, good, _ in results.values()))


def run(row: Row, folder: Path, jobs: str) -> tuple[str, bool | None, str]:
    """The Python's version, whether the tests passed (None: they did not run), and what there is to tell of it."""
    python = find_python(row.python) if row.python else sys.executable
    if python is None:
        return row.python, None, f"this machine has no Python {row.python}"
    version = output(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    python = environment(python, folder, own=row.python is not None)
    packages = [text for name in row.packages for text in expand(name)]
    # The CUDA kernels are the ones that `make` built: they depend on nothing that a row changes.
    settings = os.environ | {"SFLLAVA_FAST_CUDA": "0", "OMP_NUM_THREADS": "1"}
    install = [python, "-m", "pip", "install", "-q", "--upgrade", *packages]
    if subprocess.run(install, cwd=ROOT, env=settings).returncode:
        return version, False, "pip could not install " + " ".join(packages)
    found = output(python, "-c", FOUND)
    if not row.python and found == output(sys.executable, "-c", FOUND):
        return version, None, f"`make test` has these versions: {found}"
    files = [str(test_path(name)) for name in row.tests.split()]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", jobs, *files]
    process = subprocess.Popen(tests, cwd=ROOT, env=settings, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip().strip("= ") or last
    return version, process.wait() == 0, f"{last}; {found}"


def test_path(name: str) -> Path:
    """A folder of tests/, or with a "/" a file in one."""
    folder, _, file = name.partition("/")
    return ROOT / "tests" / folder / (f"test_{file}.py" if file else "")


def environment(python: str, folder: Path, own: bool) -> str:
    """The Python of a new virtual environment; if it is not its own, with the packages of this one below it."""
    made = folder / "bin" / "python"
    if not made.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        if not own:
            packages = output(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
            site = output(str(made), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
            Path(site, "below.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    return str(made)


def find_python(version: str) -> str | None:
    """An interpreter of this version, "newest" of them all, on the path or among pyenv's; None if there is none."""
    if version == "newest":
        return next(filter(None, map(find_python, reversed(PYTHONS))), None)
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [shutil.which(f"python{version}"), *home.glob(f"versions/{version}.*/bin/python")]
    return next((str(place) for place in places if place and works(str(place))), None)


def works(python: str) -> bool:
    """A shim of pyenv is on the path also if its Python is not the chosen one; it then fails."""
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
