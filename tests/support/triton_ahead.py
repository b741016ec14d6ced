"""python tests/support/triton_ahead.py ARCH FILE: compiles the Triton kernels for sm_ARCH, without a GPU.

Writes a list of {kernel, name, dtype, vector, constants, ptx, sass, registers, stack, local} as JSON.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from sfllava_fast.ops.backends import registry


class Target:
    """A driver that answers what a compilation asks."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


def cases(kernels):
    """Each kernel with the constants between the plan's numbers and (block, vector)."""
    # Tile width, rows and columns of a fine box, whether it is a mean, frames repeat, every frame has tiles.
    layouts = {
        "the default layout": (6, 1, 2, False, False, True),
        "repeated frames": (6, 1, 2, False, True, True),
        "2x2 means": (6, 2, 2, True, False, True),
        "every patch": (4, 1, 1, False, False, False),
    }
    default = layouts["the default layout"]
    for kernel in (kernels.pool_boxes, kernels.spread_boxes):
        yield kernel, torch.bfloat16, (256, 8), "boxes"
        yield kernel, torch.float32, (128, 4), "boxes"
        yield kernel, torch.bfloat16, (128, 1), "boxes"
    for name, constants in layouts.items():
        yield kernels.pool_tiles, torch.bfloat16, (*constants, 256, 8), name
        yield kernels.spread_tiles, torch.bfloat16, (*constants, 256, 8), name
    yield kernels.pool_tiles, torch.float16, (*default, 256, 8), "the default layout"
    yield kernels.pool_tiles, torch.float32, (*default, 128, 4), "the default layout"
    for kernel in (kernels.pool_tiles, kernels.spread_tiles):
        yield kernel, torch.bfloat16, (*default, 128, 1), "the default layout"


def compile_for(arch):
    driver.set_active(Target(arch))
    kernels = registry.triton_kernels()
    for kernel, dtype, constants, name in cases(kernels.pool_launch):
        dtypes = kernels.pool_launch.dtypes_of(kernel, dtype)
        compiled = kernels.launch.compile_kernel(kernel, dtypes, constants, arch, num_warps=1, enable_fp_fusion=False)
        yield {
            "kernel": kernel.fn.__name__,
            "name": name,
            "dtype": str(dtype),
            "vector": constants[-1],
            "constants": constants,
            "ptx": compiled.asm["ptx"],
            "sass": compiled.asm["sass"],
            **resources(compiled.asm["cubin"]),
        }


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"])}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(list(compile_for(int(sys.argv[1])))))
