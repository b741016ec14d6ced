"""python tests/other_torch.py VERSION...: one wheel, loaded on each of these versions of torch.

Every version gets an environment of its own, several gigabytes where the installer brings the CUDA build, so this is
`make test-torch` and not a part of `make test`.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECK = """
import torch
from sfllava_fast import slowfast_aggregate
from sfllava_fast.info import report
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    features = torch.randn(12, 577, 64).to(dtype)[:, 1:]
    assert torch.equal(slowfast_aggregate(features, backend="cpu"), slowfast_aggregate(features, backend="torch"))
print("torch", torch.__version__, "cpu backend:", report()["backends"]["cpu"])
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(here), str(ROOT))
        wheel = next(here.glob("*.whl"))
        for version in sys.argv[1:]:
            environment = here / version
            run(sys.executable, "-m", "venv", str(environment))
            python = str(environment / "bin" / "python")
            run(python, "-m", "pip", "install", "-q", f"torch=={version}", "numpy", str(wheel))
            run(python, "-c", CHECK, cwd=str(here))


def run(*command: str, cwd: str | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd)


if __name__ == "__main__":
    main()
