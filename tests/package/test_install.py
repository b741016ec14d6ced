"""What `pip` makes of the source tree: sdist, wheel, and an install where there is no compiler.

The editable install is the one that runs these tests.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Tokens of the cpu backend equal the reference's, from whatever sfllava_fast is first on the path.
CHECK = """
import importlib.util, sys, torch, sfllava_fast
from sfllava_fast import slowfast_aggregate
from sfllava_fast.cli.info import report
from sfllava_fast.ops.backends import registry
assert sfllava_fast.__file__.startswith(sys.argv[1]), sfllava_fast.__file__
features = torch.randn(6, 577, 40)[:, 1:]
tokens = slowfast_aggregate(features, backend=sys.argv[2])
assert torch.equal(tokens, slowfast_aggregate(features, backend="torch"))
assert importlib.util.find_spec("sfllava_fast._triton").origin.startswith(sys.argv[1])
assert not importlib.util.find_spec("triton") or registry.load_triton() is None, registry.load_triton()
print(report()["backends"]["cpu"])
"""
# What is benchmarked is what is installed; the folder bench of a source tree is not needed.
BENCH = """
import sys
from sfllava_fast.cli import main as cli
code = cli.main(["bench", "--config", "nosuch"])
from sfllava_fast._bench.harness import record
assert record.__file__.startswith(sys.argv[1]), record.__file__
print(code, record.machine("cpu")["commit"])
"""

pytestmark = pytest.mark.xdist_group("install")  # they share the build below


@pytest.fixture(autouse=True)
def warnings_of_pip(monkeypatch):
    """Its own use of its dependencies is not ours."""
    monkeypatch.delenv("PYTHONWARNINGS")


def pip(*arguments, **env):
    # The environment's own setuptools and cmake build it: an isolated build would fetch them again.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path} | env)


def run_in(target, code, *arguments):
    command = [sys.executable, "-c", code, str(target), *arguments]
    env = os.environ | {"PYTHONPATH": str(target)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=target, env=env)
    assert run.returncode == 0, run.stderr
    return run


def check(target, backend):
    return run_in(target, CHECK, backend).stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    source = out / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("the source distribution is made from a git checkout")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.tar.gz"))


needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler on this machine")


@needs_compiler
def test_wheel_from_sdist_has_kernels_for_every_python(sdist, tmp_path):
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist), SFLLAVA_FAST_CPU="1")
    wheel = next(tmp_path.glob("*.whl"))
    assert re.fullmatch(r"sfllava_fast-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "sfllava_fast/_C.so" in names
    assert "sfllava_fast/_triton/forward.py" in names
    assert "sfllava_fast/_bench/pipeline/report.py" in names
    parts = (
        "py.typed",
        "batch/run.py",
        "patch/transformers.py",
        "serving/vllm_model.py",
        "serving/templates/vicuna.jinja",
    )
    assert {f"sfllava_fast/{part}" for part in parts} <= {*names}
    assert not [name for name in names if name.startswith("sfllava_fast/_bench/") and "/results/" in name]
    assert not [name for name in names if name.startswith("sfllava_fast/_bench/test_")]
    assert "sfllava_fast/embedded/model/model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests", "bench", "csrc", "kernels"))]
    assert wheel.stat().st_size < 14e6  # the embedded model is most of it
    target = tmp_path / "installed"
    pip("install", "--no-deps", "--target", str(target), str(wheel))
    assert "ready" in check(target, "cpu")
    told = run_in(target, BENCH)
    assert told.stdout.startswith("2 release ") and "invalid choice: 'nosuch'" in told.stderr


def test_without_compiler_it_installs_on_the_reference_and_says_so(sdist, tmp_path):
    # A path with Python and nothing else on it.
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation"]
    target = tmp_path / "installed"
    env = {key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": str(tools)}
    run = subprocess.run([*command, "--target", str(target), str(sdist)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    assert "installing without compiled kernels: no C++ compiler was found" in run.stdout + run.stderr
    assert "not available: the package was installed without _C.so (no C++ compiler" in check(target, "auto")


def test_a_source_tree_in_front_of_an_installation_is_named(sdist):
    """`pip install .`, then Python started in the clone: its own folder is imported, which has no library."""
    told = run_in(
        sdist.parent / "source",
        "from sfllava_fast.ops.backends import registry; print(registry.load_library())",
    ).stdout
    assert told.startswith(f"the source tree {sdist.parent / 'source'} was imported, and _C.so is not built in it")


def test_required_kernels_fail_loudly(sdist, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failure:
        pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist), SFLLAVA_FAST_CPU="yes")
    assert "SFLLAVA_FAST_CPU must be auto, 0 or 1" in failure.value.stdout + failure.value.stderr
