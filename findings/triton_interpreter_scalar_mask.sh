#!/usr/bin/env bash
# Triton 3.9's interpreter (TRITON_INTERPRET=1) refuses a mask that a vector's and a scalar's comparison make together,
# as in `(offsets < n) & (limit > 0)`, with "mask has unsupported dtype". The language reference allows it, the compiler
# takes it, and the interpreters of 3.6, 3.7 and 3.8 computed it.
#
# Why: InterpreterBuilder.binary_op names the result of a comparison after its operands, int32, though its data are
# booleans. create_splat makes a scalar one a vector of the type that it is named after: a mask of int32. Up to 3.8
# the interpreter's load and store took that; 3.9's check what they are given.
#
# Needs Python 3.11 or newer (PYTHON=...) and a network; 3.9.0 and NumPy 2.4.6 go into a folder that is removed.
# Exit status: 0 where the behaviour is as stated, 1 where it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --no-deps triton==3.9.0 numpy==2.4.6

cat > "$folder/scalar_mask.py" <<'PYTHON'
import sys

import numpy as np
import triton
import triton.language as tl


@triton.jit
def copy(source, to, n, limit, SCALAR: tl.constexpr):
    offsets = tl.arange(0, 8)
    mask = offsets < n
    if SCALAR:
        mask = mask & (limit > 0)
    numbers = tl.load(source.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    tl.store(to.to(tl.pointer_type(tl.float32)) + offsets, numbers)


def run(scalar):
    source, to = np.arange(1, 9, dtype=np.float32), np.full(8, -1, np.float32)
    copy[(1,)](source.ctypes.data, to.ctypes.data, 5, 3, scalar)
    return to.tolist()


print("triton", triton.__version__, "numpy", np.__version__)
expected = [1.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0]
vector = run(False)
print("a vector's comparison:              ", vector)
try:
    both = str(run(True))
except Exception as error:
    both = f"{type(error).__name__}: {error}"
print("a vector's and a scalar's comparison:", both)
as_stated = vector == expected and "mask has unsupported dtype" in both
print("as stated" if as_stated else "NOT as stated")
sys.exit(not as_stated)
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/scalar_mask.py"
