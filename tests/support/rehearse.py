"""The steps of `make gpu` without a GPU: python tests/support/rehearse.py gpu [--part pipeline] --out FOLDER.

Each step runs this script instead of `python -m bench`. Commands of the op run on a fake torch.cuda, those of the
pipeline on the CPU, all with small shapes. Tests of the device are collected and skipped; ncu and compute-sanitizer are
skipped if they are not installed.
"""

from __future__ import annotations

import sys
from operator import setitem
from pathlib import Path

import torch
from gpu_stand_in import pretend_a_device, rehearse

from bench import __main__ as cli
from bench.gpu import run as gpu
from bench.paired import layouts, projector

_ON_THE_CPU = ("pipeline", "projector", "reduction", "layouts")
_SHORT = ["--frames", "8", "--new-tokens", "4"]


def main() -> int:
    if sys.argv[1] == "gpu":
        pretend_a_device(setattr)
        gpu.BENCH = [sys.executable, str(Path(__file__).resolve())]
        gpu.why_no_proof = _why_no_report
    elif sys.argv[1] in _ON_THE_CPU:
        make_small(sys.argv[1])
        words = {"cuda": "cpu", "7b": "tiny"}
        sys.argv = [words.get(word, word) for word in sys.argv] + (_SHORT if sys.argv[1] == "pipeline" else [])
    else:
        rehearse(setattr, setitem)
    return cli.main()


def make_small(command: str) -> None:
    layouts.CHANNELS = {"after": 8, "before": 4}
    for name, value in {"FRAMES": 6, "GRID": (8, 8), "VISION": 32, "LANGUAGE": 64, "_CHECKED_FRAMES": 3}.items():
        setattr(projector, name, value)
    if command == "reduction":  # it imports transformers
        from bench.reduction import cost, first_logits, mixture_prefill, row_kernels

        shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=8)
        mixture_prefill.GRID, mixture_prefill.FRAMES = (8, 8), 10
        row_kernels.WIDTH, row_kernels.HEADS = 64, 4
        cost.PREFILLS["cpu"] = mixture_prefill.MixturePrefill("tiny", shape, torch.float32)
        cost.QUESTIONS["cpu"] = first_logits.FirstLogits("tiny", torch.float32)


def _why_no_report(report: Path, needed: tuple[str, ...], why_no_proof=gpu.why_no_proof) -> str | None:
    """As gpu.why_no_proof, but skipped tests are expected."""
    reason = why_no_proof(report, needed)
    return None if reason and reason.endswith("was skipped") else reason


if __name__ == "__main__":
    raise SystemExit(main())
