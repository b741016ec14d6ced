"""python tests/support/triton_ahead_rows.py ARCH FILE: kernels of rows and attention, at real sizes.

Writes a list of {kernel, name, ptx, sass, registers, stack, local} as JSON.
"""

import json
import sys
from pathlib import Path

from torch import bfloat16, float32, int16, int32, int64
from triton.runtime.driver import driver
from triton_ahead import Target, resources

from sfllava_fast.ops.backends import registry


def cases(kernels):
    """Kernel, what is compiled, tensors' dtypes, constants, options: frames of 288, 4096 channels, heads of 128."""
    launch, rows, attention = kernels.rows_launch, kernels.rows_launch.kernels, kernels.rows_launch.attention
    yield rows.top_per_frame, "a frame", (bfloat16, int32, int64, int32), (512,), {"num_warps": 4}
    yield rows.gather_rows, "16 bits", (int64, *(int16,) * 6), (3, 4096, 8), {"num_warps": 4}
    yield rows.gather_rows, "32 bits", (int64, *(int32,) * 6), (1, 2048, 4), {"num_warps": 4}
    for name, dtype, blend, block in (("copies", int16, False, 4096), ("blends", bfloat16, True, 4096)):
        tensors = (int64, dtype, dtype, float32 if blend else int64, dtype)
        yield rows.scatter_rows_in_place, name, tensors, (blend, block, 8), launch.EXACT
        yield rows.scatter_rows, name, tensors, (blend, 4, block // 4, 8), launch.EXACT
    for dtype, vector in ((bfloat16, 8), (float32, 4)):
        constants = (launch.QUERIES, launch.KEYS, 128, vector)
        tensors = (dtype, dtype, float32)
        yield attention.sum_blocks, str(dtype), tensors, constants, launch.sum_options(dtype)
        yield attention.add_probabilities, str(dtype), (*tensors, float32), constants, {"num_warps": 4}


def compile_for(arch):
    driver.set_active(Target(arch))
    kernels = registry.triton_kernels()
    for kernel, name, dtypes, constants, options in cases(kernels):
        compiled = kernels.launch.compile_kernel(kernel, dtypes, constants, arch, **options)
        yield {
            "kernel": kernel.fn.__name__,
            "name": name,
            "ptx": compiled.asm["ptx"],
            "sass": compiled.asm["sass"],
            **resources(compiled.asm["cubin"]),
        }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(list(compile_for(int(sys.argv[1])))))
