"""python tests/support/triton_ahead_project.py ARCH FILE: the projector's kernels, at their real sizes.

Writes a list of {kernel, name, tile, first, ptx, sass, registers, stack, local} as JSON; first: the tile in use.
"""

import json
import sys
from pathlib import Path

import torch
from triton.runtime.driver import driver
from triton_ahead import Target, resources

from sfllava_fast.ops.backends import registry

INNER = 4096
# Whether patches are kept, units are tokens, some units are no whole box; patches of a unit; the dtype.
LAYOUTS = {
    "the default layout": (True, False, False, 4, torch.bfloat16),
    "pairs that nest": (False, True, False, 2, torch.float16),
    "overlapping boxes": (True, True, True, 4, torch.bfloat16),
    "single patches": (True, True, False, 1, torch.bfloat16),
}


def cases(launch, major):
    """Kernel, what is compiled, tensors' dtypes, the constants between the numbers and the tile, tile, its place."""
    default, pairs, overlapping, single = LAYOUTS
    for place, tile in enumerate(launch.POOL_TILES[major]):
        for name in ((default, pairs, overlapping), (single,))[place]:  # each with the tile that it is launched with
            *layout, dtype = LAYOUTS[name]
            dtypes = (dtype, dtype, dtype, torch.int32, torch.float32, dtype)
            yield launch.project_tiles, name, dtypes, (True, INNER, True, *layout), tile, place
    for place, tile in enumerate(launch.ROWS_TILES[major]):
        for dtype in (torch.bfloat16, torch.float16)[: 1 if place else 2]:
            dtypes = (torch.float32, dtype, dtype, dtype)
            yield launch.project_rows, str(dtype), dtypes, (True, INNER, True, torch.finfo(dtype).max), tile, place


def compile_for(arch):
    driver.set_active(Target(arch))
    kernels = registry.triton_kernels()
    for kernel, name, dtypes, constants, tile, place in cases(kernels.project_launch, arch // 10):
        constants = (*constants, *tile[:3], 8)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        compiled = kernels.launch.compile_kernel(kernel, dtypes, constants, arch, **options)
        yield {
            "kernel": kernel.fn.__name__,
            "name": name,
            "tile": tile,
            "first": not place,
            "ptx": compiled.asm["ptx"],
            "sass": compiled.asm["sass"],
            **resources(compiled.asm["cubin"]),
        }


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(list(compile_for(int(sys.argv[1])))))
